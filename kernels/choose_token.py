"""Draw the next token of each row from its logits, and give its log-probability: temperature only.

    token ~ softmax(logits / T)    logprob = log softmax(logits / T)[token]    T = 0: greedy, logprob at T = 1

PyTorch (CPU): the inverse of the cumulative distribution at one uniform number per row. Drawing a number per
entry costs more than all of this; sums of blocks of 256 entries are accumulated, then the entries of one.

Triton (CUDA): one pass over the logits. token = argmax p / E, p = exp(logits / T), E exponential noise (the
"exponential race": Gumbel-max with a logarithm less); maximum and sum of exponentials run along for the
log-prob. The noise is Philox 4x32-7 (Salmon et al. 2011: the fewest rounds that pass all of their tests) of
(seed, trace, position, entry): a row's token depends on nothing else. Few rows are split over the vocabulary,
a second kernel takes the best.

Left out: top-k, top-p (the sampled distribution would not be the trained one), penalties.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the PyTorch version serves
    triton = None

BLOCK = 256  # entries per block of the cumulative sum
ROWS = 16  # at a time: memory for many is cleared by the system at every step, which took most of the time


def choose_token(logits, temperature, uniform):
    """logits (R,V), uniform (R,) in [0,1) f32 -> token (R,) int64, logprob (R,) f32 <= 0 (up to rounding).

    An entry of probability 0 is never drawn."""
    if len(logits) > ROWS:
        parts = [choose_token(z, temperature, u) for z, u in zip(logits.split(ROWS), uniform.split(ROWS))]
        return tuple(map(torch.cat, zip(*parts)))
    V = logits.shape[1]
    z = logits.float()
    if temperature not in (0, 1):
        z = z.div_(temperature) if z is not logits else z / temperature
    p = torch.softmax(z, -1)
    if temperature == 0:
        token = logits.argmax(-1)
        return token, p.gather(1, token[:, None])[:, 0].log()
    whole = V // BLOCK * BLOCK
    blocks = torch.cat([p[:, :whole].view(len(p), -1, BLOCK).sum(-1), p[:, whole:].sum(-1, keepdim=True)], 1)
    token, rest = _invert(blocks, uniform)
    entry = token[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, entry.clamp(max=V - 1)).masked_fill_(entry >= V, 0.0)
    token = token * BLOCK + _invert(inside, rest / inside.sum(-1))[0]
    token = token.clamp(max=V - 1)  # it passes V only where the logits are NaN
    return token, p.gather(1, token[:, None])[:, 0].log()


def _invert(weights, uniform):
    """The entry in which uniform * total falls, and how far into it."""
    cumulative = weights.cumsum(-1)
    # at most 1 - 2^-23 keeps the target strictly below the total: an entry of weight 0 is never taken
    target = uniform.clamp(max=1 - 2**-23)[:, None] * cumulative[:, -1:]
    entry = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    before = cumulative.gather(1, entry) - weights.gather(1, entry)
    return entry[:, 0], (target - before)[:, 0].clamp(min=0)


if triton is not None:

    @triton.jit
    def choose_kernel(
        logits_ptr, seed_ptr, temperature_ptr, trace_ptr, position_ptr, entry_ptr, stats_ptr, V, row_stride,
        SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per row and split. Leaves the best entry and (its z with noise, its z, max, sum)."""
        row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        seed, temperature = tl.load(seed_ptr), tl.load(temperature_ptr)
        trace, position = tl.load(trace_ptr + row * row_stride), tl.load(position_ptr + row * row_stride)
        greedy = temperature == 0.0
        scale = 1.0 / tl.where(greedy, 1.0, temperature)
        per_split = tl.cdiv(tl.cdiv(V, 4 * BLOCK), SPLITS) * 4 * BLOCK
        start, end = split * per_split, tl.minimum(V, (split + 1) * per_split)
        # Each lane for itself until the end: a reduction makes the warps wait. The lowest value is finite,
        # since -inf less -inf would be NaN.
        lowest = tl.full([BLOCK], -3.0e38, tl.float32)
        zero = tl.zeros([BLOCK], tl.float32)
        best_z, top, total, best_p, best_e = lowest, lowest, zero, zero, zero + 1.0
        best_entry = start + tl.arange(0, BLOCK) * 0
        for block in range(start, end, 4 * BLOCK):
            quad = block // 4 + tl.arange(0, BLOCK)  # one Philox call serves four entries
            n0, n1, n2, n3 = tl.philox(seed, quad.to(tl.uint32), position.to(tl.uint32) + tl.zeros_like(quad),
                                       trace.to(tl.uint32) + tl.zeros_like(quad), tl.zeros_like(quad),
                                       n_rounds=7)
            at, entry = logits_ptr + row * V + quad * 4, quad * 4
            z0 = tl.load(at, mask=entry < end, other=-float("inf")).to(tl.float32) * scale
            z1 = tl.load(at + 1, mask=entry + 1 < end, other=-float("inf")).to(tl.float32) * scale
            z2 = tl.load(at + 2, mask=entry + 2 < end, other=-float("inf")).to(tl.float32) * scale
            z3 = tl.load(at + 3, mask=entry + 3 < end, other=-float("inf")).to(tl.float32) * scale
            new_top = tl.maximum(tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)), top)
            shrink = tl.exp(top - new_top)
            top, total, best_p = new_top, total * shrink, best_p * shrink
            for i in tl.static_range(4):
                noise = n0 if i == 0 else n1 if i == 1 else n2 if i == 2 else n3
                z = z0 if i == 0 else z1 if i == 1 else z2 if i == 2 else z3
                p = tl.exp(z - top)
                total += p
                # E = -log(1 - u): small E decides, so it is taken from u's full 32 bits, by its series near 0
                u = (noise.to(tl.float32) + 0.5) * 2.3283064365386963e-10
                e = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(tl.maximum(1.0 - u, 1e-30)))
                better = tl.where(greedy, z > best_z, p * best_e > best_p * e)  # of equal ones the first
                best_entry, best_z = tl.where(better, entry + i, best_entry), tl.where(better, z, best_z)
                best_p, best_e = tl.where(better, p, best_p), tl.where(better, e, best_e)
        best = tl.where(greedy, best_z, best_z - tl.log(best_e))
        highest = tl.max(best, 0)
        chosen = tl.min(tl.where(best == highest, best_entry, 2147483647), 0)
        all_top, at = tl.max(top, 0), row * SPLITS + split
        tl.store(entry_ptr + at, chosen)
        tl.store(stats_ptr + at * 4, highest)
        tl.store(stats_ptr + at * 4 + 1, tl.max(tl.where(best_entry == chosen, best_z, -float("inf")), 0))
        tl.store(stats_ptr + at * 4 + 2, all_top)
        tl.store(stats_ptr + at * 4 + 3, tl.sum(total * tl.exp(top - all_top), 0))

    @triton.jit
    def best_kernel(entry_ptr, stats_ptr, out_ptr, SPLITS: tl.constexpr):
        """One program per row: its splits' best, and the log-prob of that."""
        row, split = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
        at = row * SPLITS + split
        best, z, top, total = (tl.load(stats_ptr + at * 4), tl.load(stats_ptr + at * 4 + 1),
                               tl.load(stats_ptr + at * 4 + 2), tl.load(stats_ptr + at * 4 + 3))
        first = tl.min(tl.where(best == tl.max(best, 0), split, SPLITS), 0)
        chosen = split == first
        all_top = tl.max(top, 0)
        lse = all_top + tl.log(tl.sum(total * tl.exp(top - all_top), 0))
        token = tl.sum(tl.where(chosen, tl.load(entry_ptr + at), 0), 0)
        tl.store(out_ptr + row * 2, token.to(tl.float32))
        tl.store(out_ptr + row * 2 + 1, tl.sum(tl.where(chosen, z, 0.0), 0) - lse)


