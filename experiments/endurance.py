"""A long run with random kills beside an undisturbed one: do both end with the same bits, does memory grow?

    python experiments/endurance.py --out FOLDER        # 300 steps of the miniature, two runs, on one thread

One run goes through. Then another is killed at random steps, by SIGKILL or SIGTERM, and resumed each time.
Then weights, optimizer moments, metrics and traces of both are compared, bit for bit.
Writes FOLDER/endurance.csv, a line per step: the peak memory of each process (resident, libraries included)
since it was started, how often the second run was killed until then; and FOLDER/endurance.svg from it.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from exprl import read_jsonl  # noqa: E402

FLAGS = """--questions 2 --group 4 --max-new-tokens 32 --save-every 20 --show-every 0 --device cpu
           --eval-every 100 --eval-limit 4 --eval-n 2 --eval-k 1 2""".split()
VOLATILE = {"seconds", "sample_tok_s", "judge_tok_s", "train_tok_s", "peak_gb", "tokens_per_second"}


def start(*command) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "exprl.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def completed(run: Path) -> int:
    return max((m["step"] for m in read_jsonl(run / "metrics.jsonl") if "seconds" in m), default=0)


def disturbed(run: Path, steps: int, count: int, rng: random.Random) -> list[tuple[int, str]]:
    """Kill and resume at `count` random steps -> (last step logged, signal) of each kill."""
    kills = []
    process = start(*FLAGS, "--steps", str(steps), "--out", str(run))
    for step in sorted(rng.sample(range(1, steps), count)):
        before = completed(run)
        while process.poll() is None and (completed(run) == before or completed(run) < step):
            time.sleep(0.2)  # loading is not what is tested: wait for a step, or for one that is dropped
        time.sleep(rng.uniform(0, 2))
        if process.poll() is not None:
            break
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        process.send_signal(number)
        if process.wait() not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
            raise SystemExit(f"{number.name} ended the run with {process.returncode}")
        kills.append((completed(run), number.name))
        print(f"step {kills[-1][0]}: {number.name}", flush=True)
        process = start("--resume", str(run))
    if process.wait():
        raise SystemExit(f"a run ended with {process.returncode}; its message stands above")
    return kills


def differences(a: Path, b: Path, steps: int) -> list[str]:
    """What the ends of two runs do not share, bit for bit."""
    found = []
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(run / "checkpoints" / f"step_{steps}" / name) for run in (a, b))
        found += [key for key in one.keys() | two.keys()
                  if key not in one or key not in two or one[key].tobytes() != two[key].tobytes()]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        one, two = ([{k: v for k, v in line.items() if k not in VOLATILE} for line in read_jsonl(run / name)]
                    for run in (a, b))
        found += [name] * (one != two)
    return found


def figure(rows: list[dict]) -> str:
    """Both columns of memory over the steps, as an SVG."""
    width, height, top = 640, 200, 1.1 * max(max(row["whole_gb"], row["killed_gb"]) for row in rows)
    drawn = []
    for name, color in (("whole_gb", "#1f77b4"), ("killed_gb", "#d62728")):
        at = [(50 + width * row["step"] / len(rows), 20 + height * (1 - row[name] / top)) for row in rows]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    labels = [(45, 24 + height * (1 - i / 2), "end", f"{top * i / 2:.2f} GB") for i in range(3)]
    labels += [(50, height + 40, "start", "step 1"), (50 + width, height + 40, "end", f"step {len(rows)}"),
               (200, height + 40, "start", "blue: undisturbed, red: killed and resumed")]
    drawn += [f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in labels]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 0 {width + 90} {height + 50}" '
            'font-size="12" font-family="sans-serif"><rect x="-20" width="100%" height="100%" fill="white"/>'
            f'{"".join(drawn)}</svg>\n')


def report(whole: Path, killed: Path, steps: int, kills: list[tuple[int, str]], out: Path) -> bool:
    """Table, figure and verdict of two finished runs: do they differ?"""
    memory = [{m["step"]: m["peak_gb"] for m in read_jsonl(run / "metrics.jsonl") if "seconds" in m}
              for run in (whole, killed)]
    rows = [dict(step=step, whole_gb=round(memory[0][step], 4), killed_gb=round(memory[1][step], 4),
                 kills=sum(at < step for at, _ in kills)) for step in range(1, steps + 1)]
    with open(out / "endurance.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    (out / "endurance.svg").write_text(figure(rows))
    differing = differences(whole, killed, steps)
    first = min(50, steps)
    grown = rows[-1]["whole_gb"] - rows[first - 1]["whole_gb"]
    print(f"{len(kills)} kills ({sum(name == 'SIGKILL' for _, name in kills)} SIGKILL); "
          f"{'bit for bit the same' if not differing else 'DIFFERENT: ' + ', '.join(differing[:5])}; "
          f"memory grew by {1024 * grown:.1f} MB from step {first} to {steps}")
    return bool(differing)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two runs, table and figure")
    args = parser.parse_args()
    if not 0 <= args.kills < args.steps:
        parser.error("--kills must be below --steps")
    args.out.mkdir(parents=True, exist_ok=True)
    whole, killed = args.out / "whole", args.out / "killed"
    if start(*FLAGS, "--steps", str(args.steps), "--out", str(whole.resolve())).wait():
        raise SystemExit("the undisturbed run failed; its message stands above")
    kills = disturbed(killed.resolve(), args.steps, args.kills, random.Random(args.seed))
    differ = report(whole, killed, args.steps, kills, args.out)
    if len(kills) < args.kills:
        raise SystemExit(f"only {len(kills)} of {args.kills} kills met the run: take more --steps")
    raise SystemExit(differ)


if __name__ == "__main__":
    main()
