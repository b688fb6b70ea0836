"""Traces to one sequence without padding, in which a prompt stands once for all of its traces.

    rows (N,T)                          packed (L,)
    P P P a a a a .                     P P P a a a a b b c c c
    P P P b b . . .        pack()       └─────┘└────── traces, each at the positions behind its prompt
    P P P c c c . .     ──────────►     a prompt shared by three

Every layer but attention works token by token, so it sees the L packed tokens instead of N x T: at GSM8K's
lengths, eight traces a problem, less than half. exprl.py registers `packed_attention` with transformers.

On a CPU a prompt attends once, and each trace to its prompt and itself, where they stand in the packed
sequence: plain products, of up to BLOCK queries with the keys they see, computed anew for the gradient, so
that no more than a block's weights is ever held. Elsewhere attention gathers its rows, runs causal on them
as they would stand alone, and keeps one result per packed token.

Measured, one thread of an EPYC (Zen 5, bfloat16 instructions), 8 traces of 128 tokens behind a prompt of 120,
SmolLM2-135M's heads, ms a layer, forward / with gradient: bf16 4.5 / 14, float32 8.8 / 28; by rows, through
scaled_dot_product_attention, 16 / 54 and 15 / 50. Scores leave a bfloat16 product rounded; with keys less
their mean (Qwen2.5's have large biases) Qwen2.5-0.5B's log-probs are no further from float32's than by rows.

Left out: packed attention on CUDA without the gathered copies (varlen kernels exist for it).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 128  # queries, all heads that share a key beside each other
STRETCH = 1.2  # rows attend together while the longest has at most so many times the tokens of the shortest


@dataclass(frozen=True)
class Packing:
    """What attention needs to know of a packed sequence: on a CPU its spans, elsewhere the rows to gather."""

    spans: list[tuple[int, int, int, int]]  # start and end of the prompt before it (0, 0: none), and its own
    runs: list[torch.Tensor]  # of rows of about equal length: places (R,W)
    home: torch.Tensor  # (L,) the place of each packed token in the runs' flat results


def pack(ids: torch.Tensor, mask: torch.Tensor):
    """ids (N,T), padded on the right, and mask, true on the sampled tokens, which end each row.

    Returns the packed ids and positions (L,), the place in them of each row's tokens (N,T), and a Packing for
    attention. A row's last token is left out, since it predicts none."""
    rows, sampled = ids.cpu().numpy(), mask.cpu().numpy()
    starts, ends = sampled.argmax(1), sampled.shape[1] - 1 - sampled[:, ::-1].argmax(1)
    places, tokens, positions, prompts = np.zeros(rows.shape, np.int64), [], [], {}
    spans = []

    def add(row, start, end):
        tokens.extend(rows[row, start:end].tolist())
        positions.extend(range(start, end))
        return len(tokens) - (end - start)

    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        prompt = rows[row, :start].tobytes()
        if prompt not in prompts:
            prompts[prompt] = add(row, 0, start)
            spans.append((0, 0, prompts[prompt], len(tokens)))
        places[row, :start] = prompts[prompt] + np.arange(start)
        places[row, start:end] = add(row, start, end) + np.arange(end - start)
        spans.append((prompts[prompt], prompts[prompt] + start, len(tokens) - end + start, len(tokens)))
    order = ends.argsort(kind="stable")
    parts, runs, home, size = [order[:1]], [], np.zeros(len(tokens), np.int64), 0
    for row in order[1:]:
        if ends[row] <= STRETCH * ends[parts[-1][0]]:
            parts[-1] = np.append(parts[-1], row)
        else:
            parts.append(np.array([row]))
    for part in parts:
        inside = (place := np.arange(ends[part[-1]])) < ends[part, None]
        # Padding repeats the row's own last token: a GPU adds the gradients of equal places one by one.
        run = np.take_along_axis(places[part], np.minimum(place, ends[part, None] - 1), 1)
        runs.append(run)
        home[run[inside]] = size + inside.ravel().nonzero()[0]
        size += run.size
    tokens, positions, places, home, *runs = (
        torch.as_tensor(x, device=ids.device) for x in (tokens, positions, places, home, *runs))
    # FSDP walks through all that a layer is given: nothing that is not needed
    return tokens, positions, places, Packing(spans if ids.device.type == "cpu" else [], runs, home)


