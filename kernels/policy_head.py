"""Hidden states to the policy-gradient loss and its gradients: three matrix products, never N x V numbers.

    z = hidden @ weight.T / temperature        logp, entropy of each token: see token_logprob.py
    r = exp(logp - old_logp)                   d = ref_logp - logp
    loss_i = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))     clip-higher PPO,
             for A < 0 at most -dual_clip A                         dual clip (arXiv 1912.09729)
             + kl (exp(d) - d - 1)                                  k3 (http://joschu.net/blog/kl-approx.html)
             - entropy_weight entropy
    loss = sum_i loss_i / denominator

The loss sees a row of logits through two numbers, logp and entropy. Its derivatives by them are known as soon
as the row's log-sum-exp is, and then the row is still at hand: it is overwritten by its gradient dz at once.
So each chunk of rows is multiplied three times (z, dz @ weight, dz.T @ hidden), all of it in the forward;
the backward only scales. That is 6NdV operations; autograd over token_logprob needs 8NdV.

In Triton one kernel does all between the products: one pass over a row of logits for log-sum-exp and entropy,
the formulas above, and a second pass backwards that overwrites the row, in part out of the cache. In PyTorch
the derivatives come from autograd through `token_loss`, on one number per row: to try another loss, change
that function, and on CUDA its twin in row_loss_kernel (or have torch_row_loss_ called there too).

Left out: what token_logprob.py leaves out; a second backward through the same loss.
"""

import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .token_logprob import block, checked, each_chunk, new_vector, on_triton, plain_token_logprob
from .token_logprob import torch_row_grads_, torch_row_stats, triton


class HeadLoss(NamedTuple):
    """What policy_head returns. Only loss carries a gradient; the rest are metrics of the N tokens."""

    loss: torch.Tensor  # () float32
    logp: torch.Tensor  # (N,) float32, nats
    entropy: torch.Tensor  # (N,) float32, nats
    kl: torch.Tensor  # (N,) float32, the k3 estimate; 0 without ref_logp
    clipped: torch.Tensor  # (N,) bool: the ratio is beyond a clip bound and the token has no gradient from it


def policy_head(hidden, weight, ids, advantages, old_logp=None, ref_logp=None, *, temperature=1.0,
                denominator=1, clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl=0.0, entropy_weight=0.0):
    """The loss above of N tokens -> HeadLoss; its loss is differentiable in hidden and weight, once.

    hidden (N,d), weight (V,d) and ids (N,) int64 as for token_logprob; advantages, old_logp, ref_logp (N,).
    Without old_logp the tokens are on-policy: the ratio is 1, its gradient that of REINFORCE. denominator (a
    number) divides the loss: outside it would cost a pass over dweight and, in 16 bits, a rounding. A frozen
    input saves its product, no_grad saves two. An id out of range raises or gives NaN as in token_logprob.
    """
    assert kl == 0 or ref_logp is not None, f"kl={kl} needs ref_logp"
    hidden, weight = checked(hidden, weight, ids, temperature)
    if not torch.is_grad_enabled():  # PolicyHead.forward could not see it
        hidden, weight = hidden.detach(), weight.detach()
    vectors = [None if x is None else _row_vector(x, hidden) for x in (advantages, old_logp, ref_logp)]
    terms = (clip_low, clip_high, dual_clip, kl, entropy_weight)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes of the products are chosen here
        return HeadLoss(*PolicyHead.apply(hidden, weight, ids.contiguous(), *vectors, temperature,
                                          denominator, terms))


def _row_vector(x, hidden):
    assert x.shape == hidden.shape[:1], (x.shape, hidden.shape)
    return x.detach().to(torch.promote_types(hidden.dtype, torch.float32)).contiguous()


