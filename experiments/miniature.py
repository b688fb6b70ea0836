"""The paper's comparison in miniature: Stage I by each method from the embedded base, then Stage II.

    python experiments/miniature.py --quick    # one seed, few steps, no search for rates (make compare-quick)
    python experiments/miniature.py            # three seeds, each method at its best rate of LRS: hours
    python experiments/miniature.py --methods process process-end process-step-mean    # ablations: METHODS

Stage I takes the same number of traces for every method (SFT: as many references); `seconds` says what that
cost. Stage II is sparse GRPO, the same for all. The learning rate is chosen by pass@1 on `dev` with a seed of
its own; the table is on `eval` and `deep` (one operation more per chain), which nothing was chosen on.
"worked" = the answer and every step right.

Writes OUT/results.csv, OUT/curves.svg and OUT/runs/. A run that is complete is not run again: start this once
more after a stop. Left out: equal CPU time instead of equal traces (scale --steps by `seconds`).
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from exprl import read_jsonl  # noqa: E402
from sample import evaluate, load_lm  # noqa: E402
from data import load_problems  # noqa: E402
from data.miniature import FOLDER, worked  # noqa: E402

METHODS = {  # name -> what differs from `python exprl.py`
    "base": None,
    "sft": ["--method", "sft"],
    "grpo": ["--method", "grpo"],
    "distill": ["--method", "distill"],
    "outcome": ["--method", "outcome"],
    "process": ["--method", "process"],
    # ablations
    "process-end": ["--method", "process", "--process-norm", "end"],
    "process-step-mean": ["--method", "process", "--process-norm", "step-mean"],
    "process-lone-score": ["--method", "process", "--step-credit", "score"],
    "outcome-mean": ["--method", "outcome", "--norm", "mean"],
    "outcome-no-reference": ["--method", "outcome", "--reference", "none"],
    "outcome-wrong-reference": ["--method", "outcome", "--reference", "wrong"],
    "distill-full": ["--method", "distill", "--distill-kl", "full"],
}
PAPER = ["base", "sft", "grpo", "distill", "outcome", "process"]
LRS = [1.5e-4, 3e-4, 6e-4]
STAGE2_LR = 3e-4
GRID_SEED = 100
COLORS = dict(zip(METHODS, ("#777777", "#a6761d", "#d95f02", "#7570b3", "#1b9e77", "#1f78b4") * 3))


def train(run: Path, flags: list, seed: int, steps: int, lr: float, args) -> float:
    """One run of exprl.py without evaluation, unless it is complete -> its seconds of training."""
    if not (run / "model").exists():
        shutil.rmtree(run, ignore_errors=True)
        questions = args.questions * (8 if "sft" in flags else 1)  # references, as many as others' traces
        command = [sys.executable, "exprl.py", "--preset", "miniature", *flags, "--seed", seed, "--lr", lr]
        command += ["--steps", steps, "--questions", questions, "--eval-limit", 0, "--show-every", 0]
        command += ["--out", run]
        print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return sum(m["seconds"] for m in metrics(run))


def metrics(run: Path) -> list[dict]:
    return read_jsonl(run / "metrics.jsonl")


def measure(model: Path, split: str, args) -> dict:
    """pass@1, pass@16 with intervals and worked, kept beside the model."""
    kept = args.out / "evaluations" / f"{model.parent.name}-{split}-{args.problems}.json"
    if not kept.exists():
        problems = load_problems(str(FOLDER / f"{split}.jsonl"))[: args.problems]
        by_id = {p.id: p for p in problems}
        result, records = evaluate(load_lm(str(model)), problems, 16, (1, 16), 192, 1.0, 0)
        result["worked"] = sum(worked(by_id[r["problem"]], r["text"]) for r in records) / len(records)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(result))
    result = json.loads(kept.read_text())
    names = [f"pass@{k}{end}" for k in (1, 16) for end in ("", "_low", "_high")] + ["worked", "length"]
    return {name: round(result[name], 4) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=PAPER, choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="one learning rate for Stage I instead of the best of LRS")
    parser.add_argument("--steps", type=int, default=20, help="of Stage I")
    parser.add_argument("--steps2", type=int, default=30, help="of Stage II")
    parser.add_argument("--questions", type=int, default=32, help="problems per step, 8 traces each")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems, 16 traces each")
    parser.add_argument("--splits", nargs="+", default=["eval", "deep"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "comparison")
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(
            seeds=[0],
            lr=3e-4,
            steps=8,
            steps2=8,
            questions=16,
            problems=100,
            splits=["eval"],
            out=ROOT / "runs" / "comparison-quick",
        )
        args = parser.parse_args()
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []

    def record(stage, method, seed, lr, seconds, model, splits):
        for split in splits:
            rows.append(
                {
                    "stage": stage,
                    "method": method,
                    "seed": seed,
                    "lr": lr,
                    "seconds": round(seconds, 1),
                    "split": split,
                    **measure(model, split, args),
                }
            )
            print("  " + " ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        with (args.out / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    best = {}
    for method in args.methods:
        if METHODS[method] and not args.lr:
            for lr in LRS:
                run = args.out / "runs" / f"grid-{method}-{lr:g}"
                seconds = train(run, METHODS[method], GRID_SEED, args.steps, lr, args)
                record("grid", method, GRID_SEED, lr, seconds, run / "model", ["dev"])
            best[method] = max((r for r in rows if r["method"] == method), key=lambda r: r["pass@1"])["lr"]
    for seed in args.seeds:
        for method in args.methods:
            lr, seconds, model = best.get(method, args.lr), 0.0, FOLDER / "policy"
            if METHODS[method]:
                run = args.out / "runs" / f"{method}-{seed}"
                seconds, model = train(run, METHODS[method], seed, args.steps, lr, args), run / "model"
            record("I", method, seed, lr, seconds, model, args.splits)
            run = args.out / "runs" / f"{method}-{seed}-stage2"
            flags = ["--method", "grpo", "--norm", "mean", "--model", model]
            seconds = train(run, flags, seed + 1000, args.steps2, STAGE2_LR, args)
            record("II", method, seed, STAGE2_LR, seconds, run / "model", args.splits)
    (args.out / "curves.svg").write_text(figure(args))
    print(table(rows, args))


def table(rows: list[dict], args) -> str:
    """In the form of the paper's Tables 1 and 2: means over seeds, lowest and highest behind them."""
    lines = []
    for stage in ("I", "II"):
        for split in args.splits:
            lines += [
                f"\nafter Stage {stage}, {split} ({args.problems} problems x 16 traces)",
                f"{'':24s}{'pass@1':>24s}{'pass@16':>24s}{'worked':>24s}{'seconds':>10s}",
            ]
            for method in args.methods:
                found = [r for r in rows if (r["stage"], r["split"], r["method"]) == (stage, split, method)]
                cells = []
                for name in ("pass@1", "pass@16", "worked"):
                    values = [r[name] for r in found]
                    cells.append(f"{sum(values) / len(values):.1%} ({min(values):.1%} to {max(values):.1%})")
                lines.append(
                    f"{method:24s}"
                    + "".join(f"{c:>24s}" for c in cells)
                    + f"{sum(r['seconds'] for r in found) / len(found):10.0f}"
                )
    return "\n".join(lines)


