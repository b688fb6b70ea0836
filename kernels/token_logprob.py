"""Log-probability and entropy of tokens under a language-model head, without the N x V logits.

    z = hidden @ weight.T / temperature            (N,V), made and dropped in chunks of rows
    lse = log sum_v exp z_v     p = exp(z - lse)
    logp = z_id - lse           entropy = lse - sum_v p_v z_v
    dz_v = g [v = id] - p_v (g + e (log p_v + entropy))        g = d loss / d logp, e = d loss / d entropy

Per chunk the forward makes one matrix product and reads its result. The backward makes it again, overwrites
it with dz and multiplies twice: dhidden = dz @ weight, dweight = dz.T @ hidden. That is 8NdV operations for
any loss; policy_head.py needs 6NdV, since it knows its loss. All in a fixed order: the same input gives the
same bits.

PyTorch and Triton differ in the two row functions only. The logits are rounded to the products' dtype, as a
model's own lm_head rounds them; all that follows is float32. The products are hidden's dtype where the
hardware has instructions for it, which is CUDA and a CPU with AVX512-BF16 (3 times as fast there as float32,
measured on an EPYC 9004), else float32 (bfloat16 took 9 times as long on an EPYC 7003).

Left out: bias, soft-capping, masked tokens (drop those rows before the call), a vocabulary split over
devices, second derivatives.

    python kernels/token_logprob.py        # checks against float64, then times this and policy_head.py
"""

import math
import runpy
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the PyTorch version serves
    triton = None

# Largest chunk of logits, nearly all the memory taken beyond inputs and outputs. CUDA: 2048 rows of 151,936
# in bfloat16; with fewer, weight is read too often. CPU: see chunk_rows.
CHUNK_BYTES = {"cuda": 640 * 10**6, "cpu": 32 * 10**6}
# The PyTorch row functions pass over a few rows at a time. On a CPU these stay in the cache meanwhile.
SLAB_BYTES = {"cuda": 64 * 10**6, "cpu": 2 * 10**6}


