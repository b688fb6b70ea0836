"""Log-probability and entropy of tokens under a language-model head, without the N x V logits.

    z = hidden @ weight.T / temperature            (N,V), made and dropped in chunks of rows
    lse = log sum_v exp z_v     p = exp(z - lse)
    logp = z_id - lse           entropy = lse - sum_v p_v z_v
    dz_v = g [v = id] - p_v (g + e (log p_v + entropy))        g = d loss / d logp, e = d loss / d entropy

Per chunk the forward makes one matrix product and reads its result. The backward makes it again, overwrites
it with dz and multiplies twice: dhidden = dz @ weight, dweight = dz.T @ hidden (summed in float32). That is
8NdV operations in a fixed order: the same input gives the same bits.

PyTorch and Triton differ in the two row functions only. On CUDA the logits are rounded to hidden's dtype, as
a model's own lm_head rounds them, and all that follows is float32. On a CPU the products are float32 too:
without bfloat16 instructions a bfloat16 product takes 9 times as long (measured on an EPYC 7003).

Left out: bias, soft-capping, masked tokens (drop those rows before the call), a vocabulary split over
devices, second derivatives.

    python kernels/token_logprob.py        # checks against float64, then times
"""

import importlib.util
import os
import time

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the PyTorch version serves
    triton = None

# Largest chunk of logits. CUDA: 2048 rows of 151,936 in bfloat16; with fewer, weight is read too often.
# CPU: up to 32 MB the C library's allocator keeps freed memory; above, each chunk costs fresh page faults.
CHUNK_BYTES = {"cuda": 640 * 10**6, "cpu": 32 * 10**6}


def token_logprob(hidden, weight, ids, temperature=1.0):
    """log softmax(hidden @ weight.T / temperature) at ids, and the entropy of that softmax, both in nats.

    hidden (N,d) and weight (V,d) are floating point, ids (N,) int64 in [0, V). Returns logp (N,) <= 0 and
    entropy (N,) >= 0 in float32 (float64 for float64 input), both differentiable in hidden and weight. On
    CUDA the products run in hidden's dtype, or autocast's. dweight has weight's dtype: float32 master weights
    get a float32 gradient. An id out of range raises IndexError on a CPU; on CUDA, where a check would wait
    for the device, Triton makes its logp NaN.
    """
    assert hidden.ndim == weight.ndim == 2, (hidden.shape, weight.shape)
    assert hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert ids.shape == hidden.shape[:1] and ids.dtype == torch.int64, (ids.shape, ids.dtype, hidden.shape)
    assert temperature > 0, temperature
    if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < len(weight):
        raise IndexError(f"ids span {ids.min()}..{ids.max()}, the vocabulary has {len(weight)} entries")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return TokenLogprob.apply(hidden, weight, ids, temperature)


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature):
        N, dtype = len(hidden), _product_dtype(hidden)
        row_stats, _ = _row_functions(hidden)
        head, ids = weight.to(dtype), ids.contiguous()
        float_dtype = torch.promote_types(dtype, torch.float32)
        logp, entropy, lse = (torch.empty(N, device=hidden.device, dtype=float_dtype) for _ in range(3))
        for rows, buffer in _chunks(N, head):
            z = buffer.addmm_(hidden[rows].to(dtype), head.T, beta=0, alpha=1 / temperature)
            row_stats(z, ids[rows], logp[rows], entropy[rows], lse[rows])
        ctx.save_for_backward(hidden, weight, ids, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an unused entropy then arrives as None and costs nothing on a CPU
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, ids, lse, entropy = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        N, dtype, scale = len(hidden), _product_dtype(hidden), 1 / ctx.temperature
        _, row_grads_ = _row_functions(hidden)
        head = weight.to(dtype)
        # z = scale * (hidden @ weight.T): the scale of dz is put on the N numbers g and e instead of N x V.
        g = torch.zeros_like(lse) if grad_logp is None else (grad_logp * scale).contiguous()
        e = None if grad_entropy is None else (grad_entropy * scale).contiguous()
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=lse.dtype) if need_weight else None
        for rows, buffer in _chunks(N, head):
            h = hidden[rows].to(dtype)
            z = buffer.addmm_(h, head.T, beta=0, alpha=scale)
            row_grads_(z, ids[rows], lse[rows], entropy[rows], g[rows], None if e is None else e[rows])
            if need_hidden:
                dhidden[rows] = z @ head
            if need_weight and dtype == dweight.dtype:
                dweight.addmm_(z.T, h)
            elif need_weight:  # CUDA: a 16-bit product added to a float32 sum
                torch.addmm(dweight, z.T, h, out_dtype=dweight.dtype, out=dweight)
        return dhidden, dweight.to(weight.dtype) if need_weight else None, None, None