def token_loss(logp, entropy, advantages, old_logp=None, ref_logp=None, clip_low=0.2, clip_high=0.28,
               dual_clip=3.0, kl=0.0, entropy_weight=0.0):
    """The formula for each token (N,) -> loss, k3, clipped. Gradients flow into logp and entropy."""
    ratio = (logp - (logp.detach() if old_logp is None else old_logp)).clamp(-20, 20).exp()
    plain = -advantages * ratio
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    bound = torch.where(advantages < 0, -dual_clip * advantages, math.inf)
    clipped, loss = (loss > plain) | (loss > bound), torch.minimum(loss, bound)
    k3 = torch.zeros_like(loss)
    if ref_logp is not None:
        d = (ref_logp - logp).clamp(-20, 20)
        k3 = (d.exp() - d - 1).clamp(max=10)  # one odd token must not decide the update
        loss = loss + kl * k3
    if entropy_weight:
        loss = loss - entropy_weight * entropy
    return loss, k3, clipped


class PolicyHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, advantages, old_logp, ref_logp, temperature, denominator, terms):
        row_loss_ = triton_row_loss_ if on_triton(hidden) else torch_row_loss_
        # z = hidden @ weight.T / temperature: dz / temperature is written, so that neither product scales
        scale = 1 / (temperature * denominator)
        loss, logp, entropy, k3 = outputs = [new_vector(hidden) for _ in range(4)]
        clipped = new_vector(hidden, torch.bool)

        def overwrite(z, rows):
            given = [None if x is None else x[rows] for x in (ids, advantages, old_logp, ref_logp)]
            row_loss_(z, *given, *(x[rows] for x in (*outputs, clipped)), scale, terms)

        ctx.grads = each_chunk(hidden, weight, temperature, ctx.needs_input_grad[:2], overwrite)
        ctx.mark_non_differentiable(logp, entropy, k3, clipped)
        return loss.sum() / denominator, logp, entropy, k3, clipped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("policy_head keeps its gradients for one backward; call it again for another")
        # Given away, not kept: weight.grad can then take this very memory. So they may be scaled in place.
        grads, ctx.grads = ctx.grads, None
        if grad_loss.is_cuda or grad_loss != 1:  # looking at its value would make a CUDA device wait
            grads = [grad if grad is None else grad.mul_(grad_loss) for grad in grads]
        return *grads, *[None] * 7


# ---- all that lies between the products, plain PyTorch -----------------------------------------------------


def torch_row_loss_(z, ids, advantages, old_logp, ref_logp, loss, logp, entropy, k3, clipped, scale, terms):
    """Fills loss, logp, entropy, k3, clipped (R,) and overwrites the logits z (R,V) by scale * dloss/dz."""
    lse = torch.empty_like(logp)
    torch_row_stats(z, ids, logp, entropy, lse)
    with torch.enable_grad():
        inputs = [x.detach().clone().requires_grad_() for x in (logp, entropy)]
        outputs = token_loss(*inputs, advantages, old_logp, ref_logp, *terms)
        g, e = torch.autograd.grad(outputs[0].sum(), inputs, allow_unused=True)
    for buffer, x in zip((loss, k3, clipped), outputs):
        buffer.copy_(x.detach())
    torch_row_grads_(z, ids, lse, entropy, g * scale, None if e is None else e * scale)


# ---- the same in Triton: one program per row, one kernel ---------------------------------------------------

