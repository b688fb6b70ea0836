"""Problems and answers; light to import (no torch, transformers, pyarrow or sympy before they are needed)."""
from .answers import bootstrap_interval, extract_answer, is_correct, pass_at_k
from .problems import BadRows, Problem, load_problems

__all__ = ["BadRows", "Problem", "bootstrap_interval", "extract_answer", "is_correct", "load_problems",
           "pass_at_k"]
