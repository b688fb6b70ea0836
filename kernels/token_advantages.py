"""From a judge's grades to one advantage per sampled token.

s_k is the grade of a trace after its step k = 1..S (S = n_steps); the group is the traces of one problem:

    std        A = (s - m) / (std + 1e-6)   GRPO: one grade per trace, the group's mean m and unbiased std
    mean       A = s - m                    Dr. GRPO: the same without the scale
    delta      A_1 = s_1 - s_S, A_k = s_k - s_{k-1}: sums to 0 over a trace's steps; a single step gets 0
    end        A_k = s_k - s_S for k < S, A_S = s_S
    step_mean  A_k = s_k - m, m the mean over the group's traces of the mean over their steps

Example, delta, grades 0.25 0.75 0.50: A = 0.25-0.50, 0.75-0.25, 0.50-0.75 = -0.25, 0.50, -0.25.

A grade of NaN is one that could not be read. Its trace gets 0 everywhere and enters no statistic; so does a
trace without grades (n_steps 0). A group of equal grades gets 0 under std, mean and step_mean; under std so
does one with fewer than 2 traces left.
Sources: DeepSeekMath arXiv 2402.03300 (std), Dr. GRPO 2503.20783 (mean), ExpRL 2606.17024 (the others).

Left out: discounting; statistics over several devices (a problem's traces belong on one).
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton: the PyTorch version serves
    triton = None

NORMS = ("std", "mean", "delta", "end", "step_mean")
# Grades of a group are equal within this. The mean of equal grades is off by a rounding of 6e-8, of which
# (s - m) / (std + 1e-6) makes 0.06, and AdamW, where nothing else moves the weights, an update of full size;
# and a spread below the formula's own 1e-6 carries no judgement.
EQUAL = 1e-6


def token_advantages(grades, n_steps, step_ids, group, norm):
    """One advantage per token: (N,T) float32, 0 where step_ids is -1.

    grades (N,S) float32: what stands beyond a row's n_steps is ignored. n_steps (N,) int64 in [0, S]; at most
    1 under std and mean. step_ids (N,T) int64: the token's step, counted from 0, or -1 where the policy
    sampled nothing. Rows [i * group, (i+1) * group) are the traces of problem i. norm is one of NORMS.
    """
    (N, S), T = grades.shape, step_ids.shape[1]
    assert norm in NORMS, f"norm is {norm!r}, not one of {NORMS}"
    assert group > 0 and N % group == 0, f"{N} traces are not groups of {group}"
    assert n_steps.shape == (N,) and len(step_ids) == N, (grades.shape, n_steps.shape, step_ids.shape)
    most = min(S, 1) if norm in ("std", "mean") else S
    # Worth the one wait for the device: an id off by one would train tokens on another step's grade.
    bad = (n_steps < 0) | (n_steps > most) | ((step_ids >= n_steps[:, None]).any(1) & (n_steps > 0))
    assert not bad.any(), (
        f"rows {bad.nonzero()[:8, 0].tolist()}: n_steps outside 0..{most}, or a step id without a grade")
    if S == 0:
        return torch.zeros(N, T, device=grades.device)
    version = triton_token_advantages if grades.is_cuda and triton is not None else torch_token_advantages
    return version(grades.float().contiguous(), n_steps.contiguous(), step_ids.contiguous(), group, norm)


def torch_token_advantages(grades, n_steps, step_ids, group, norm):
    N, S = grades.shape
    k = torch.arange(S, device=grades.device)
    has_grade = k < n_steps[:, None]  # (N,S)
    valid = (n_steps > 0) & ~(has_grade & grades.isnan()).any(1)  # (N,)
    counts = has_grade & valid[:, None]  # (N,S)
    s = grades.where(counts, 0.0)
    last = s.gather(1, (n_steps - 1).clamp(min=0)[:, None])  # s_S (N,1)
    if norm == "delta":
        advantages = s - torch.cat([last, s[:, :-1]], 1)
    elif norm == "end":
        advantages = s - last.where(k < n_steps[:, None] - 1, 0.0)
    else:
        m, scale = _group_statistics(s.sum(1) / n_steps.clamp(min=1), valid, group)
        off = s - m[:, None]
        advantages = off * scale[:, None] if norm == "std" else off.where(off.abs() > EQUAL, 0.0)
    return advantages.where(counts, 0.0).gather(1, step_ids.clamp(0, S - 1)).where(step_ids >= 0, 0.0)


def _group_statistics(s, valid, group):
    """For each trace (N,), over its group's valid s: the mean, and 1 / (std + 1e-6) or 0 if all are equal."""
    s, valid = s.view(-1, group), valid.view(-1, group)
    count = valid.sum(1)
    m = s.sum(1) / count.clamp(min=1)
    std = ((s - m[:, None]).where(valid, 0.0).square().sum(1) / (count - 1).clamp(min=1)).sqrt()
    spread = s.where(valid, -torch.inf).amax(1) - s.where(valid, torch.inf).amin(1)
    scale = (1 / (std + 1e-6)).where((count > 1) & (spread > EQUAL), 0.0)
    return m.repeat_interleave(group), scale.repeat_interleave(group)


