"""The demo on several seeds: what `make demo` promises, as a table. One run after the other, on all cores.

    python experiments/demo_seeds.py --seeds 0 1 2 3 4 --out demo_seeds.csv

Columns: seed, pass@1 and pass@16 on the held-out problems before and after with 95% bootstrap intervals,
judge score and exact match of the first and the last step, seconds of the program. Further flags go to
exprl.py.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def one_run(seed: int, run: Path, flags: list[str]) -> dict:
    start = time.perf_counter()
    subprocess.run([sys.executable, "exprl.py", "--seed", str(seed), "--out", str(run), *flags], cwd=ROOT,
                   check=True)
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    evaluations, steps = [m for m in lines if "pass@1" in m], [m for m in lines if "accuracy" in m]
    row = {"seed": seed}
    for name, m in (("before", evaluations[0]), ("after", evaluations[-1])):
        for k in ("pass@1", "pass@16"):
            row |= {f"{name}_{k}{end}": round(m[f"{k}{end}"], 4) for end in ("", "_low", "_high")}
    for name, m in (("first", steps[0]), ("last", steps[-1])):
        row |= {f"{name}_score": m["score"] and round(m["score"], 4),
                f"{name}_accuracy": round(m["accuracy"], 4)}
    return row | {"steps": steps[-1]["step"], "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("demo_seeds.csv"))
    args, flags = parser.parse_known_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = list(csv.DictReader(args.out.open(newline=""))) if args.out.exists() else []
    if both := {int(row["seed"]) for row in kept} & {*args.seeds}:
        parser.error(f"{args.out} holds seed {min(both)} already: name other --seeds, or another --out")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            rows.append(one_run(seed, Path(folder) / str(seed), flags))
            with args.out.open("w", newline="") as file:  # after every run: a stop loses nothing
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(kept + rows)
    for row in rows:
        print(f"seed {row['seed']}: pass@1 {row['before_pass@1']:.1%} -> {row['after_pass@1']:.1%}, pass@16 "
              f"{row['before_pass@16']:.1%} -> {row['after_pass@16']:.1%}, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