def figure(args) -> str:
    """Exact match of the sampled traces per step, Stage I beside Stage II; band: lowest to highest seed."""
    parts, width, height = [], 430, 260
    curves = {}
    for panel, suffix in enumerate(("", "-stage2")):
        for method in args.methods:
            runs = [args.out / "runs" / f"{method}-{seed}{suffix}" for seed in args.seeds]
            if all((run / "metrics.jsonl").exists() for run in runs):
                series = [[m["accuracy"] for m in metrics(run)] for run in runs]
                if series[0][0] is not None:  # SFT samples nothing
                    curves[panel, method] = list(zip(*series))
    top = max(max(map(max, curve)) for curve in curves.values()) or 1.0  # all wrong: an empty scale
    for panel in (0, 1):
        left = 50 + panel * (width + 50)
        parts.append(
            f'<text x="{left}" y="20">Stage {"I" * (panel + 1)}: share of right traces, by step</text>'
        )
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = 30 + height * (1 - share)
            parts.append(
                f'<path d="M{left} {y}h{width}" stroke="#ddd"/><text x="{left - 8}" y="{y + 4}" '
                f'text-anchor="end">{share * top:.1%}</text>'
            )
        for (where, method), curve in curves.items():
            if where == panel:
                x = [left + width * i / max(len(curve) - 1, 1) for i in range(len(curve))]
                low, mid, high = (
                    [30 + height * (1 - f(values) / top) for values in curve]
                    for f in (min, lambda v: sum(v) / len(v), max)
                )
                band = [f"{a:.1f},{b:.1f}" for a, b in [*zip(x, high), *reversed(list(zip(x, low)))]]
                line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, mid))
                parts.append(
                    f'<polygon points="{" ".join(band)}" fill="{COLORS[method]}" opacity="0.15"/>'
                    f'<polyline points="{line}" fill="none" stroke="{COLORS[method]}" stroke-width="2"/>'
                )
    for i, method in enumerate(args.methods):
        parts.append(
            f'<text x="{50 + 110 * (i % 9)}" y="{height + 60 + 18 * (i // 9)}" '
            f'fill="{COLORS[method]}">{method}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + 120} {height + 100}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    main()