if triton is not None:

    @triton.jit
    def token_advantages_kernel(
        grades_ptr, n_steps_ptr, step_ids_ptr, out_ptr, S, T, equal,
        GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, STEP_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr,
        NORM: tl.constexpr,
    ):  # fmt: skip
        # One program per trace. Each reads its whole group's grades (a few KB, cached): no second launch.
        row = tl.program_id(0).to(tl.int64)  # int64: row * T may pass 2^31
        rows = row // GROUP * GROUP + tl.arange(0, GROUP_BLOCK)
        in_group = tl.arange(0, GROUP_BLOCK) < GROUP
        n = tl.load(n_steps_ptr + rows, mask=in_group, other=0)
        total = tl.zeros([GROUP_BLOCK], tl.float32)
        unread = tl.zeros([GROUP_BLOCK], tl.int32)
        for start in range(0, S, STEP_BLOCK):
            k = start + tl.arange(0, STEP_BLOCK)
            has_grade = k[None, :] < n[:, None]
            s = tl.load(grades_ptr + rows[:, None] * S + k[None, :], mask=has_grade, other=0.0)
            total += tl.sum(s, 1)
            unread += tl.sum((s != s).to(tl.int32), 1)
        valid = (n > 0) & (unread == 0)
        valid_here = tl.sum((valid & (rows == row)).to(tl.int32), 0) > 0
        n_here = tl.load(n_steps_ptr + row)

        trace_mean = tl.where(valid, total / tl.maximum(n, 1), 0.0)
        count = tl.sum(valid.to(tl.int32), 0)
        m = tl.sum(trace_mean, 0) / tl.maximum(count, 1)
        if NORM == "std":
            off = tl.where(valid, trace_mean - m, 0.0)
            std = tl.sqrt(tl.sum(off * off, 0) / tl.maximum(count - 1, 1))
            highest = tl.max(tl.where(valid, trace_mean, -float("inf")), 0)
            spread = highest - tl.min(tl.where(valid, trace_mean, float("inf")), 0)
            scale = tl.where((count > 1) & (spread > equal), 1 / (std + 1e-6), 0.0)

        grades_ptr += row * S
        last = tl.load(grades_ptr + tl.maximum(n_here - 1, 0))
        for start in range(0, T, TOKEN_BLOCK):
            t = start + tl.arange(0, TOKEN_BLOCK)
            k = tl.load(step_ids_ptr + row * T + t, mask=t < T, other=-1)
            sampled = (k >= 0) & (k < n_here)
            s = tl.load(grades_ptr + k, mask=sampled, other=0.0)
            if NORM == "delta":
                before = tl.where(k == 0, n_here - 1, k - 1)
                advantage = s - tl.load(grades_ptr + before, mask=sampled, other=0.0)
            elif NORM == "end":
                advantage = tl.where(k == n_here - 1, s, s - last)
            elif NORM == "std":
                advantage = (s - m) * scale
            else:
                advantage = tl.where(tl.abs(s - m) > equal, s - m, 0.0)
            tl.store(out_ptr + row * T + t, tl.where(sampled & valid_here, advantage, 0.0), mask=t < T)


def triton_token_advantages(grades, n_steps, step_ids, group, norm):
    (N, S), T = grades.shape, step_ids.shape[1]
    out = torch.empty(N, T, device=grades.device)
    if out.numel():
        blocks = dict(GROUP_BLOCK=triton.next_power_of_2(group), STEP_BLOCK=16, TOKEN_BLOCK=1024)
        with torch.cuda.device_of(grades):  # Triton launches on the current device, which may be another
            token_advantages_kernel[(N,)](
                grades, n_steps, step_ids, out, S, T, EQUAL, GROUP=group, NORM=norm, **blocks)
    return out