def _product_dtype(hidden):
    return hidden.dtype if hidden.is_cuda else torch.promote_types(hidden.dtype, torch.float32)


def _row_functions(hidden):
    on_triton = triton is not None and hidden.is_cuda and hidden.dtype != torch.float64
    return (triton_row_stats, triton_row_grads_) if on_triton else (torch_row_stats, torch_row_grads_)


def _chunks(N, head):
    """Slices of the N rows, each with its part of one reused buffer (rows,V)."""
    V = len(head)
    size = max(1, CHUNK_BYTES["cuda" if head.is_cuda else "cpu"] // (V * head.element_size()))
    size = min(N, size // 128 * 128 or size)  # whole tiles of the matrix product
    buffer = torch.empty(size, V, device=head.device, dtype=head.dtype)
    for start in range(0, N, size or 1):
        rows = slice(start, min(start + size, N))
        yield rows, buffer[: rows.stop - start]


# ---- the two row functions, plain PyTorch ------------------------------------------------------------------


def torch_row_stats(z, ids, logp, entropy, lse):
    """Fills logp, entropy, lse (R,) from the logits z (R,V), which are overwritten."""
    z = z.to(lse.dtype)
    peak = z.amax(1)
    z.sub_(peak[:, None])  # puts exp(0) = 1 into total: log(total) >= 0, so logp <= 0 <= entropy, unclamped
    target = z.gather(1, ids[:, None])[:, 0]
    p = z.exp()
    total = p.sum(1)
    log_total = total.log()
    torch.sub(target, log_total, out=logp)
    torch.sub(log_total, p.mul_(z).sum(1) / total, out=entropy)
    torch.add(peak, log_total, out=lse)


def torch_row_grads_(z, ids, lse, entropy, g, e):
    """Overwrites the logits z (R,V) by dz. g, e (R,) are the gradients of logp and entropy; e may be None."""
    logp = z.to(lse.dtype).sub_(lse[:, None])  # the same memory as z unless z is 16-bit
    if e is None:
        dz = logp.exp_().mul_(-g[:, None])
    else:
        p = logp.exp()
        dz = logp.add_(entropy[:, None]).mul_(-e[:, None]).sub_(g[:, None]).mul_(p)
    dz.scatter_add_(1, ids[:, None], g[:, None])
    if dz.dtype != z.dtype:
        z.copy_(dz)


# ---- the same in Triton: one program per row, one pass over the row ----------------------------------------

if triton is not None:

    @triton.jit
    def row_stats_kernel(z_ptr, ids_ptr, logp_ptr, entropy_ptr, lse_ptr, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # int64: row * V passes 2^31 at 14,134 rows of 151,936
        z_ptr += row * V
        # Online over blocks, with x = z - peak for the running peak: total = sum exp x, moment = sum x exp x,
        # one sum per lane until the end. Lowest values are finite, since -inf * 0 would be NaN.
        peak = -3.0e38
        total = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            new_peak = tl.maximum(peak, tl.max(z, 0))
            shift = peak - new_peak
            shrink = tl.exp(shift)
            x = tl.where(cols < V, z - new_peak, -3.0e38)
            p = tl.exp(x)
            moment = shrink * (moment + shift * total) + p * x
            total = shrink * total + p
            peak = new_peak
        all_total = tl.sum(total, 0)
        log_total = tl.log(all_total)
        token = tl.load(ids_ptr + row)
        target = tl.load(z_ptr + token, mask=(token >= 0) & (token < V), other=float("nan"))
        tl.store(logp_ptr + row, target.to(tl.float32) - peak - log_total)
        tl.store(entropy_ptr + row, log_total - tl.sum(moment, 0) / all_total)
        tl.store(lse_ptr + row, peak + log_total)

    @triton.jit
    def row_grads_kernel(z_ptr, ids_ptr, lse_ptr, entropy_ptr, g_ptr, e_ptr, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        z_ptr += row * V
        token = tl.load(ids_ptr + row)
        lse = tl.load(lse_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        g = tl.load(g_ptr + row)
        e = tl.load(e_ptr + row)
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
            logp = z - lse
            dz = tl.where(cols == token, g, 0.0) - tl.exp(logp) * (g + e * (logp + entropy))
            tl.store(z_ptr + cols, dz, mask=cols < V)


def triton_row_stats(z, ids, logp, entropy, lse):
    """torch_row_stats by Triton: z (R,V) contiguous, kept; sums in float32."""
    R, V = z.shape
    with torch.cuda.device_of(z):  # Triton launches on the current device, which may be another
        row_stats_kernel[(R,)](z, ids, logp, entropy, lse, V, BLOCK=_block(V), num_warps=8)


def triton_row_grads_(z, ids, lse, entropy, g, e):
    """torch_row_grads_ by Triton: z (R,V) contiguous, overwritten by dz in z's dtype."""
    R, V = z.shape
    e = torch.zeros_like(g) if e is None else e  # the kernel is bound by memory: no variant without e
    with torch.cuda.device_of(z):
        row_grads_kernel[(R,)](z, ids, lse, entropy, g, e, V, BLOCK=_block(V), num_warps=8)


def _block(V):
    return min(4096, triton.next_power_of_2(V))


# ---- check and benchmark -----------------------------------------------------------------------------------


def plain_token_logprob(hidden, weight, ids, temperature=1.0):
    """What token_logprob computes, with all N x V numbers in memory: the reference of tests and benchmark."""
    z = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    logp = z.log_softmax(1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def peak_extra_bytes(run, device):
    """Most bytes that run() holds at once beyond those held before it (as PyTorch's allocators count)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "100")  # else the profiler writes lines of its own to stderr
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def check(device):
    """Values and float32 gradients on ragged shapes, against float64: within 1e-4 of the largest number."""
    for N, d, V, temperature in ((1, 8, 5, 1.0), (300, 48, 1003, 0.7), (70, 64, 20011, 1.3)):
        generator = torch.Generator().manual_seed(N)
        hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((N, d), (V, d)))
        ids = torch.randint(V, (N,), generator=generator)
        g, e = torch.randn(2, N, generator=generator).to(device)
        results = []
        for function, dtype in ((plain_token_logprob, torch.float64), (token_logprob, torch.float32)):
            h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
            logp, entropy = function(h, w, ids.to(device), temperature)
            (logp * g + entropy * e).sum().backward()
            results.append([x.detach().double() for x in (logp, entropy, h.grad, w.grad)])
        for want, got in zip(*results):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()) + 1e-6)


def benchmark(device):
    cuda = device == "cuda"
    N, d, V, dtype = (8192, 1536, 151936, torch.bfloat16) if cuda else (1024, 576, 49152, torch.float32)
    hidden = torch.randn(N, d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, d, device=device, dtype=dtype).mul_(d**-0.5).requires_grad_()
    ids = torch.randint(V, (N,), device=device)

    ways = {"token_logprob": token_logprob, "plain PyTorch": plain_token_logprob}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        keywords = dict(reduction="none", options=torch.nn.LinearCrossEntropyOptions())
        native = torch.nn.functional.linear_cross_entropy
        ways["F.linear_cross_entropy, no entropy"] = lambda h, w, i: (-native(h, w, i, **keywords),)
    if cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger, no entropy, only the sum"] = lambda h, w, i: (-liger(w, h, i),)

    def forward(way):
        with torch.no_grad():
            way(hidden, weight, ids)

    def full(way):
        sum(output.sum() for output in way(hidden, weight, ids)).backward()
        hidden.grad = weight.grad = None

    def seconds(run):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rounds, rows = (10, 2048) if cuda else (3, 128)
    z = torch.empty(rows, V, device=device, dtype=dtype)
    product = lambda: torch.mm(hidden.detach()[:rows], weight.detach().T, out=z)
    floor = min(seconds(product) for _ in range(rounds)) * N / rows
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    if "H200" in name:
        floor = 2 * N * d * V / 790e12  # the card's dense bfloat16 rate; elsewhere the product is measured
    versions = f"torch {torch.__version__}, triton {triton and triton.__version__}"
    print(f"{name}, {versions}, {dtype}, {N=} {d=} {V=}")
    print(f"Floor: {1e3 * floor:.2f} ms for hidden @ weight.T ({2e-12 * N * d * V / floor:.3g} TFLOP/s),")
    print("three times that with gradients. MB: the most held beyond the inputs, gradients included.")
    print(" " * 36 + "".join(f"{label + ' ms':>12}  floor/time     MB" for label in ("forward", "fwd+bwd")))
    lines = {label: f"{label:36}" for label in ways}
    for run, products in ((forward, 1), (full, 3)):
        extra = {label: peak_extra_bytes(lambda: run(way), device) for label, way in ways.items()}  # warms up
        times = [{label: seconds(lambda: run(way)) for label, way in ways.items()} for _ in range(rounds)]
        for label in ways:
            took = min(round_[label] for round_ in times)
            lines[label] += f"{1e3 * took:12.2f}{products * floor / took:12.2f}{extra[label] / 1e6:7.0f}"
    print("\n".join(lines.values()))


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    benchmark(device)