def packed_attention(module, query, key, value, attention_mask, scaling=None, packed=None, **_):
    """What transformers' layers call: query (1,H,L,D), key and value (1,KVH,L,D) -> (1,L,H,D).

    Without `packed` the rows come as they are, (B,H,T,D): causal, and no mask."""
    if packed is None:
        return attend(query, key, value, scaling), None
    by = attend_by_span if query.device.type == "cpu" else attend_by_row
    # under autocast a rotation may leave float32 beside values of fewer bits
    return by(query[0].to(value.dtype), key[0].to(value.dtype), value[0], packed, scaling)[None], None


def attend(query, key, value, scaling=None):
    """Causal attention of rows: (B,H,T,D), (B,KVH,T,D) -> (B,T,H,D)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)


def attend_by_row(query, key, value, packed: Packing, scaling=None):
    """(H,L,D), (KVH,L,D) -> (L,H,D): rows are gathered, runs of about equal length attend together."""
    heads, joined = [len(query), len(key), len(value)], torch.cat([query, key, value])
    done = [attend(*joined[:, run].transpose(0, 1).split(heads, 1), scaling) for run in packed.runs]
    return torch.cat([rows.flatten(0, 1) for rows in done])[packed.home]


def attend_by_span(query, key, value, packed: Packing, scaling=None):
    """The same for a CPU, nothing gathered: see BySpan."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return BySpan.apply(query, key, value, packed.spans, scaling)


class BySpan(torch.autograd.Function):
    """out_t = softmax(scale q_t K_t^T) V_t, K_t and V_t those of the prompt before t's span and of the span
    up to t. Gradients by the usual formulas, the weights P computed again:

        dV = P^T dO      dS = P * (dO V^T - rowsum(dO * O))      dQ = scale dS K      dK = scale dS^T Q
    """

    @staticmethod
    def forward(ctx, query, key, value, spans, scale):
        H, L, D = query.shape
        # One number less for all scores of a query changes no weight, but what bfloat16 rounds off is less.
        key = key - key.mean(1, keepdim=True)
        ctx.spans, ctx.scale, out = spans, scale, query.new_empty(L, H, D)
        for own, seen in blocks(spans):
            weights = block_weights(query, key, own, seen, scale)[1]
            part = weights.to(value.dtype) @ take(value, seen)  # (KVH, g T, D)
            out[own] = part.view(H, -1, D).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for own, seen in blocks(ctx.spans):
            (queries, keys), weights = block_weights(query, key, own, seen, ctx.scale)
            d_out, done = (x[own].transpose(0, 1).reshape(queries.shape) for x in (grad, out))
            mean = (d_out.to(wide) * done).sum(-1, keepdim=True)
            d_scores = (d_out @ take(value, seen).mT).to(wide).sub_(mean).mul_(weights).mul_(ctx.scale)
            d_scores = d_scores.to(query.dtype)
            d_query[:, own] = (d_scores @ keys).view_as(d_query[:, own])
            for total, product in ((d_key, d_scores.mT @ queries),
                                   (d_value, weights.to(grad.dtype).mT @ d_out)):
                for part, some in zip(seen, product.split([s.stop - s.start for s in seen], 1)):
                    total[:, part] += some
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def blocks(spans):
    """Queries that attend together, and what they see: a slice, and slices of which it ends the last."""
    for prompt_start, prompt_end, start, end in spans:
        for first in range(start, end, BLOCK):
            own = slice(first, min(first + BLOCK, end))
            yield own, [slice(prompt_start, prompt_end), slice(start, own.stop)]


def take(x, seen):
    return torch.cat([x[:, part] for part in seen], 1)


def block_weights(query, key, own, seen, scale):
    """The queries (KVH, g T, D), a key's heads beside each other, their keys (KVH, S, D), and the weights
    (KVH, g T, S), in float32 or better."""
    T, KVH, D = own.stop - own.start, len(key), query.shape[-1]
    queries, keys = query[:, own].reshape(KVH, -1, D), take(key, seen)
    scores = (queries @ keys.mT).to(torch.promote_types(query.dtype, torch.float32)).mul_(scale)
    later = torch.ones(T, T, dtype=torch.bool).triu_(1)
    scores.view(KVH, -1, T, keys.shape[1])[..., -T:].masked_fill_(later, -torch.inf)
    return (queries, keys), scores.softmax(-1)
