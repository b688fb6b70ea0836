"""Two kinds of problems in one run of the miniature: does one drown the other?

    python experiments/mixed_domains.py --out FOLDER              # a few minutes; writes FOLDER/table.csv

Half of each step's problems, on average, are short chains (4 operations, often solved), half are the usual
long ones (10, rarely solved). Grades are normalised within a problem's group, so a kind with higher grades
has no larger advantages. The judge is the embedded one, which brings one rubric for both.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import bootstrap_interval  # noqa: E402
from data.miniature import HARD, make_problem  # noqa: E402

KINDS = {"short": (1, 1, 2), "long": HARD}  # operations per chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder for data, run and table")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--questions", type=int, default=16)
    args = parser.parse_args()
    args.out = args.out.absolute()
    if args.out.exists():
        parser.error(f"{args.out} exists: name a new folder")
    args.out.mkdir(parents=True)
    rng, files = random.Random(0), {"train": [], "held_out": []}
    for split, count in (("train", 200), ("held_out", 40)):
        for kind, depths in KINDS.items():
            file = args.out / f"{kind}_{split}.jsonl"
            rows = [make_problem(rng, depths)._asdict() | {"domain": kind} for _ in range(count)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split].append(file)
    run = args.out / "run"
    subprocess.run([sys.executable, ROOT / "exprl.py", "--preset", "miniature", "--data", *files["train"],
                    "--eval-data", *files["held_out"], "--eval-n", "8", "--eval-k", "1", "8", "--steps",
                    str(args.steps), "--questions", str(args.questions), "--out", run], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open(args.out / "table.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "domain", "score", "accuracy", "held_out", "held_out_low", "held_out_high"])
        for m in lines:
            for kind in KINDS:
                of = m.get("domains", {}).get(kind)
                if of:
                    values = [f"{of[name]:.4f}" for name in ("score", "accuracy")]
                    table.writerow([m["step"], kind, *values, "", "", ""])
                elif "accuracy" not in m:
                    values = held_out(run / "evaluations" / f"step_{m['step']}.jsonl", kind)
                    table.writerow([m["step"], kind, "", "", *(f"{v:.4f}" for v in values)])
    print((args.out / "table.csv").read_text())


def held_out(path: Path, kind: str) -> tuple[float, float, float]:
    """pass@1 of a kind's held-out problems, with its 95% interval over problems."""
    solved: dict[str, list[bool]] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        if record["problem"].startswith(kind):
            solved.setdefault(record["problem"], []).append(record["correct"])
    shares = [np.mean(s) for s in solved.values()]
    return float(np.mean(shares)), *bootstrap_interval(shares)


if __name__ == "__main__":
    main()
