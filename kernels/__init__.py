"""Operations that deserve a GPU kernel, a file each: formula, PyTorch version, for most a Triton version.

PyTorch serves the CPU and machines without Triton, Triton serves CUDA; packed_attention and reverse_kl are
PyTorch everywhere. token_logprob, token_advantages, paged_attention and prefill_attention, run as programs
(`python kernels/token_logprob.py`), check themselves against float64. Then the first two are timed, the other
two on CUDA only, and so is choose_token.
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
