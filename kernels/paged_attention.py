"""Attention of one new token per row over keys and values that lie in pages.

    out_r = softmax(scaling * q_r K_r^T) V_r        K_r, V_r: the first lengths[r] tokens of row r's pages

    keys, values (N, KVH, P, D)   N pages of P tokens; rows may share pages
    table (R, M)                  row r's pages in order; token t is keys[table[r, t // P], :, t % P]

The H query heads are KVH groups of g: no head is repeated, and no cache is gathered or concatenated.

PyTorch (CPU): the pages in use lie densely at the front of the pool, so ONE batched product over
(page, kv head) reads keys[:used] in place; a page's weights are exp(scores - lse of its row), and its
result is added to that row. A page that several rows share (a prompt's) is read once for up to SHARERS of them.
Measured, one thread of an EPYC 9004, 64 rows of 308 tokens, 9 heads on 3 of 64, ms a layer, bf16/f32:
this 3.0 / 6.5 (page 32), one product a row over a view of a slot cache 9.5 / 7.7 (bfloat16 copies the view),
scaled_dot_product_attention with the group as query tokens 6.5 / 5.2, pages gathered first 9.6 / 37.

Triton (CUDA): a program per row, kv head and split of the sequence; splits are used when rows are few, and
a second kernel merges them. Checked in Triton's interpreter; not yet timed on a GPU.

Left out: queries of more than one token (prefill), sliding windows, sinks, soft-capping.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the PyTorch version serves
    triton = None

SHARERS = 8  # rows for which one read of a shared page serves: more pads groups of unequal size


def paged_attention(query, keys, values, table, lengths, scaling, plan=None):
    """query (R,H,D), keys and values (N,KVH,P,D), table (R,M) and lengths (R,) integer -> (R,H,D).

    lengths[r] >= 1; table entries beyond a row's pages are ignored, and so is what lies in a page beyond the
    row's length (the PyTorch version needs it finite, the Triton version does not read it). plan: on a CPU,
    plan_pages(table, lengths, P), which all layers of a step share; made here if it is not given.
    """
    assert query.ndim == 3 and keys.shape == values.shape and keys.shape[3] == query.shape[2], (
        query.shape, keys.shape, values.shape)
    assert query.shape[1] % keys.shape[1] == 0, f"{query.shape[1]} heads are not groups of {keys.shape[1]}"
    if query.is_cuda and triton is not None:
        return triton_paged_attention(query, keys, values, table, lengths, scaling)
    plan = plan or plan_pages(table.cpu().numpy(), lengths.cpu().numpy(), keys.shape[2], query.device)
    return torch_paged_attention(query, keys, values, plan, scaling)


@dataclass(frozen=True)
class Plan:
    """Which page serves which row, as tensors. n pages in front of the pool, S groups of at most B rows that
    share a page; `place` numbers (row, page of the row), R*M stands for nowhere."""

    rows: int
    width: int  # M: pages of the longest row
    reader: torch.Tensor  # (n,) the row that a page belongs to
    target: torch.Tensor  # (n,) the same, or R: a page that several rows share, or none
    place: torch.Tensor  # (n,)
    bias: torch.Tensor  # (n,1,P) 0 or a large negative number beyond the row's length
    shared: torch.Tensor  # (S,) pages
    shared_reader: torch.Tensor  # (S,B)
    shared_target: torch.Tensor  # (S,B)
    shared_place: torch.Tensor  # (S,B)
    shared_bias: torch.Tensor  # (S*B,1,P)


def plan_pages(table: np.ndarray, lengths: np.ndarray, P: int, device="cpu") -> Plan:
    """Turn the page table (R,M) into the jobs of torch_paged_attention."""
    R = len(lengths)
    counts = -(-lengths // P)
    M = int(counts.max())
    row = np.repeat(np.arange(R), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the page in its row
    page = table[row, index].astype(np.int64)
    place, fill = row * M + index, np.minimum(lengths[row] - index * P, P)
    users = np.bincount(page)
    n, single = len(users), users[page] == 1

    def spread(kind, empty):
        out = np.full(n, empty)
        out[page[single]] = kind[single]
        return torch.from_numpy(out).to(device)

    def bias(fill):
        outside = torch.arange(P, device=device) >= fill[..., None]
        return torch.zeros(outside.shape, device=device).masked_fill_(outside, -1e30)[..., None, :]

    order = np.flatnonzero(~single)[np.argsort(page[~single], kind="stable")]
    rank = np.arange(len(order)) - np.searchsorted(page[order], page[order])  # among the rows of the page
    width = min(int(rank.max(initial=0)) + 1, SHARERS)
    groups, group = np.unique(page[order] * R + rank // width, return_inverse=True)

    def gather(kind, empty):
        out = np.full((len(groups), width), empty)
        out[group, rank % width] = kind[order]
        return torch.from_numpy(out).to(device)

    return Plan(
        R, M, spread(row, 0), spread(row, R), spread(place, R * M), bias(spread(fill, 0)),
        torch.from_numpy(groups // R).to(device), gather(row, 0), gather(row, R), gather(place, R * M),
        bias(gather(fill, P).flatten()))


def torch_paged_attention(query, keys, values, plan, scaling):
    (R, H, D), (_, KVH, P, _) = query.shape, keys.shape
    g, n, (S, B) = H // KVH, len(plan.reader), plan.shared_reader.shape
    query = query.reshape(R, H * D)
    # scores of every page in use with the row it belongs to: a batched product over (page, kv head)
    own = query.index_select(0, plan.reader).view(n * KVH, g, D)
    scores = torch.bmm(own, keys[:n].flatten(0, 1).transpose(1, 2)).view(n, H, P) + plan.bias  # float32
    # the highest of each (row, page of the row); the entry behind them takes what belongs to no row
    top = scores.new_full((R * plan.width + 1, H), -torch.inf)
    top[plan.place] = scores.amax(-1)
    if S:  # one read of a shared page for up to B rows: their B * g heads are the rows of one product
        own = query.index_select(0, plan.shared_reader.flatten()).view(S, B, KVH, g, D).transpose(1, 2)
        shared_keys, shared_values = (x.index_select(0, plan.shared).flatten(0, 1) for x in (keys, values))
        shared = torch.bmm(own.reshape(S * KVH, B * g, D), shared_keys.transpose(1, 2))
        shared = shared.view(S, KVH, B, g, P).transpose(1, 2).reshape(S * B, H, P) + plan.shared_bias
        top[plan.shared_place.flatten()] = shared.amax(-1)
    scale = scaling * math.log2(math.e)  # of the scores: exp2 takes a third of exp's time
    shift = top[:-1].view(R, plan.width, H).amax(1) * -scale  # (R,H)
    out, total = scores.new_zeros(R + 1, H * D), scores.new_zeros(R + 1, H)

    def weigh(scores, reader, target):
        weights = torch.add(shift.index_select(0, reader)[..., None], scores, alpha=scale).exp2_()
        total.index_add_(0, target, weights.sum(-1))
        return weights.to(values.dtype)

    weights = weigh(scores, plan.reader, plan.target).view(n * KVH, g, P)
    part = torch.bmm(weights, values[:n].flatten(0, 1))
    out.index_add_(0, plan.target, part.view(n, H * D).to(out.dtype))
    if S:
        weights = weigh(shared, plan.shared_reader.flatten(), plan.shared_target.flatten())
        weights = weights.view(S, B, KVH, g, P).transpose(1, 2).reshape(S * KVH, B * g, P)
        part = torch.bmm(weights, shared_values).view(S, KVH, B, g, D).transpose(1, 2)
        out.index_add_(0, plan.shared_target.flatten(), part.reshape(S * B, H * D).to(out.dtype))
    return (out[:R].view(R, H, D) / total[:R, :, None]).to(query.dtype)


if triton is not None:

    @triton.jit
    def paged_attention_kernel(
        query_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr, scaling,
        table_stride, H, P: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
        TOKEN_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        kv_heads = tl.num_programs(1)
        length = tl.load(lengths_ptr + row)
        # whole blocks per split, so that only the last one is ragged
        per_split = tl.cdiv(tl.cdiv(length, TOKEN_BLOCK), SPLITS) * TOKEN_BLOCK
        start, end = split * per_split, tl.minimum(length, (split + 1) * per_split)
        heads, d = tl.arange(0, GROUP_BLOCK), tl.arange(0, D_BLOCK)
        own = (heads[:, None] < GROUP) & (d[None, :] < D)
        head = row * H + kv_head * GROUP + heads  # (GROUP_BLOCK,)
        q = tl.load(query_ptr + head[:, None] * D + d[None, :], mask=own, other=0.0)
        top = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)  # running maximum, sum of exp, weighted sum
        total = tl.zeros([GROUP_BLOCK], tl.float32)
        acc = tl.zeros([GROUP_BLOCK, D_BLOCK], tl.float32)
        for block in range(start, end, TOKEN_BLOCK):
            t = block + tl.arange(0, TOKEN_BLOCK)
            live = t < end
            page = tl.load(table_ptr + row * table_stride + t // P, mask=live, other=0).to(tl.int64)
            at = ((page * kv_heads + kv_head) * P + t % P) * D  # int64: a pool passes 2^31 numbers
            # masked loads: what lies beyond the length, NaN perhaps, is never read
            mask = live[:, None] & (d[None, :] < D)
            k = tl.load(keys_ptr + at[:, None] + d[None, :], mask=mask, other=0.0)
            v = tl.load(values_ptr + at[:, None] + d[None, :], mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            scores = tl.where(live[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top
        head = head * SPLITS + split
        empty = total == 0.0  # a split behind the row's end
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        tl.store(out_ptr + head[:, None] * D + d[None, :], acc, mask=own)
        if SPLITS > 1:
            lse = tl.where(empty, -float("inf"), top + tl.log(tl.where(empty, 1.0, total)))
            tl.store(lse_ptr + head, lse, mask=heads < GROUP)

    @triton.jit
    def merge_kernel(
        part_ptr, lse_ptr, out_ptr, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """One program per row and head: the splits' results, weighted by exp(lse - lse of all)."""
        head = tl.program_id(0).to(tl.int64)
        d, split = tl.arange(0, D_BLOCK), tl.arange(0, SPLITS)
        lse = tl.load(lse_ptr + head * SPLITS + split)
        weight = tl.exp(lse - tl.max(lse, 0))
        part = tl.load(part_ptr + (head * SPLITS + split)[:, None] * D + d[None, :],
                       mask=(split[:, None] < SPLITS) & (d[None, :] < D), other=0.0)
        out = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(out_ptr + head * D + d, out, mask=d < D)


