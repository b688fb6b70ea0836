"""Draw the next token of each row from its logits, and give its log-probability: temperature only.

    token ~ softmax(logits / T)    logprob = log softmax(logits / T)[token]    T = 0: greedy, logprob at T = 1

The inverse of the cumulative distribution at one uniform number per row: sums of blocks of entries are
accumulated, then the entries of the block in which the number falls. Drawing a number per entry (Gumbel-max)
costs many times the rest, on a CPU and on a GPU.

PyTorch (CPU): the numbers are given. Triton (CUDA): one pass over the logits leaves each block's maximum and
sum, a second kernel draws from these and reads one block again; the number is Philox 4x32-10 of (seed, trace,
position), so a row's token depends on nothing else.

Left out: top-k, top-p (the sampled distribution would not be the trained one), penalties.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the PyTorch version serves
    triton = None

BLOCK, GPU_BLOCK = 256, 4096  # entries per block of the cumulative sum
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
    def sum_kernel(logits_ptr, temperature_ptr, stats_ptr, V, BLOCK: tl.constexpr):
        """One program per row and block: the largest z, and the sum of 2^(z - that); z in powers of 2."""
        row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
        temperature = tl.load(temperature_ptr)
        scale = 1.4426950408889634 / tl.where(temperature == 0.0, 1.0, temperature)
        entry = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + row * V + entry, mask=entry < V, other=-float("inf")).to(tl.float32) * scale
        top = tl.maximum(tl.max(z, 0), -3.0e38)  # finite: -inf less -inf would be NaN
        tl.store(stats_ptr + (row * blocks + block) * 2, top)
        tl.store(stats_ptr + (row * blocks + block) * 2 + 1, tl.sum(tl.exp2(z - top), 0))

    @triton.jit
    def invert(weight, fraction, N: tl.constexpr):
        """Where `fraction` of the sum of weight (N,) falls, and how far into that. Never where weight is 0,
        though sums taken in another order may rise there."""
        at, sums = tl.arange(0, N), tl.cumsum(weight, 0)
        target = tl.minimum(fraction, 1.0 - 1.1920929e-07) * tl.max(sums, 0)
        found = tl.min(tl.where((sums > target) & (weight > 0.0), at, N), 0)
        found = tl.minimum(found, tl.max(tl.where(weight > 0.0, at, 0), 0))
        own = tl.sum(tl.where(at == found, weight, 0.0), 0)
        before = tl.sum(tl.where(at == found, sums, 0.0), 0) - own
        return found, tl.maximum((target - before) / own, 0.0)

    @triton.jit
    def draw_kernel(
        logits_ptr, stats_ptr, seed_ptr, temperature_ptr, trace_ptr, position_ptr, out_ptr, V, row_stride, blocks,
        BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        """One program per row: the block in which the row's number falls, then the entry of that block."""
        row, temperature = tl.program_id(0).to(tl.int64), tl.load(temperature_ptr)
        trace, position = tl.load(trace_ptr + row * row_stride), tl.load(position_ptr + row * row_stride)
        bits, _, _, _ = tl.philox(tl.load(seed_ptr), position, trace, 0, 0)
        greedy = temperature == 0.0
        scale = 1.4426950408889634 / tl.where(greedy, 1.0, temperature)
        index = tl.arange(0, BLOCKS)
        stats_ptr += (row * blocks + index) * 2
        top = tl.load(stats_ptr, mask=index < blocks, other=-3.0e38)
        all_top = tl.max(top, 0)
        weight = tl.load(stats_ptr + 1, mask=index < blocks, other=0.0) * tl.exp2(top - all_top)
        block, fraction = invert(weight, (bits >> 8).to(tl.float32) * 5.9604645e-08, BLOCKS)  # of 24 bits
        if greedy:
            block = tl.min(tl.where(top == all_top, index, BLOCKS), 0)  # of equal ones the first
        at = tl.arange(0, BLOCK)
        entry = block * BLOCK + at
        z = tl.load(logits_ptr + row * V + entry, mask=entry < V, other=-float("inf")).to(tl.float32) * scale
        own_top = tl.maximum(tl.max(z, 0), -3.0e38)
        place, _ = invert(tl.exp2(z - own_top), fraction, BLOCK)
        if greedy:
            place = tl.min(tl.where(z == own_top, at, BLOCK - 1), 0)
        chosen = tl.sum(tl.where(at == place, z, 0.0), 0)
        token = tl.minimum(block * BLOCK + place, V - 1)  # where the logits are NaN it is any
        tl.store(out_ptr + row * 2, token.to(tl.float32))
        tl.store(out_ptr + row * 2 + 1, (chosen - all_top) * 0.6931471805599453 - tl.log(tl.sum(weight, 0)))


def triton_choose(logits, temperature, seed, trace, position):
    """logits (R,V) contiguous; temperature (1,) f32, seed (1,) int64; trace, position (R,) int32, one stride.

    -> (R,2) f32: token and logprob; a float32 holds every id below 2^24. Temperature and seed are tensors, so
    that a CUDA graph can be replayed with others."""
    R, V = logits.shape
    assert logits.is_contiguous() and trace.stride() == position.stride() and V < 2**24
    blocks = triton.cdiv(V, GPU_BLOCK)
    stats = torch.empty(R, blocks, 2, dtype=torch.float32, device=logits.device)
    out = torch.empty(R, 2, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        sum_kernel[(R, blocks)](logits, temperature, stats, V, BLOCK=GPU_BLOCK)
        draw_kernel[(R,)](logits, stats, seed, temperature, trace, position, out, V, trace.stride(0), blocks,
                          BLOCK=GPU_BLOCK, BLOCKS=max(16, triton.next_power_of_2(blocks)), num_warps=8)
    return out
