"""The head and its peers in one run: what `python kernels/token_logprob.py` calls.

    python experiments/bench_head.py [--rows N] [--csv FILE] [--chunk-mb MB]

Checks both against float64, then times a forward pass (log-prob and entropy) and the whole loss with its
gradients, for each way whose package is installed, with the most memory held beyond inputs and gradients and
the share of the floor: the matrix products alone. On CUDA N=8192, d=1536, V=151,936 in bfloat16, on a CPU
N=1024, d=576, V=49,152 in float32. Rounds alternate between the ways; the fastest counts.
"""

import argparse
import csv
import datetime
import importlib
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels.token_logprob import CHUNK_BYTES, plain_token_logprob, token_logprob, triton  # noqa: E402

head = importlib.import_module("kernels.policy_head")  # the package exports a function of this name


def check(device):
    """Values and float32 gradients of both on ragged shapes, against float64: within 1e-4 of the largest."""
    for N, d, V, temperature in ((1, 8, 5, 1.0), (300, 48, 1003, 0.7), (70, 64, 20011, 1.3)):
        hidden, weight, ids, *batch = (x.to(device) for x in head.random_case(N, d, V))

        def logprobs(way, h, w, dtype):
            logp, entropy = way(h, w, ids, temperature)
            return (logp * batch[0] + entropy * batch[1]).sum(), logp, entropy

        def losses(way, h, w, dtype):
            return way(h, w, ids, *(x.to(dtype) for x in batch), denominator=N, kl=0.1, entropy_weight=0.1)

        for outputs, plain, ours in ((logprobs, plain_token_logprob, token_logprob),
                                     (losses, head.plain_policy_head, head.policy_head)):
            results = []
            for way, dtype in ((plain, torch.float64), (ours, torch.float32)):
                h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
                loss, *metrics = outputs(way, h, w, dtype)
                loss.backward()
                results.append([x.detach().double() for x in (loss, *metrics, h.grad, w.grad)])
            for want, got in zip(*results):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()) + 1e-6)