if triton is not None:
    import triton.language as tl

    from .token_logprob import read_row, write_row_grads

    @triton.jit
    def clamp(x, low, high):
        """As torch.clamp: a NaN stays one."""
        return tl.where(x < low, low, tl.where(x > high, high, x))

    @triton.jit
    def row_loss_kernel(z_ptr, ids_ptr, advantages_ptr, old_ptr, ref_ptr, loss_ptr, logp_ptr, entropy_ptr,
                        k3_ptr, clipped_ptr, V, scale, clip_low, clip_high, dual_clip, kl, entropy_weight,
                        BLOCK: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z_ptr += row * V
        token = tl.load(ids_ptr + row)
        # Read before read_row, whose reductions make all warps wait: none overwrites it too early.
        target = tl.load(z_ptr + token, mask=(token >= 0) & (token < V), other=float("nan")).to(tl.float32)
        peak, log_total, entropy = read_row(z_ptr, V, BLOCK)
        logp = target - peak - log_total

        # token_loss, and its derivative g by logp. A NaN passes all comparisons by and arrives in loss and g.
        advantage = tl.load(advantages_ptr + row)
        log_ratio = logp - logp  # 0, or NaN
        if old_ptr is not None:
            log_ratio = logp - tl.load(old_ptr + row)
        ratio = tl.exp(clamp(log_ratio, -20.0, 20.0))
        loss = -advantage * ratio
        g = tl.where(tl.abs(log_ratio) > 20.0, 0.0, loss)
        bounded = -advantage * clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
        clipped = bounded > loss
        loss = tl.where(clipped, bounded, loss)
        dual = (advantage < 0) & (loss > -dual_clip * advantage)
        loss = tl.where(dual, -dual_clip * advantage, loss)
        clipped = clipped | dual
        g = tl.where(clipped, 0.0, g)
        k3 = 0.0
        if ref_ptr is not None:
            d = clamp(tl.load(ref_ptr + row) - logp, -20.0, 20.0)
            k3 = tl.exp(d) - d - 1.0
            g += tl.where(k3 > 10.0, 0.0, kl * (1.0 - tl.exp(d)))
            k3 = tl.where(k3 > 10.0, 10.0, k3)
            loss += kl * k3
        loss -= entropy_weight * entropy

        tl.store(loss_ptr + row, loss)
        tl.store(logp_ptr + row, logp)
        tl.store(entropy_ptr + row, entropy)
        tl.store(k3_ptr + row, k3)
        tl.store(clipped_ptr + row, clipped)
        write_row_grads(z_ptr, token, peak + log_total, entropy, g * scale, -entropy_weight * scale, V, BLOCK)


def triton_row_loss_(z, ids, advantages, old_logp, ref_logp, loss, logp, entropy, k3, clipped, scale, terms):
    """torch_row_loss_ by Triton: z (R,V) contiguous, dz in z's dtype, all else float32."""
    R, V = z.shape
    with torch.cuda.device_of(z):
        row_loss_kernel[(R,)](z, ids, advantages, old_logp, ref_logp, loss, logp, entropy, k3, clipped, V,
                              float(scale), *map(float, terms), BLOCK=block(V), num_warps=8)  # fmt: skip


# ---- for tests and experiments/bench_head.py, which checks and times this ----------------------------------


def plain_policy_head(hidden, weight, ids, advantages, old_logp=None, ref_logp=None, *, temperature=1.0,
                      denominator=1, **terms):
    """What policy_head computes, with all N x V numbers in memory: the reference of tests and benchmark."""
    logp, entropy = plain_token_logprob(hidden, weight, ids, temperature)
    if not terms.get("entropy_weight"):
        entropy = entropy.detach()
    loss, k3, clipped = token_loss(logp, entropy, advantages, old_logp, ref_logp, **terms)
    return HeadLoss(loss.sum() / denominator, logp.detach(), entropy.detach(), k3.detach(), clipped)


def random_case(N, d, V, seed=0, dtype=torch.float32):
    """hidden, weight, ids, advantages, old_logp, ref_logp: ratios within and beyond each bound, tokens beyond
    k3's. None lies on a bound, where the loss has no derivative."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, d), (V, d)))
    ids = torch.randint(V, (N,), generator=generator)
    logp, _ = plain_token_logprob(hidden.double(), weight.double(), ids)
    pick = lambda *values: torch.tensor(values)[torch.randint(len(values), (N,), generator=generator)]
    advantages, ratio = pick(-2.0, -0.5, 0.0, 1.0, 1.5), pick(0.3, 0.9, 1.0, 1.2, 2.0, 5.0)
    old_logp = (logp - ratio.log()).float()
    return hidden, weight, ids, advantages, old_logp, (logp + pick(-1.5, -0.2, 0.0, 0.7, 4.0)).float()