def triton_choose(logits, temperature, seed, trace, position, splits=None):
    """logits (R,V) contiguous; temperature (1,) f32, seed (1,) int64; trace, position (R,) int32, one stride.

    -> (R,2) f32: token and logprob; a float32 holds every id below 2^24. Temperature and seed are tensors, so
    that a CUDA graph can be replayed with others. splits: a power of two."""
    R, V = logits.shape
    assert logits.is_contiguous() and trace.stride() == position.stride() and V < 2**24
    if splits is None:  # some 512 programs, of 4 blocks each at least
        splits = 1
        while splits < 64 and splits * R < 512 and splits * 8 * BLOCK * 4 <= V:
            splits *= 2
    entry = torch.empty(R, splits, dtype=torch.int32, device=logits.device)
    stats = torch.empty(R, splits, 4, dtype=torch.float32, device=logits.device)
    out = torch.empty(R, 2, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        choose_kernel[(R, splits)](logits, seed, temperature, trace, position, entry, stats, V,
                                   trace.stride(0), SPLITS=splits, BLOCK=BLOCK)
        best_kernel[(R,)](entry, stats, out, SPLITS=splits, num_warps=1)
    return out


def benchmark(rows=(1, 16, 64, 256, 1024), V=151936):
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"bfloat16, {V} entries")
    for R in rows:
        logits = torch.randn(R, V, device="cuda", dtype=torch.bfloat16)
        trace = torch.arange(2 * R, device="cuda", dtype=torch.int32).view(R, 2)
        knobs = torch.ones(1, device="cuda"), torch.ones(1, device="cuda", dtype=torch.int64)
        ms = triton.testing.do_bench_cudagraph(lambda: triton_choose(logits, *knobs, *trace.unbind(1)))
        print(f"{R:6} rows {1000 * ms:8.1f} us {2e-9 * R * V / ms:6.2f} TB/s")


if __name__ == "__main__" and torch.cuda.is_available():
    benchmark()
