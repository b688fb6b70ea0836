"""Traces to one sequence without padding, in which a prompt stands once for all of its traces.

    rows (N,T)                          packed (L,)
    P P P a a a a .                     P P P a a a a b b c c c
    P P P b b . . .        pack()       └─────┘└────── traces, each at the positions behind its prompt
    P P P c c c . .     ──────────►     a prompt shared by three

Every layer but attention works token by token, so it sees the L packed tokens instead of N x T: at GSM8K's
lengths, eight traces a problem, less than half. Attention gathers its rows from them, runs causal on them as
they would stand alone, and keeps one result per packed token. Gradients flow back the same ways, so that a
prompt gets the sum over its traces. exprl.py registers `packed_attention` with transformers.

Left out: packed attention without the gathered copies (varlen kernels exist for CUDA only).
"""

import numpy as np
import torch
import torch.nn.functional as F

STRETCH = 1.2  # rows attend together while the longest has at most so many times the tokens of the shortest


def pack(ids: torch.Tensor, mask: torch.Tensor):
    """ids (N,T), padded on the right, and mask, true on the sampled tokens, which end each row.

    Returns the packed ids and positions (L,), the place in them of each row's tokens (N,T), and what
    attention needs: runs of rows, as places (R,W), and the place in their flat results of each packed token
    (L,). A row's last token is left out, since it predicts none."""
    rows, sampled = ids.cpu().numpy(), mask.cpu().numpy()
    starts, ends = sampled.argmax(1), sampled.shape[1] - 1 - sampled[:, ::-1].argmax(1)
    places, tokens, positions, prompts = np.zeros(rows.shape, np.int64), [], [], {}

    def add(row, start, end):
        tokens.extend(rows[row, start:end].tolist())
        positions.extend(range(start, end))
        return len(tokens) - (end - start)

    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
        prompt = rows[row, :start].tobytes()
        if prompt not in prompts:
            prompts[prompt] = add(row, 0, start)
        places[row, :start] = prompts[prompt] + np.arange(start)
        places[row, start:end] = add(row, start, end) + np.arange(end - start)
    order = ends.argsort(kind="stable")
    parts, runs, home, size = [order[:1]], [], np.zeros(len(tokens), np.int64), 0
    for row in order[1:]:
        if ends[row] <= STRETCH * ends[parts[-1][0]]:
            parts[-1] = np.append(parts[-1], row)
        else:
            parts.append(np.array([row]))
    for part in parts:
        run, inside = places[part, :ends[part[-1]]], np.arange(ends[part[-1]]) < ends[part, None]
        runs.append(run)
        home[run[inside]] = size + inside.ravel().nonzero()[0]
        size += run.size
    tokens, positions, places, home, *runs = (
        torch.as_tensor(x, device=ids.device) for x in (tokens, positions, places, home, *runs))
    return tokens, positions, places, (runs, home)


def packed_attention(module, query, key, value, attention_mask, scaling=None, packed=None, **_):
    """What transformers' layers call: query (1,H,L,D), key and value (1,KVH,L,D) -> (1,L,H,D).

    Without `packed` the rows come as they are, (B,H,T,D): causal, and no mask."""
    groups = query.shape[1] // key.shape[1]

    def attend(q, k, v):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2)

    if packed is None:
        return attend(query, key, value), None
    runs, home = packed
    done = [attend(*(x[0][:, run].transpose(0, 1) for x in (query, key, value))) for run in runs]  # (R,W,H,D)
    return torch.cat([rows.flatten(0, 1) for rows in done])[home][None], None
