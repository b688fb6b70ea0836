"""Attention of one new token per row over keys and values that lie in pages.

    out_r = softmax(scaling * q_r K_r^T) V_r        K_r, V_r: the first lengths[r] tokens of row r's pages

    keys, values (N, KVH, P, D)   N pages of P tokens; rows may share pages
    table (R, M)                  row r's pages in order; token t is keys[table[r, t // P], :, t % P]

The H query heads are KVH groups of g: no head is repeated, and no cache is gathered or concatenated.

PyTorch (CPU): the pages in use lie densely at the front of the pool, so ONE batched product over
(page, kv head) reads keys[:used] in place; a page's weights are exp(scores - highest of its row), and its
result is added to that row. A page that several rows share (a prompt's) is read once for up to SHARERS.
Measured, one thread of an EPYC 9004, 64 rows of 308 tokens, 9 heads on 3 of 64, ms a layer, bf16/f32:
this 2.5 / 4.3 (page 32), of which reading keys and values at a thread's 13 GB/s is 1.2 / 2.3. In an
earlier run: one product a row over a view of a slot cache 9.5 / 7.7 (bfloat16 copies the view),
scaled_dot_product_attention with the group as query tokens 6.5 / 5.2, pages gathered first 9.6 / 37.

Triton (CUDA): a program per row, kv head and split of the sequence; splits are used when rows are few, and
a second kernel merges them. On an H200 up to 4.2 TB/s (1,024 rows of 1,024 tokens, 12 heads on 2 of 128).

Left out: queries of more than one token (prefill), sliding windows, sinks, soft-capping; float32 scores in
bfloat16 on a CPU: of Qwen2.5-0.5B, whose keys have biases of up to 211, 0.8% of the log-probs are more than
a tenth off float32's as a ratio, of transformers' own 0.4%.
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
    plan_pages(table, lengths, KVH, P), which all layers of a step share; made here if it is not given.
    """
    assert query.ndim == 3 and keys.shape == values.shape and keys.shape[3] == query.shape[2], (
        query.shape, keys.shape, values.shape)
    assert query.shape[1] % keys.shape[1] == 0, f"{query.shape[1]} heads are not groups of {keys.shape[1]}"
    if query.is_cuda and triton is not None:
        return triton_paged_attention(query, keys, values, table, lengths, scaling)
    plan = plan or plan_pages(table.cpu().numpy(), lengths.cpu().numpy(), *keys.shape[1:3], query.device)
    return torch_paged_attention(query, keys, values, plan, scaling)


@dataclass(frozen=True)
class Plan:
    """Who reads which page, as tensors. The first n pages of the pool are read once each, for one row; the S
    pages of `shared` once more, for up to B rows each. That makes E = n KVH + S KVH B reads by g heads.

    Pages of 2 tokens, one head, rows of 3 and 4 tokens with table [[0, 1], [0, 2]], so that page 0 is shared:
    shared [0], reader [0, 0, 1, 0, 1], target [2, 0, 1, 0, 1] (2: page 0's own read serves nobody), place
    [4, 1, 3, 0, 2] (4: nowhere), and the bias of page 1, whose second token is none, [0, -1e30]."""

    width: int  # M: pages of the longest row
    pages: int  # n
    shared: torch.Tensor  # (S,)
    reader: torch.Tensor  # (E,) row and kv head: row * KVH + head
    target: torch.Tensor  # (E,) the same, or row R where nobody needs it: no row's page, or a shared one's
    place: torch.Tensor  # (E,) (row * M + which of the row's pages) * KVH + head, or R * M for the row
    bias: torch.Tensor  # (E,1,P) 0, or a large negative number beyond the row's length