def split_count(programs: int, width: int, processors: int) -> int:
    """Splits of the sequence: a power of two that gives each processor about two programs, at least 4 pages
    per split. A function of shapes alone, so that a CUDA graph may hold the launch."""
    splits = 1
    while splits < 32 and splits * programs < 2 * processors and width >= 8 * splits:
        splits *= 2
    return splits


def triton_paged_attention(query, keys, values, table, lengths, scaling, splits=None):
    (R, H, D), (_, KVH, P, _) = query.shape, keys.shape
    assert query.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and table.stride(1) == 1
    if splits is None:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        splits = split_count(R * KVH, table.shape[1], processors)
    group, d_block = H // KVH, max(16, triton.next_power_of_2(D))
    out = torch.empty_like(query)
    part = torch.empty(R, H, splits, D, dtype=torch.float32, device=query.device) if splits > 1 else out
    lse = torch.empty(R, H, splits, dtype=torch.float32, device=query.device) if splits > 1 else out
    with torch.cuda.device_of(query):  # Triton launches on the current device, which may be another
        paged_attention_kernel[(R, KVH, splits)](
            query, keys, values, table, lengths, part, lse, scaling, table.stride(0), H, P=P, D=D,
            GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group)), TOKEN_BLOCK=64, D_BLOCK=d_block,
            SPLITS=splits)
        if splits > 1:
            merge_kernel[(R * H,)](part, lse, out, D=D, D_BLOCK=d_block, SPLITS=splits)
    return out


