"""Reverse KL between two language-model heads, over the vocabulary, without the N x V logits.

    KL(p || q) = sum_v p_v (log p_v - log q_v),  p = softmax(hidden @ weight.T / T), q the same of the teacher

Self-distillation's loss in full (ExpRL 2606.17024, its baseline): the one-sample estimate log p_id - log q_id
has the same mean under p and more variance. Rows go in chunks; a chunk's logits are computed again in the
backward pass instead of being kept. Plain PyTorch on every device.
"""

import torch
from torch.utils.checkpoint import checkpoint


def reverse_kl(hidden, weight, teacher_hidden, teacher_weight, temperature, chunk=1024):
    """hidden (N,d), weight (V,d), teacher's (N,e) and (V,e), temperature > 0 -> (N,) float32, in nats, >= 0.

    Differentiable in hidden and weight; the teacher gets no gradient. A few chunk x V numbers at once."""
    assert len(hidden) == len(teacher_hidden) and len(weight) == len(teacher_weight) and temperature > 0
    if not len(hidden):
        return hidden.float().sum(1)  # shape (0,), with a gradient
    rows = [slice(i, i + chunk) for i in range(0, len(hidden), chunk)]
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    return torch.cat([checkpoint(_rows, hidden[r], weight, teacher_hidden[r], teacher_weight, temperature,
                                 use_reentrant=False) for r in rows])


def _rows(hidden, weight, teacher_hidden, teacher_weight, temperature):
    logp = torch.log_softmax((hidden @ weight.T).float() / temperature, -1)
    logq = torch.log_softmax((teacher_hidden @ teacher_weight.T).float() / temperature, -1)
    return (logp.exp() * (logp - logq)).sum(-1)
