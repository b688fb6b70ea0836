"""Without a CUDA device Triton runs in its interpreter. Set here, since triton reads it when imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
