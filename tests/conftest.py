"""Without a CUDA device Triton runs in its interpreter. Set here, since triton reads it when imported."""

import os

import torch
from hypothesis import HealthCheck, settings

# The same examples each time, for as long as they take: a busy machine must not change a verdict.
settings.register_profile("steady", deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