def peak_extra_bytes(run, device):
    """Most bytes that run() holds at once beyond those held before it (as PyTorch's allocators count)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "100")  # else the profiler writes lines of its own to stderr
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peers():
    """Name -> function(hidden, weight, ids) -> logp, entropy or None: other ways whose packages are here."""
    ways = {"plain PyTorch": plain_way}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()

        def native_way(h, w, i):
            nll = torch.nn.functional.linear_cross_entropy(h, w, i, reduction="none", options=options)
            return -nll.float(), None

        ways["F.linear_cross_entropy, no entropy"] = native_way
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        def trl_way(h, w, i):
            traces = 8 if len(i) % 8 == 0 else 1  # it loops over them
            z = (h @ w.T).view(traces, -1, len(w))
            with torch.no_grad():
                entropy = entropy_from_logits(z).flatten()
            return selective_log_softmax(z, i.view(traces, -1)).flatten().float(), entropy

        ways["TRL's functions"] = trl_way
    except ImportError:
        pass
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as liger

        def liger_way(h, w, i):
            nll, entropy = liger.apply(h, w, i, 1.0, -100, 1, True)
            return -nll, entropy.detach()

        ways["Liger, scaled cross entropy"] = liger_way
    except ImportError:
        pass
    return ways


def plain_way(hidden, weight, ids):
    """plain_token_logprob at temperature 1 without a differentiable entropy, as most trainers have it."""
    logp = (hidden @ weight.T).float().log_softmax(1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, ids[:, None])[:, 0], entropy


def liger_grpo(B):
    """Liger's own head with its loss (B traces of equal length), or None. It has no entropy."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError:
        return None
    grpo = LigerFusedLinearGRPOLoss(beta=KL, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo")

    def full(h, w, i, advantages, old, ref):
        i, old, ref = (x.view(B, -1) for x in (i, old, ref))
        return grpo(h.view(B, i.shape[1], -1), w, i, torch.ones_like(i), advantages.view(B, -1)[:, 0],
                    ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return full


KL = 1e-3  # so that the timed loss has all its terms but the entropy


def benchmark(device, N, csv_file):
    cuda = device == "cuda"
    d, V, dtype = (1536, 151936, torch.bfloat16) if cuda else (576, 49152, torch.float32)
    hidden = torch.randn(N, d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, d, device=device, dtype=dtype).mul_(d**-0.5).requires_grad_()
    ids = torch.randint(V, (N,), device=device)
    with torch.no_grad():
        logp, _ = token_logprob(hidden, weight, ids)
    batch = torch.randn(N, device=device), logp + 0.1 * torch.randn_like(logp), logp - 0.1

    def with_loss(way):
        def full(h, w, i, *batch):
            logp, entropy = way(h, w, i)
            return head.token_loss(logp, entropy, *batch, kl=KL)[0].sum() / N

        return full

    forward = {"token_logprob": token_logprob, **peers()}
    full = {"policy_head": lambda *tensors: head.policy_head(*tensors, denominator=N, kl=KL).loss,
            "token_logprob and autograd": with_loss(token_logprob),
            **{name: with_loss(way) for name, way in peers().items()}}
    if N % 8 == 0 and (grpo := liger_grpo(8)):
        full["Liger, fused linear GRPO"] = grpo

    def run_forward(way):
        with torch.no_grad():
            way(hidden, weight, ids)

    def run_full(way):
        way(hidden, weight, ids, *batch).backward()
        hidden.grad = weight.grad = None

    # On a CPU the time of its threads, not of the clock on the wall: other programs then count for little.
    clock = time.perf_counter if cuda else time.process_time

    def seconds(run):
        start = clock()
        run()
        if cuda:
            torch.cuda.synchronize()
        return clock() - start

    # The floor: the three products alone. On an H200 at its dense bfloat16 rate, elsewhere measured.
    rounds, rows = (10, min(2048, N)) if cuda else (3, min(128, N))
    name = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
    h, w = hidden.detach()[:rows], weight.detach()
    z, dweight = h @ w.T, torch.zeros_like(w)
    products = [lambda: torch.mm(h, w.T, out=z), lambda: torch.mm(z, w), lambda: dweight.addmm_(z.T, h)]
    floors = [min(seconds(product) for _ in range(2 * rounds)) * N / rows for product in products]
    if "H200" in name:
        floors = [2 * N * d * V / 790e12] * 3
    del z, dweight
    gradients = hidden.nbytes + weight.nbytes
    versions = f"torch {torch.__version__}, triton {triton and triton.__version__}"
    print(f"{name}, {versions}, {dtype}, {N=} {d=} {V=}")
    print("Floor: the products alone, " + " + ".join(f"{1e3 * f:.2f}" for f in floors) + " ms, at "
          + ", ".join(f"{2e-12 * N * d * V / f:.3g}" for f in floors) + " TFLOP/s.")
    print(f"Extra MB: the most held beyond the inputs and the {gradients / 1e6:.0f} MB of gradients.")
    lines = []
    for label, run, ways, floor, returned in (("log-prob, entropy", run_forward, forward, floors[0], 0),
                                              ("loss, gradients", run_full, full, sum(floors), gradients)):
        print(f"\n{label:36}{'ms' if cuda else 'CPU ms':>10}  floor/time  extra MB")
        extra, times = {}, {}
        for way in list(ways):
            try:
                run(ways[way])  # warms up: compiles, and cuBLAS takes its workspace, once for the whole model
                extra[way] = peak_extra_bytes(lambda: run(ways[way]), device) - returned
                times[way] = math.inf
            except Exception as error:  # a peer that does not run here must not end the comparison
                print(f"{way:36}failed: {f'{type(error).__name__}: {error}'.splitlines()[0][:60]}")
                hidden.grad = weight.grad = None
        for _ in range(rounds):  # in turns, so that a change of the clock rate meets all alike
            for way in times:
                times[way] = min(times[way], seconds(lambda: run(ways[way])))
        for way, took in times.items():
            print(f"{way:36}{1e3 * took:10.2f}{floor / took:12.2f}{extra[way] / 1e6:10.0f}")
            lines.append([datetime.date.today(), name, versions, str(dtype), N, d, V, label, way,
                          "wall" if cuda else "CPU time", f"{1e3 * took:.2f}", f"{floor / took:.3f}",
                          f"{extra[way] / 1e6:.1f}"])
    if csv_file:
        header = "date machine versions dtype N d V pass way clock ms floor_share extra_mb".split()
        Path(csv_file).parent.mkdir(parents=True, exist_ok=True)
        with open(csv_file, "w", newline="") as file:
            csv.writer(file).writerows([header, *lines])


def cpu_name():
    try:
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description="Check the head against float64, time it and its peers.")
    parser.add_argument("--rows", type=int, help="tokens; default 8192 on CUDA, 1024 on a CPU")
    parser.add_argument("--csv", help="write the table to this file too")
    parser.add_argument("--chunk-mb", type=float, help="bound of a chunk of logits (CHUNK_BYTES)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.chunk_mb:
        CHUNK_BYTES[device] = int(args.chunk_mb * 1e6)
    check(device)
    benchmark(device, args.rows or (8192 if device == "cuda" else 1024), args.csv)


if __name__ == "__main__":
    main()