# ---- check -------------------------------------------------------------------------------------------------


def plain_paged_attention(query, keys, values, table, lengths, scaling):
    """Row by row in float64: the reference of the tests."""
    out, group = torch.zeros(query.shape, dtype=torch.float64), query.shape[1] // keys.shape[1]
    for r, length in enumerate(lengths.tolist()):
        pages = table[r, : -(-length // keys.shape[2])].long()
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(group, 0)
                for x in (keys, values))
        weights = (torch.einsum("hd,htd->ht", query[r].double(), k) * scaling).softmax(-1)
        out[r] = torch.einsum("ht,htd->hd", weights, v)
    return out


def random_case(lengths, shared=0, H=4, KVH=2, D=64, P=32, seed=0, dtype=torch.float32, unused=torch.nan):
    """Rows of the given lengths, whose first `shared` pages are the same; pages in random order; `unused`
    fills everything that belongs to no row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    counts = (-(-lengths // P)).tolist()
    common = min([shared, *((lengths // P).tolist())])
    total = common + sum(c - common for c in counts)
    order = torch.randperm(total, generator=generator).tolist()
    head, order = order[:common], order[common:]
    keys, values = torch.full((2, total + 2, KVH, P, D), unused, dtype=dtype)
    table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    for r, (length, count) in enumerate(zip(lengths.tolist(), counts)):
        own, order = order[: count - common], order[count - common:]
        for i, page in enumerate(head + own):
            table[r, i] = page
            used = min(P, length - i * P)
            for x in (keys, values):
                x[page, :, :used] = torch.randn(KVH, used, D, generator=generator).to(dtype)
    query = torch.randn(len(counts), H, D, generator=generator).to(dtype)
    return query, keys, values, table, lengths


def check(device):
    for seed, (H, KVH, D, shared) in enumerate([(4, 4, 64, 0), (6, 3, 64, 2), (14, 2, 128, 1)]):
        case = random_case([1, 32, 33, 100, 257], shared, H, KVH, D, seed=seed, unused=0)
        case = [x.to(device) for x in case]
        want = plain_paged_attention(*(x.cpu() for x in case), D**-0.5)
        torch.testing.assert_close(paged_attention(*case, D**-0.5).cpu().double(), want, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    check("cuda" if torch.cuda.is_available() else "cpu")
    print("paged_attention agrees with float64")
