"""Operations that deserve a GPU kernel, a file each: formula, PyTorch version, for most a Triton version.

PyTorch serves the CPU and machines without Triton, Triton serves CUDA; packed_attention and reverse_kl are
PyTorch everywhere. `python kernels/token_logprob.py` checks and times the head, `python
experiments/bench_kernels.py` times others on a GPU; the tests hold all of them against float64.
"""

from .choose_token import choose_token
from .layer_ops import rotate_, swiglu
from .packed_attention import pack, packed_attention
from .paged_attention import paged_attention, plan_pages
from .policy_head import policy_head
from .prefill_attention import plan_prefill, prefill_attention, upload
from .reverse_kl import reverse_kl
from .token_advantages import token_advantages
from .token_logprob import token_logprob

__all__ = [
    "choose_token", "pack", "packed_attention", "paged_attention", "plan_pages", "plan_prefill",
    "policy_head", "prefill_attention", "reverse_kl", "rotate_", "swiglu", "token_advantages",
    "token_logprob", "upload",
]
