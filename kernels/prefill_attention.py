"""Attention of many new tokens over keys and values in pages and over each other: prefill, the judge's reads.

    out_i = softmax(scaling * q_i K_i^T) V_i

A pass packs pieces (runs of a prompt, with what rides behind them) one after the other, T tokens in all. A
piece is one or more spans (context, own, count): the span's queries are the last `count` tokens of `own`, row
numbers in the piece, and each sees the first `context` tokens of the piece's pages and, of `own`, all up to
itself. A prompt's run is one span; a stem behind a cut of the prompt another, whose context ends at the cut.
The pages hold what the pass itself adds to them: keys and values are written before.

PyTorch (CPU): a piece is one call of scaled_dot_product_attention over context and piece, with a mask.

Triton (CUDA): a program per tile and kv head; a tile is up to 128 rows (float32: 32), each a token's query
head, of one span. By a call per piece the host took three times an H200's own time (64 prompts of 300 tokens,
Qwen2.5-1.5B's shape). Checked in Triton's interpreter; not yet timed on a GPU.

Left out: gradients (packed_attention.py has them), one query a row (paged_attention.py is faster there).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the PyTorch version serves
    triton = None


def prefill_attention(query, key, value, keys, values, plan, scaling):
    """query (T,H,D), key, value (T,KVH,D); keys, values (N,KVH,P,D); plan: of plan_prefill -> (T,H,D)."""
    if isinstance(plan, Tiles):
        return triton_prefill_attention(query, key, value, keys, values, plan, scaling)
    return torch_prefill_attention(query, key, value, keys, values, plan, scaling)


def upload(tensor, device):
    """The tensor on `device`. From pinned memory, so that the host does not wait for what a GPU is at."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def plan_prefill(pieces, group: int, D: int, dtype, device):
    """What all layers of a pass share. pieces: of each its spans and its pages' indices in the pool. group:
    query heads on a kv head; D: a head's size."""
    if torch.device(device).type == "cuda" and triton is not None:
        return plan_tiles(pieces, group, D, dtype).to(device)
    return plan_masks(pieces, dtype, device)


def plan_masks(pieces, dtype, device) -> list[tuple]:
    """Of each piece its tokens, its first span's context C and those pages, and what is added to its scores
    (tokens, C + tokens), if that is not simply causal."""
    plan = []
    for spans, pages in pieces:
        start, T, bias = spans[0][0], sum(count for _, _, count in spans), None
        if start or spans[1:]:
            mask = torch.zeros(T, start + T, dtype=torch.bool)
            for context, own, count in spans:
                rows = list(own[len(own) - count :])
                mask[rows, :context] = True  # a later span's context may reach into the first
                causal = torch.ones(count, len(own), dtype=torch.bool).tril(len(own) - count)
                mask[np.ix_(rows, np.add(own, start))] = causal
            # float once, since 0 / -inf is what attention adds; a bool mask would be converted in every layer
            bias = upload(torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf), device)
        plan.append((T, start, upload(torch.tensor(pages, dtype=torch.long), device), bias))
    return plan