def token_logprob(hidden, weight, ids, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at ids, and the entropy of that softmax, both in nats.

    hidden (N,d) and weight (V,d) are floating point, ids (N,) int64 in [0, V). Returns logp (N,) <= 0 and
    entropy (N,) >= 0 in float32 (float64 for float64 input), both differentiable in hidden and weight. Under
    autocast hidden takes its dtype. dweight has weight's dtype: float32 masters get a float32 gradient.
    An id out of range raises IndexError on a CPU; on CUDA, where a check would wait for the device, Triton
    makes its logp NaN.
    """
    return TokenLogprob.apply(*checked(hidden, weight, ids, temperature), ids.contiguous(), temperature)


def checked(hidden, weight, ids, temperature):
    """hidden, in autocast's dtype, and weight; raises on shapes and ids that do not fit."""
    assert hidden.ndim == weight.ndim == 2, (hidden.shape, weight.shape)
    assert hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert ids.shape == hidden.shape[:1] and ids.dtype == torch.int64, (ids.shape, ids.dtype, hidden.shape)
    assert temperature > 0, temperature
    if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < len(weight):
        raise IndexError(f"ids span {ids.min()}..{ids.max()}, the vocabulary has {len(weight)} entries")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden, weight


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature):
        row_stats, _ = row_functions(hidden)
        logp, entropy, lse = (new_vector(hidden) for _ in range(3))
        each_chunk(hidden, weight, temperature, (False, False),
                   lambda z, rows: row_stats(z, ids[rows], logp[rows], entropy[rows], lse[rows]))
        ctx.save_for_backward(hidden, weight, ids, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an unused entropy then arrives as None and costs nothing on a CPU
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, ids, lse, entropy = ctx.saved_tensors
        _, row_grads_ = row_functions(hidden)
        # z = scale * (hidden @ weight.T): the scale of dz is put on the N numbers g and e instead of N x V.
        scale = 1 / ctx.temperature
        g = torch.zeros_like(lse) if grad_logp is None else (grad_logp * scale).contiguous()
        e = None if grad_entropy is None else (grad_entropy * scale).contiguous()

        def overwrite(z, rows):
            row_grads_(z, ids[rows], lse[rows], entropy[rows], g[rows], None if e is None else e[rows])

        return *each_chunk(hidden, weight, ctx.temperature, ctx.needs_input_grad[:2], overwrite), None, None


def each_chunk(hidden, weight, temperature, needed, visit):
    """visit(z, rows) for the logits z (rows,V) of one slice of the N rows after the other.

    Returns dhidden and dweight, or None where needed (two bools) says so. For them visit overwrites z by the
    gradient of hidden @ weight.T."""
    dtype = product_dtype(hidden)
    head = weight.to(dtype)
    dhidden = torch.empty_like(hidden) if needed[0] else None
    dweight = new_dweight(weight, hidden) if needed[1] else None
    size = chunk_rows(len(hidden), len(head), head.element_size(), head.device.type)
    buffer = torch.empty(size, len(head), device=head.device, dtype=dtype)  # for one chunk after the other
    for start in range(0, len(hidden), size or 1):
        rows = slice(start, start + size)
        h = hidden[rows].to(dtype)
        z = buffer[: len(h)].addmm_(h, head.T, beta=0, alpha=1 / temperature)
        visit(z, rows)
        if needed[0]:
            dhidden[rows] = z @ head
        if needed[1]:
            add_product_(dweight, z, h, first=start == 0)
    return dhidden, dweight.to(weight.dtype) if needed[1] else None


def product_dtype(hidden):
    """The dtype of the logits and of the three products."""
    return fast_dtype(hidden.dtype, hidden.device.type)


def fast_dtype(dtype, device):
    """In which dtype "cuda" or "cpu" multiplies numbers of `dtype`: float32 where it has no instructions."""
    fast = device == "cuda" or dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return dtype if fast else torch.promote_types(dtype, torch.float32)


def on_triton(hidden):
    return triton is not None and hidden.is_cuda and hidden.dtype != torch.float64


def row_functions(hidden):
    return (triton_row_stats, triton_row_grads_) if on_triton(hidden) else (torch_row_stats, torch_row_grads_)


def new_vector(hidden, dtype=None):
    dtype = dtype or torch.promote_types(hidden.dtype, torch.float32)
    return torch.empty(len(hidden), device=hidden.device, dtype=dtype)


def chunk_rows(N, V, bytes_each, device):
    """Rows of a chunk of N x V logits.

    A CPU packs the weights anew for each chunk, and reads and writes their gradient. An eighth of many logits
    at a time, up to 128 MB, took 0.84 (2,048 rows, d=896, V=151,936, bfloat16) and 0.93 (8,192 rows, d=576,
    V=49,152) of the time: EPYC 9004, 2026-11-30."""
    budget, row = CHUNK_BYTES[device], V * bytes_each
    if device == "cpu":
        budget = max(budget, min(4 * budget, N * row // 8))
    most = max(1, budget // row)
    tile = 128 if most >= 128 else 1  # whole tiles of the matrix product
    count = math.ceil(N / (most // tile * tile))
    return min(N, math.ceil(N / max(count, 1) / tile) * tile)


def new_dweight(weight, hidden):
    """Where dweight is summed over the chunks: in float32 for float32 weights, and on a CPU.

    On CUDA a 16-bit weight's gradient is summed in 16 bits, with a rounding per chunk: a float32 sum would
    take twice its size, more than all else here. Relative error of a bfloat16 dweight (1024 rows, d=64,
    V=1000): plain PyTorch 0.54%, 4 chunks 0.58%, 8 chunks 0.61%, 32 chunks 0.73%."""
    dtype = weight.dtype if weight.is_cuda else torch.promote_types(weight.dtype, torch.float32)
    new = torch.empty if len(hidden) else torch.zeros
    return new(weight.shape, device=weight.device, dtype=dtype)


def add_product_(total, a, b, first):
    """total (V,d) += a.T @ b; the first product overwrites what total held."""
    if total.dtype == a.dtype:
        total.addmm_(a.T, b, beta=0 if first else 1)
    elif a.is_cuda:  # a 16-bit product, summed in float32 inside, added to a float32 total
        torch.addmm(total, a.T, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:  # the CPU has no such product: a rounded one, made in parts that stay in the cache
        for part in (slice(start, start + 4096) for start in range(0, len(total), 4096)):
            product = a[:, part].T @ b
            total[part].copy_(product) if first else total[part].add_(product)


# ---- the two row functions, plain PyTorch ------------------------------------------------------------------


def slabs(z):
    """Slices of z's rows, small enough that several passes over one stay in a CPU's cache."""
    size = max(1, SLAB_BYTES[z.device.type] // (4 * z.shape[1]))
    return (slice(start, start + size) for start in range(0, len(z), size))


def torch_row_stats(z, ids, logp, entropy, lse):
    """Fills logp, entropy, lse (R,) from the logits z (R,V), which are kept."""
    for rows in slabs(z):
        peak = z[rows].amax(1).to(lse.dtype)
        # puts exp(0) = 1 into total: log(total) >= 0, so logp <= 0 <= entropy, unclamped
        x = z[rows].to(lse.dtype, copy=True).sub_(peak[:, None])
        p = x.exp()
        total = p.sum(1)
        log_total = total.log()
        logp[rows] = x.gather(1, ids[rows, None])[:, 0] - log_total
        entropy[rows] = log_total - p.mul_(x).sum(1) / total
        lse[rows] = peak + log_total


def torch_row_grads_(z, ids, lse, entropy, g, e):
    """Overwrites the logits z (R,V) by dz. g, e (R,) are the gradients of logp and entropy; e may be None."""
    for rows in slabs(z):
        logp = z[rows].to(lse.dtype).sub_(lse[rows, None])  # z's own memory unless z is 16-bit
        if e is None:
            dz = logp.exp_().mul_(-g[rows, None])
        else:
            p = logp.exp()
            dz = logp.add_(entropy[rows, None]).mul_(-e[rows, None]).sub_(g[rows, None]).mul_(p)
        dz.scatter_add_(1, ids[rows, None], g[rows, None])
        if dz.dtype != z.dtype:
            z[rows] = dz


# ---- the same in Triton: one program per row, one pass over the row ----------------------------------------

if triton is not None:

    @triton.jit
    def read_row(z_ptr, V, BLOCK: tl.constexpr):
        """One pass over a row of logits: peak = max z, log sum exp (z - peak), entropy of its softmax."""
        # Online over blocks, with x = z - peak for the running peak: total = sum exp x, moment = sum x exp x,
        # one sum per lane until the end. Lowest values are finite, since -inf * 0 would be NaN.
        peak = -3.0e38
        total = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=3):  # loads run two blocks ahead
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            new_peak = tl.maximum(peak, tl.max(z, 0))
            if new_peak > peak:  # seldom after the first blocks
                shift = peak - new_peak
                moment = tl.exp(shift) * (moment + shift * total)
                total = tl.exp(shift) * total
                peak = new_peak
            x = tl.where(cols < V, z - peak, -3.0e38)
            p = tl.exp(x)
            total += p
            moment += p * x
        all_total = tl.sum(total, 0)
        log_total = tl.log(all_total)
        return peak, log_total, log_total - tl.sum(moment, 0) / all_total

    @triton.jit
    def write_row_grads(z_ptr, token, lse, entropy, g, e, V, BLOCK: tl.constexpr):
        base = g + e * entropy
        for back in tl.range(0, V, BLOCK, num_stages=3):  # from the end, which a cache may still hold
            cols = (tl.cdiv(V, BLOCK) - 1) * BLOCK - back + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            logp = z - lse
            dz = tl.where(cols == token, g, 0.0) - tl.exp(logp) * (base + e * logp)
            tl.store(z_ptr + cols, dz, mask=cols < V)

    @triton.jit
    def row_stats_kernel(z_ptr, ids_ptr, logp_ptr, entropy_ptr, lse_ptr, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # int64: row * V passes 2^31 at 14,134 rows of 151,936
        z_ptr += row * V
        token = tl.load(ids_ptr + row)
        target = tl.load(z_ptr + token, mask=(token >= 0) & (token < V), other=float("nan")).to(tl.float32)
        peak, log_total, entropy = read_row(z_ptr, V, BLOCK)
        tl.store(logp_ptr + row, target - peak - log_total)
        tl.store(entropy_ptr + row, entropy)
        tl.store(lse_ptr + row, peak + log_total)

    @triton.jit
    def row_grads_kernel(z_ptr, ids_ptr, lse_ptr, entropy_ptr, g_ptr, e_ptr, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        token, lse, entropy = tl.load(ids_ptr + row), tl.load(lse_ptr + row), tl.load(entropy_ptr + row)
        g, e = tl.load(g_ptr + row), tl.load(e_ptr + row)
        write_row_grads(z_ptr + row * V, token, lse, entropy, g, e, V, BLOCK)


def triton_row_stats(z, ids, logp, entropy, lse):
    """torch_row_stats by Triton: z (R,V) contiguous, kept; sums in float32."""
    R, V = z.shape
    with torch.cuda.device_of(z):  # Triton launches on the current device, which may be another
        row_stats_kernel[(R,)](z, ids, logp, entropy, lse, V, BLOCK=block(V), num_warps=8)


def triton_row_grads_(z, ids, lse, entropy, g, e):
    """torch_row_grads_ by Triton: z (R,V) contiguous, overwritten by dz in z's dtype."""
    R, V = z.shape
    e = torch.zeros_like(g) if e is None else e  # the kernel is bound by memory: no variant without e
    with torch.cuda.device_of(z):
        row_grads_kernel[(R,)](z, ids, lse, entropy, g, e, V, BLOCK=block(V), num_warps=8)


def block(V):
    return min(4096, triton.next_power_of_2(V))


# ---- for tests and experiments/bench_head.py, which checks and times this ----------------------------------


def plain_token_logprob(hidden, weight, ids, temperature=1.0):
    """What token_logprob computes, with all N x V numbers in memory: the reference of tests and benchmark."""
    z = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    logp = z.log_softmax(1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1)


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "bench_head.py"), run_name="__main__")
