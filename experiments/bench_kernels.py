"""The kernels by themselves on a GPU, at Qwen2.5-1.5B's shape. The head's have bench_head.py.

    python experiments/bench_kernels.py [NAME ...]     # default: all below

Whether they are right the tests see, on a GPU too: pytest tests/test_kernels.py tests/test_p*_attention.py
"""

import importlib
import sys
from pathlib import Path

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
advantages, choose, paged, prefill = (importlib.import_module(f"kernels.{name}") for name in (
    "token_advantages", "choose_token", "paged_attention", "prefill_attention"))


def token_advantages(N=1024, S=32, T=4096, group=16):
    """Both versions. GB/s: step ids read and advantages written, 12 bytes a token."""
    for norm in advantages.NORMS:
        steps = 1 if norm in ("std", "mean") else S
        grades = torch.rand(N, steps, device="cuda")
        n_steps = torch.randint(1, steps + 1, (N,), device="cuda")
        step_ids = torch.arange(T, device="cuda") * n_steps[:, None] // T
        for version in (advantages.torch_token_advantages, advantages.triton_token_advantages):
            ms = do_bench(lambda: version(grades, n_steps, step_ids, group, norm))
            print(f"{version.__name__:24} {norm:10} {1000 * ms:8.1f} us {12e-6 * N * T / ms:8.1f} GB/s")


def paged_attention(rows=(1, 16, 64, 256, 1024), context=1024, H=12, KVH=2, D=128, P=32):
    """TB/s of keys and values read. With 5 stages loads are under way while a block is computed (see
    block_shape in prefill_attention.py), but fewer programs fit."""
    print(f"{context} tokens a row, {H} heads on {KVH} of {D}")
    M = context // P
    for R in rows:
        query = torch.randn(R, H, D, device="cuda", dtype=torch.bfloat16)
        keys, values = torch.randn(2, max(R * M, 2**12), KVH, P, D, device="cuda", dtype=torch.bfloat16)
        table = torch.randperm(len(keys), device="cuda")[: R * M].view(R, M).int()
        lengths = torch.full((R,), context, device="cuda", dtype=torch.int32)
        usual = paged.split_count(R * KVH, M, torch.cuda.get_device_properties(0).multi_processor_count)
        for splits, stages in ((s, n) for s in sorted({usual, max(1, usual // 2)}) for n in (3, 5)):
            ms = do_bench_cudagraph(lambda: paged.triton_paged_attention(
                query, keys, values, table, lengths, D**-0.5, splits, stages))
            speed = 4e-9 * R * context * KVH * D / ms
            print(f"{R:6} rows, {splits} splits, {stages} stages {1000 * ms:8.1f} us {speed:6.2f} TB/s"
                  + "  (as in use)" * (splits == usual and stages == 3))


def prefill_attention(H=12, KVH=2, D=128, P=32):
    """8,192 tokens: microseconds a layer, and TFLOP/s."""
    stems = [(2048, range(1024 + 16 * i, 1040 + 16 * i), 16) for i in range(64)]
    for label, pieces in (("28 prompts of 292 tokens", [[(0, range(292), 292)]] * 28),
                          ("4 runs of 2,048 behind 2,048", [[(2048, range(2048), 2048)]] * 4),
                          ("4 runs of 1,024 with 64 stems of 16", [[(1024, range(1024), 1024), *stems]] * 4)):
        spans = [span for piece in pieces for span in piece]
        T = sum(count for *_, count in spans)
        qkv = torch.randn(T, H + 2 * KVH, D, device="cuda", dtype=torch.bfloat16)
        M = -(-max(context for context, *_ in spans) // P)  # pages of a piece
        pool = torch.randn(2, len(pieces) * M + 1, KVH, P, D, device="cuda", dtype=torch.bfloat16)
        paged_pieces = [(piece, list(range(i * M, i * M + M))) for i, piece in enumerate(pieces)]
        plan = prefill.plan_prefill(paged_pieces, H // KVH, D, qkv.dtype, "cuda")
        ms = do_bench_cudagraph(lambda: prefill.prefill_attention(
            *qkv.split([H, KVH, KVH], 1), *pool, plan, D**-0.5))
        pairs = sum(count * (context + len(own) - count / 2) for context, own, count in spans)
        print(f"{label:40} {1000 * ms:8.1f} us {4e-9 * pairs * H * D / ms:6.0f} TFLOP/s")


def choose_token(rows=(1, 16, 64, 256, 1024), V=151936):
    """TB/s of logits, read once."""
    for R in rows:
        logits = torch.randn(R, V, device="cuda", dtype=torch.bfloat16)
        trace = torch.arange(2 * R, device="cuda", dtype=torch.int32).view(R, 2)
        knobs = torch.ones(1, device="cuda"), torch.ones(1, device="cuda", dtype=torch.int64)
        ms = do_bench_cudagraph(lambda: choose.triton_choose(logits, *knobs, *trace.unbind(1)))
        print(f"{R:6} rows {1000 * ms:8.1f} us {2e-9 * R * V / ms:6.2f} TB/s")


BENCHMARKS = {f.__name__: f for f in (token_advantages, paged_attention, prefill_attention, choose_token)}

if __name__ == "__main__":
    if not torch.cuda.is_available() or {*sys.argv[1:]} - {*BENCHMARKS}:
        raise SystemExit(f"needs a CUDA GPU, and names of {', '.join(BENCHMARKS)}, or none for all of them")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16")
    for name in sys.argv[1:] or BENCHMARKS:
        print(name)
        BENCHMARKS[name]()
