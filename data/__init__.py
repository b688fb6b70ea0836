"""Problems and answers; light to import (no torch, transformers, pyarrow or sympy before they are needed)."""
from pathlib import Path

from .answers import bootstrap_interval, extract_answer, is_correct, pass_at_k
from .problems import BadRows, Problem, fingerprint, load_problems, split_domain

MINIATURE = Path(__file__).resolve().parent / "miniature"  # the default of all programs

__all__ = ["MINIATURE", "BadRows", "Problem", "bootstrap_interval", "extract_answer", "fingerprint",
           "is_correct", "load_problems", "pass_at_k", "split_domain"]