def torch_prefill_attention(query, key, value, keys, values, plan, scaling):
    out, at, (group, P) = query.new_empty(query.shape), 0, (query.shape[1] // key.shape[1], keys.shape[2])
    for T, start, pages, bias in plan:
        part = slice(at, at := at + T)
        q, k, v = (x[part].transpose(0, 1) for x in (query, key, value))  # (H,T,D), (KVH,T,D)
        if start:
            before = pages[: -(-start // P)]
            k, v = (torch.cat([pool[before].transpose(0, 1).flatten(1, 2)[:, :start], own], 1)
                    for pool, own in ((keys, k), (values, v)))
        # kv heads as the batch, a kv head's query heads beside it: no head is repeated
        k, v = (x[:, None].expand(-1, group, -1, -1) for x in (k, v))
        done = F.scaled_dot_product_attention(q.unflatten(0, (-1, group)), k, v, attn_mask=bias,
                                              is_causal=bias is None, scale=scaling)
        out[part] = done.flatten(0, 1).transpose(0, 1)
    return out


@dataclass(frozen=True)
class Tiles:
    """tiles (n,6): first query, queries, piece, context, where its own keys start in `own`, how many of them
    the first query sees. own: packed rows. table (pieces, M): pages. All int32."""

    tiles: torch.Tensor
    own: torch.Tensor
    table: torch.Tensor
    rows: int  # of a tile

    def to(self, device):
        return Tiles(*(upload(x, device) for x in (self.tiles, self.own, self.table)), self.rows)


def plan_tiles(pieces, group: int, D: int, dtype) -> Tiles:
    # what registers hold, and of large heads the shared memory of small cards
    rows = 32 if dtype == torch.float32 else 128 if D <= 128 else 64
    assert group <= rows, f"{group} query heads on a kv head"
    tiles, own_rows, at = [], [], 0
    for piece, (spans, _) in enumerate(pieces):
        first = at
        for context, own, count in spans:
            for done in range(0, count, rows // group):
                tiles.append((at + done, min(rows // group, count - done), piece, context, len(own_rows),
                              len(own) - count + done + 1))
            own_rows += [first + row for row in own]
            at += count
    tiles.sort(key=lambda tile: -tile[3] - tile[5])  # the longest first, so that none is left over at the end
    width = max(len(pages) for _, pages in pieces) // 16 * 16 + 16  # Triton compiles anew for other divisors
    table = np.zeros((len(pieces), width), np.int32)
    for line, (_, pages) in zip(table, pieces):
        line[: len(pages)] = pages
    return Tiles(*(torch.from_numpy(np.asarray(x, np.int32)) for x in (tiles, own_rows, table)), rows)


if triton is not None:

    @triton.jit
    def fold(q, k, v, seen, scale, top, total, acc):
        """One block of keys into the running maximum (of scores times log2 e), sum and weighted sum."""
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        return new_top, total, acc

    @triton.jit
    def prefill_attention_kernel(
        query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, tile_ptr, own_ptr, table_ptr, out_ptr, scale,
        query_stride, key_stride, width, H, P: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
        ROWS: tl.constexpr, KEYS: tl.constexpr, D_BLOCK: tl.constexpr,
    ):  # fmt: skip
        tile_ptr += tl.program_id(0) * 6
        kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
        first, count, piece = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
        context, own_first, own_seen = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
        row, d, block = tl.arange(0, ROWS), tl.arange(0, D_BLOCK), tl.arange(0, KEYS)
        token, head = row // GROUP, kv_head * GROUP + row % GROUP
        at = (first + token).to(tl.int64)
        own = (token < count)[:, None] & (d[None, :] < D)
        query_at = (at * query_stride + head * D)[:, None] + d[None, :]
        q = tl.load(query_ptr + query_at, mask=own, other=0.0)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D_BLOCK], tl.float32)
        for start in range(0, context, KEYS):
            t = start + block
            live = t < context
            page = tl.load(table_ptr + piece * width + t // P, mask=live, other=0).to(tl.int64)
            where = (((page * kv_heads + kv_head) * P + t % P) * D)[:, None] + d[None, :]
            mask = live[:, None] & (d[None, :] < D)  # what lies beyond, NaN perhaps, is never read
            k = tl.load(keys_ptr + where, mask=mask, other=0.0)
            v = tl.load(values_ptr + where, mask=mask, other=0.0)
            top, total, acc = fold(q, k, v, live[None, :], scale, top, total, acc)
        end = own_seen + count - 1  # of the keys that the last query sees
        for start in range(0, end, KEYS):
            t = start + block
            line = tl.load(own_ptr + own_first + t, mask=t < end, other=0).to(tl.int64)
            where = (line * key_stride + kv_head * D)[:, None] + d[None, :]
            mask = (t < end)[:, None] & (d[None, :] < D)
            k = tl.load(key_ptr + where, mask=mask, other=0.0)
            v = tl.load(value_ptr + where, mask=mask, other=0.0)
            top, total, acc = fold(q, k, v, t[None, :] < own_seen + token[:, None], scale, top, total, acc)
        tl.store(out_ptr + (at * H + head)[:, None] * D + d[None, :], acc / total[:, None], mask=own)


def block_shape(query) -> tuple[int, int]:
    """Keys at a time, and the compiler's num_stages, by its code (not yet timed): 64 keys spill registers but
    on Hopper and the large Blackwells (these spill at most 24 bytes, at few shapes); and where keys lie is loaded first, which takes stages of its own: with
    5 three copies of keys or values are under way while a block is computed, with fewer none. D = 256 has no
    room for them."""
    small = query.is_cuda and torch.cuda.get_device_capability(query.device)[0] not in (9, 10)
    keys = 16 if query.dtype == torch.float32 else 32 if small else 64
    return keys, 5 if query.shape[2] <= 128 else 2


def triton_prefill_attention(query, key, value, keys, values, plan, scaling):
    (T, H, D), KVH, P = query.shape, key.shape[1], keys.shape[2]
    assert query.stride()[1:] == key.stride()[1:] == (D, 1) and key.stride() == value.stride()
    assert keys.is_contiguous() and values.is_contiguous()
    out = torch.empty(T, H, D, dtype=query.dtype, device=query.device)
    block, stages = block_shape(query)
    with torch.cuda.device_of(query):  # Triton launches on the current device, which may be another
        prefill_attention_kernel[(len(plan.tiles), KVH)](
            query, key, value, keys, values, plan.tiles, plan.own, plan.table, out,
            scaling * math.log2(math.e), query.stride(0), key.stride(0), plan.table.shape[1], H, P=P, D=D,
            GROUP=H // KVH, ROWS=plan.rows, KEYS=block, D_BLOCK=max(16, triton.next_power_of_2(D)),
            num_warps=8, num_stages=stages)
    return out