def plan_pages(table: np.ndarray, lengths: np.ndarray, KVH: int, P: int, device="cpu") -> Plan:
    """Turn the page table (R,M) into the reads of torch_paged_attention."""
    R = len(lengths)
    counts = -(-lengths // P)
    M = int(counts.max())
    row = np.repeat(np.arange(R), counts)
    index = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the page in its row
    page = table[row, index].astype(np.int64)
    users = np.bincount(page)
    n, single = len(users), users[page] == 1
    order = np.flatnonzero(~single)[np.argsort(page[~single], kind="stable")]
    rank = np.arange(len(order)) - np.searchsorted(page[order], page[order])  # among the rows of the page
    B = min(int(rank.max(initial=0)) + 1, SHARERS)
    groups, group = np.unique(page[order] * R + rank // B, return_inverse=True)
    S, which = len(groups), np.concatenate([np.flatnonzero(single), order])
    job = np.concatenate([page[single], n + group * B + rank % B])  # of n + S B

    def spread(kind, empty):
        out = np.full(n + S * B, empty)
        out[job] = kind[which]
        heads = np.arange(KVH)
        own, shared = out[:n, None] * KVH + heads, out[n:].reshape(S, 1, B) * KVH + heads[:, None]
        return torch.from_numpy(np.concatenate([own.ravel(), shared.ravel()])).to(device)

    fill = spread(np.minimum(lengths[row] - index * P, P), 0) // KVH
    outside = torch.arange(P, device=device) >= fill[:, None, None]
    bias = torch.zeros(outside.shape, device=device).masked_fill_(outside, -1e30)
    return Plan(M, n, torch.from_numpy(groups // R).to(device), spread(row, 0), spread(row, R),
                spread(row * M + index, R * M), bias)


def torch_paged_attention(query, keys, values, plan, scaling):
    (R, H, D), (_, KVH, P, _), M, n = query.shape, keys.shape, plan.width, plan.pages
    g, own = H // KVH, n * KVH
    parts = [(slice(own), keys[:n], values[:n])]  # which of the E reads, and what they read
    if len(plan.shared):
        parts.append((slice(own, None), *(x.index_select(0, plan.shared) for x in (keys, values))))
    parts = [(reads, k.flatten(0, 1), v.flatten(0, 1)) for reads, k, v in parts]  # (pages * KVH, P, D)
    queries = query.reshape(R * KVH, g * D).index_select(0, plan.reader)  # (E,gD)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.empty(len(queries), g, P, dtype=dtype, device=query.device)  # (E,g,P)
    for reads, k, _ in parts:  # the heads that read a page are the rows of one product: g, or B * g
        product = torch.bmm(queries[reads].view(len(k), -1, D), k.transpose(1, 2))
        torch.add(product.view(-1, g, P), plan.bias[reads], out=scores[reads])
    top = scores.new_full(((R * M + 1) * KVH, g), -torch.inf)
    top[plan.place] = scores.amax(-1)
    scale = scaling * math.log2(math.e)  # exp2 takes a third of exp's time
    shift = top[: R * M * KVH].view(R, M, H).amax(1).view(R * KVH, g) * -scale
    weights = torch.add(shift.index_select(0, plan.reader)[..., None], scores, alpha=scale).exp2_()
    total = top.new_zeros((R + 1) * KVH, g).index_add_(0, plan.target, weights.sum(-1))
    weights = weights.to(values.dtype)
    out = top.new_zeros((R + 1) * KVH, g * D)
    for reads, _, v in parts:
        product = torch.bmm(weights[reads].view(len(v), -1, P), v).view(-1, g * D)
        out.index_add_(0, plan.target[reads], product.to(out.dtype))
    return (out[: R * KVH].view(R, H, D) / total[: R * KVH].view(R, H, 1)).to(query.dtype)


if triton is not None:

    @triton.jit
    def paged_attention_kernel(
        query_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr, scaling, query_stride,
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
        head = kv_head * GROUP + heads  # (GROUP_BLOCK,)
        q = tl.load(query_ptr + row * query_stride + head[:, None] * D + d[None, :], mask=own, other=0.0)
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
        head = (row * H + head) * SPLITS + split
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


def triton_paged_attention(query, keys, values, table, lengths, scaling, splits=None, stages=3):
    (R, H, D), (_, KVH, P, _) = query.shape, keys.shape
    assert query.stride()[1:] == (D, 1) and table.stride(1) == 1
    assert keys.is_contiguous() and values.is_contiguous()
    if splits is None:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        splits = split_count(R * KVH, table.shape[1], processors)
    group, d_block = H // KVH, max(16, triton.next_power_of_2(D))
    token_block = 16 if query.dtype == torch.float32 else 64  # what registers hold, under Triton 3.6, too
    out = torch.empty(R, H, D, dtype=query.dtype, device=query.device)
    part = torch.empty(R, H, splits, D, dtype=torch.float32, device=query.device) if splits > 1 else out
    lse = torch.empty(R, H, splits, dtype=torch.float32, device=query.device) if splits > 1 else out
    with torch.cuda.device_of(query):  # Triton launches on the current device, which may be another
        paged_attention_kernel[(R, KVH, splits)](
            query, keys, values, table, lengths, part, lse, scaling, query.stride(0), table.stride(0), H, P=P,
            D=D, GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group)), TOKEN_BLOCK=token_block,
            D_BLOCK=d_block, SPLITS=splits, num_warps=4, num_stages=stages)
        if splits > 1:
            merge_kernel[(R * H,)](part, lse, out, D=D, D_BLOCK=d_block, SPLITS=splits)
    return out
