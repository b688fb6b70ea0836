"""The paper's comparison in miniature: Stage I by each method from the embedded base, then Stage II.

    python experiments/miniature.py --quick    # one seed, few steps, no search for rates (make compare-quick)
    python experiments/miniature.py            # three seeds, each method at its best rate: an hour or two
    python experiments/miniature.py --methods process-end outcome-noise-0.2    # ablations: see METHODS
    python experiments/miniature.py --deeper --splits deep eval --out runs/deeper    # seldom right at first
    python experiments/miniature.py --deeper 3 --splits longer deep eval --lr 4e-4 --out runs/silent  # never
    python experiments/miniature.py --deeper 3 --temperature 0.7 --steps 36 --rates 1e-4 2e-4 4e-4 \
        --lr2 1e-4 --splits longer eval --out runs/cooler      # seldom, by what the base cannot do

Stage I takes the same number of traces for every method (SFT: as many references); METHOD-timed takes the
number of steps that costs as many CPU seconds as Outcome's run. Stage II is sparse GRPO, the same for all.
A method's learning rate is the one of RATES with the best pass@1 on `dev`, in runs with seed 0. The run at
that rate then is seed 0 of the table, which is on `eval` and `deep` (one operation more per chain): nothing
was chosen on those. An ablation takes its method's rate. "worked" = the answer and every step
right. --deeper N trains on problems with N operations more per chain; `longer` are held-out ones as long.

Every job (a run, or sampling a model on held-out problems) is a process of its own on one thread, --workers
of them side by side, so no result depends on how many there are. What is complete is not done again: start
this once more after a stop, or with other --methods to add to what OUT holds.

Writes OUT/results.csv (after every job), OUT/curves.svg, OUT/dynamics.svg, OUT/runs/ and OUT/evaluations/
(all traces). A judge of less quality is the embedded one with noise in its weights, see `noisy_judge`.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from exprl import read_jsonl  # noqa: E402
from sample import load_lm, write_atomically  # noqa: E402
from data import bootstrap_interval, load_problems, pass_at_k  # noqa: E402
from data.miniature import FOLDER, HARD, new_problems, some_trace, worked  # noqa: E402
from judge import Judge, calibrate  # noqa: E402

LIKELIHOOD = ["--judge", FOLDER / "policy", "--readout", "likelihood"]
METHODS = {  # name -> what differs from `python exprl.py`
    "base": None,
    "sft": ["--method", "sft"],
    "grpo": ["--method", "grpo"],
    "distill": ["--method", "distill"],
    "outcome": ["--method", "outcome"],
    "process": ["--method", "process"],
    # as many CPU seconds as outcome
    "grpo-timed": ["--method", "grpo"],
    "distill-timed": ["--method", "distill"],
    "process-timed": ["--method", "process"],
    # ablations: process norms and views, how the grade is read, what the judge is shown, how good it is
    "process-end": ["--method", "process", "--process-norm", "end"],
    "process-step-mean": ["--method", "process", "--process-norm", "step-mean"],
    "process-segment": ["--method", "process", "--step-view", "segment"],
    "process-segment-step-mean": ["--method", "process", "--step-view", "segment", "--process-norm",
                                  "step-mean"],
    "outcome-generate": ["--method", "outcome", "--readout", "generate"],
    # the frozen start as judge: how likely does the trace make the reference's answer and checkpoints?
    "outcome-likelihood": ["--method", "outcome", *LIKELIHOOD],
    "outcome-likelihood-mean": ["--method", "outcome", *LIKELIHOOD, "--norm", "mean"],
    "outcome-likelihood-wrong-reference": ["--method", "outcome", *LIKELIHOOD, "--reference", "wrong"],
    "process-likelihood": ["--method", "process", *LIKELIHOOD],
    "process-likelihood-step-mean": ["--method", "process", *LIKELIHOOD, "--process-norm", "step-mean"],
    # near the start: what does it keep of what it could do, at lower temperatures, too?
    **{f"{method}-kl-{kl}": ["--method", method, "--kl", kl]
       for method in ("outcome", "grpo", "distill", "process") for kl in ("0.03", "0.1", "0.3")},
    # a trace cut off loses its last step's grade, instead of being in no loss
    "process-overlong-last": ["--method", "process", "--overlong", "last"],
    "outcome-no-reference": ["--method", "outcome", "--reference", "none"],
    "outcome-wrong-reference": ["--method", "outcome", "--reference", "wrong"],
    "outcome-noise-0.15": ["--method", "outcome", "--judge", "noise-0.15"],
    "outcome-noise-0.2": ["--method", "outcome", "--judge", "noise-0.2"],
    "outcome-noise-0.25": ["--method", "outcome", "--judge", "noise-0.25"],
    "outcome-noise-0.3": ["--method", "outcome", "--judge", "noise-0.3"],
}
PAPER = ["base", "sft", "grpo", "distill", "outcome", "process"]
RATES = dict.fromkeys(PAPER[2:], (2e-4, 4e-4, 8e-4)) | {"sft": (3e-5, 1e-4, 3e-4)}
KS = (1, 2, 4, 8, 16)
COLORS = dict(zip(PAPER, ("#777777", "#a6761d", "#d95f02", "#7570b3", "#1b9e77", "#1f78b4")))
LOCK = threading.Lock()


def job(log: Path, *command) -> float:
    """A program of ours in a process on one thread, its output in `log` -> its CPU seconds."""
    print(f"{time.strftime('%H:%M:%S')} {log.stem}", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def train(args, name: str, flags: list, seed: int, lr: float, steps: int) -> Path:
    """One run of exprl.py without evaluation, unless it is complete -> its folder."""
    run = args.out / "runs" / name
    if not (run / "cpu_seconds").exists():
        shutil.rmtree(run, ignore_errors=True)
        flags = [noisy_judge(args, float(f[6:])) if f.startswith("noise-") else f for f in map(str, flags)]
        if args.deeper:
            flags += ["--data", args.out / "problems" / "train.jsonl", "--max-new-tokens", tokens(args)]
        questions = args.questions * (8 if "sft" in flags else 1)  # references, as many as others' traces
        seconds = job(args.out / "logs" / f"{name}.log", "exprl.py", "--preset", "miniature", *flags,
                      "--seed", seed, "--lr", lr, "--steps", steps, "--questions", questions,
                      "--temperature", args.temperature, "--eval-limit", 0, "--show-every", 0, "--out", run)
        shutil.rmtree(run / "checkpoints")
        (run / "cpu_seconds").write_text(f"{seconds:.1f}\n")
    return run


def tokens(args) -> int:
    """The limit of a trace, of which few of the base reach it: longer problems have longer ones."""
    return 160 + 48 * max(args.deeper - 1, 0)


def noisy_judge(args, noise: float) -> Path:
    """The judge with normal noise added to every weight, `noise` times the root mean square of its tensor.
    Writes its AUROC beside it: right traces against traces with one error, one of each for 100 problems of
    dev."""
    folder = args.out / "judges" / f"noise-{noise:g}"
    with LOCK:
        if not folder.exists():
            lm, generator = load_lm(str(FOLDER / "judge")), torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in lm.model.parameters():
                    p += noise * p.square().mean().sqrt() * torch.randn(p.shape, generator=generator)
            problems, rng = load_problems(str(FOLDER / "dev.jsonl"))[:100], random.Random(0)
            records = [{"problem": p.id, "text": some_trace(rng, p, kind), "correct": kind == "right"}
                       for p in problems for kind in ("right", "near")]
            found = calibrate(Judge(lm.model, lm.tokenizer, lm.prompts), problems, records, "right")
            lm.save(folder.with_suffix(".tmp"))
            (folder.with_suffix(".tmp") / "auroc").write_text(f"{found['auroc']:.3f}\n")
            folder.with_suffix(".tmp").rename(folder)
    return folder


def write_problems(args) -> None:
    """OUT/problems/: the first --problems of each split that is measured; with --deeper new ones to train and
    to tune on (and `longer`), none of which is in a shipped split."""
    folder = args.out / "problems"
    for split in {"dev", *args.splits} - {"longer"}:
        lines = (FOLDER / f"{split}.jsonl").read_text().splitlines(keepends=True)
        write_atomically(folder / f"{split}.jsonl", "".join(lines[: args.problems]))
    if args.deeper:
        taken = {p.question for p in load_problems(str(FOLDER / "deep.jsonl"))}
        name = "deeper" if args.deeper == 1 else f"deeper {args.deeper}"
        lines = new_problems(random.Random(name), 1000 + 2 * args.problems,
                             tuple(depth + args.deeper for depth in HARD), taken)
        write_atomically(folder / "train.jsonl", "".join(lines[:1000]))
        write_atomically(folder / "dev.jsonl", "".join(lines[1000 : 1000 + args.problems]))
        write_atomically(folder / "longer.jsonl", "".join(lines[1000 + args.problems :]))


def cpu_seconds(run: Path) -> float:
    return float((run / "cpu_seconds").read_text())


def measure(args, stage: str, method: str, seed: int, lr: float, run: Path | None, splits) -> list[dict]:
    """A row of results.csv for each split, kept in OUT/evaluations beside the traces. No run: the base.

    `right` in a row: how many traces of each problem are."""
    traces = args.out / "evaluations" / f"{run.name if run else f'base-{seed}'}-{'-'.join(splits)}.jsonl"
    files = [str(args.out / "problems" / f"{split}.jsonl") for split in splits]
    kept = traces.with_suffix(".json")
    if not traces.exists():
        job(args.out / "logs" / f"{traces.stem}.log", "sample.py", "--model",
            run / "model" if run else FOLDER / "policy", "--data", *files, "--n", max(KS),
            "--max-new-tokens", tokens(args) + 32, "--temperature", args.temperature, "--seed", seed,
            "--max-rows", 400, "--out", traces)
    if not kept.exists():
        by_id = {p.id: p for p in load_problems(files)}
        steps = len(read_jsonl(run / "metrics.jsonl")) if run else 0
        rows = []
        for split in splits:
            records = [r for r in read_jsonl(traces) if r["problem"].startswith(f"{split}/")]
            right = np.reshape([r["correct"] for r in records], (-1, max(KS))).sum(1).tolist()
            row = dict(stage=stage, method=method, seed=seed, lr=lr, steps=steps,
                       seconds=cpu_seconds(run) if run else 0.0, split=split)
            for k in KS:
                values = [pass_at_k(max(KS), count, k) for count in right]
                row[f"pass@{k}"] = np.mean(values)
                row[f"pass@{k}_low"], row[f"pass@{k}_high"] = bootstrap_interval(values)
            row["worked"] = np.mean([worked(by_id[r["problem"]], r["text"]) for r in records])
            row["length"] = np.mean([r["tokens"] for r in records])
            rows.append({k: round(float(v), 5) if isinstance(v, float) else v for k, v in row.items()})
            rows[-1]["right"] = right
        write_atomically(kept, json.dumps(rows) + "\n")
    with LOCK:
        rows = results(args)
        with (args.out / "results.csv").open("w", newline="") as file:
            names = [name for name in rows[0] if name != "right"]
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return json.loads(kept.read_text())


def results(args) -> list[dict]:
    """All rows that OUT holds; of a model measured with other --splits, too, each split once."""
    order = list(METHODS)
    place = lambda r: (r["stage"], order.index(r["method"]), r["seed"], r["lr"], r["split"])
    files = sorted((args.out / "evaluations").glob("*.json"))
    rows = {place(row): row for kept in files for row in json.loads(kept.read_text())}
    return [rows[key] for key in sorted(rows)]


def candidates(args, method: str) -> tuple[float, ...]:
    return tuple(args.rates) if args.rates and method != "sft" else RATES[method]


def explore(args, method: str, lr: float) -> float:
    """pass@1 on dev of the method at one rate of its grid, with seed 0."""
    run = train(args, f"{method}-{lr:g}-0", METHODS[method], 0, lr, args.steps)
    return measure(args, "grid", method, 0, lr, run, ["dev"])[0]["pass@1"]


def compare(args, method: str, seed: int, rate) -> None:
    """Stage I and II of one method and seed, each measured. rate(method) waits for the grid."""
    run, lr, flags = None, 0.0, METHODS[method]
    if flags:
        lr, steps = rate(method), args.steps
        if method.endswith("-timed"):
            family = method.removesuffix("-timed")
            outcome, same = (args.out / "runs" / f"{m}-{rate(m):g}-{seed}" for m in ("outcome", family))
            if not (outcome / "cpu_seconds").exists() or not (same / "cpu_seconds").exists():
                raise SystemExit(f"{method} comes after {outcome.name} and {same.name}: run those first")
            steps = max(1, round(steps * cpu_seconds(outcome) / cpu_seconds(same)))
        with LOCK:
            others = {r["lr"] for r in results(args) if (r["stage"], r["method"]) == ("I", method)} - {lr}
        if others:  # the tables are over seeds
            raise SystemExit(f"{args.out} holds {method} at the rate {others.pop():g}: take another --out")
        run = train(args, f"{method}-{lr:g}-{seed}", flags, seed, lr, steps)
    measure(args, "I", method, seed, lr, run, args.splits)
    if not args.steps2:
        return
    flags = ["--method", "grpo", "--norm", "mean", "--model", run / "model" if run else FOLDER / "policy"]
    name = f"{run.name if run else f'base-{seed}'}-stage2"
    run = train(args, name, flags, seed + 1000, args.lr2, args.steps2)
    measure(args, "II", method, seed, args.lr2, run, args.splits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=PAPER, choices=METHODS, metavar="METHOD",
                        help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="one learning rate for Stage I instead of the best of RATES")
    parser.add_argument("--rates", type=float, nargs="+",
                        help="to choose from, in the place of RATES (but for SFT)")
    parser.add_argument("--steps", type=int, default=12, help="of Stage I")
    parser.add_argument("--steps2", type=int, default=12, help="of Stage II; 0: Stage I only")
    parser.add_argument("--lr2", type=float, default=4e-4, help="learning rate of Stage II")
    parser.add_argument("--questions", type=int, default=16, help="problems per step, 8 traces each")
    parser.add_argument("--problems", type=int, default=64, help="of each split, 16 traces each")
    parser.add_argument("--splits", nargs="+", default=["eval", "deep"])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="jobs side by side")
    parser.add_argument("--deeper", type=int, nargs="?", const=1, default=0, metavar="N",
                        help="train and tune on problems with N operations more per chain (without N: 1, as "
                             "`deep`)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of all sampling")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "comparison")
    if parser.parse_args().quick:
        parser.set_defaults(seeds=[0], lr=3e-4, steps=8, steps2=8, splits=["eval"],
                            out=ROOT / "runs" / "comparison-quick")
    args = parser.parse_args()
    args.out = args.out.absolute()
    for folder in ("runs", "evaluations", "judges", "logs", "problems"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(args, name) for name in ("steps", "steps2", "questions", "problems")
             if getattr(args, name)} | {"deeper": args.deeper, "temperature": args.temperature}
    if args.steps2:
        sizes["lr2"] = args.lr2
    if "longer" in args.splits and not args.deeper:
        parser.error("--splits longer: problems as long as those of --deeper N, which is missing")
    config = args.out / "config.json"
    kept = json.loads(config.read_text()) if config.exists() else {}
    if kept | sizes != sizes | kept:
        raise SystemExit(f"{args.out} is of other sizes ({config.read_text()}): take another --out")
    write_atomically(config, json.dumps(kept | sizes))
    write_problems(args)

    families = {name.split("-")[0] for name in args.methods}
    families |= {"outcome" for name in args.methods if name.endswith("-timed")}
    tuned = [] if args.lr else [m for m in PAPER[:0:-1] if m in families]  # the slowest first
    with ThreadPoolExecutor(args.workers) as pool:  # what a job waits for has been started before
        grid = {m: {lr: pool.submit(explore, args, m, lr) for lr in candidates(args, m)} for m in tuned}

        def rate(method: str) -> float:
            found = grid.get(method.split("-")[0], {})
            return max(found, key=lambda lr: found[lr].result()) if found else args.lr

        timed = [m for m in args.methods if m.endswith("-timed")]  # need the seconds of the others
        try:
            for methods in ([m for m in args.methods if m not in timed], timed):
                jobs = [pool.submit(compare, args, m, seed, rate) for seed in args.seeds for m in methods]
                for done in as_completed([*jobs, *(f for found in grid.values() for f in found.values())]):
                    done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    report(args)


def report(args) -> None:
    """Print the tables in Markdown and draw the figures, of all that OUT holds."""
    rows = results(args)
    rates = sorted({r["lr"] for r in rows if r["stage"] == "grid"})
    if rates:
        print("\n| pass@1 on dev, by rate | " + " | ".join(f"{lr:g}" for lr in rates) + " |")
        print("|---" * (len(rates) + 1) + "|")
    for method in PAPER[1:] if rates else []:
        found = {r["lr"]: r["pass@1"] for r in rows if (r["stage"], r["method"]) == ("grid", method)}
        cells = {lr: f"**{v:.1%}**" if v == max(found.values()) else f"{v:.1%}" for lr, v in found.items()}
        print(f"| {method} | " + " | ".join(cells.get(lr, "") for lr in rates) + " |")
    for stage in ("I", "II"):
        print(table([r for r in rows if r["stage"] == stage], stage, args.splits))
    ours = [r for r in rows if r["split"] == args.splits[0] and r["method"] in PAPER]
    runs = {"I": {}, "II": {}}  # stage -> method -> the metrics of its runs, a list of steps per seed
    for r in ours:
        if r["stage"] == "I":
            name = f"base-{r['seed']}" if r["method"] == "base" else f"{r['method']}-{r['lr']:g}-{r['seed']}"
            for stage, run in (("I", name), ("II", f"{name}-stage2")):
                steps = read_jsonl(args.out / "runs" / run / "metrics.jsonl")
                if steps and steps[0]["accuracy"] is not None:  # SFT samples nothing
                    runs[stage].setdefault(r["method"], []).append(steps)

    def by_step(title, stage, name, share=False):
        curves = {m: [[step.get(name) for step in steps] for steps in found]
                  for m, found in runs[stage].items()}
        return chart(f"Stage {stage}: {title}, by step", curves, share, count=True)

    def by_k(stage):
        curves: dict = {}
        for r in ours:
            if r["stage"] == stage:
                curves.setdefault(r["method"], []).append([r[f"pass@{k}"] for k in KS])
        title = f"after Stage {stage}: pass@k on {args.splits[0]}, k = {', '.join(map(str, KS))}"
        return chart(title, curves, True)

    right = "share of right traces"
    page(args.out / "curves.svg", [by_step(right, stage, "accuracy", True) for stage in runs])
    watched = {"unsolved": "problems seen, never solved", "entropy": "entropy, nats a token",
               "length": "tokens per trace", "headings": "headings per trace"}
    page(args.out / "dynamics.svg", [
        by_k("I"), by_k("II"),
        *(by_step(title, stage, name, name == "unsolved")
          for name, title in watched.items() for stage in runs),
        by_step("the judge's score", "I", "score", True),
        by_step("distance to the teacher, nats a token", "I", "teacher_kl"),
    ])


def table(rows: list[dict], stage: str, splits: list[str]) -> str:
    """In the form of the paper's Tables 1 and 2, in percent: means over seeds, in brackets the lowest and the
    highest; then pass@1 minus sparse GRPO's of the same seeds, with its 95% interval over problems."""
    measures = ("pass@1", f"pass@{max(KS)}", "worked")
    names = [f"after Stage {stage}", "rate", "seeds", "CPU s"]
    names += [f"{split} {measure}" for split in splits for measure in (*measures, "minus grpo")]
    lines = [f"\n| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method in METHODS:
        ours = [r for r in rows if r["method"] == method and r["split"] == splits[0]]
        if not ours:
            continue
        cells = [method, " ".join(sorted({f"{r['lr']:g}" for r in ours})), str(len(ours)),
                 f"{np.mean([r['seconds'] for r in ours]):.0f}"]
        for split in splits:
            mine, sparse = ([r for r in rows if (r["method"], r["split"]) == (m, split)]
                            for m in (method, "grpo"))
            if not mine:  # it was run with fewer --splits
                cells += [""] * (len(measures) + 1)
                continue
            for measure in measures:
                values = [100 * r[measure] for r in mine]
                cells.append(f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            cells.append("")
            both = {r["seed"] for r in mine} & {r["seed"] for r in sparse}
            if both and method != "grpo":
                solved, theirs = (np.mean([r["right"] for r in found if r["seed"] in both], 0)
                                  for found in (mine, sparse))
                difference = 100 * (solved - theirs) / max(KS)
                low, high = bootstrap_interval(difference)
                cells[-1] = f"{difference.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WIDTH, HEIGHT = 430, 220  # of a chart


def chart(title: str, curves: dict[str, list[list]], share=False, count=False) -> tuple[str, list[str]]:
    """curves: method -> per seed a list of values (None: nothing to show) -> the drawing, and whom it shows.
    A line is the mean of the seeds, a band goes from the lowest to the highest. share: values in percent from
    0 on; count: the first and the last value's number below them."""
    points = {method: [(i, found) for i, values in enumerate(zip(*series))
                       if (found := [v for v in values if v is not None])]
              for method, series in curves.items()}
    points = {method: found for method, found in points.items() if found}
    every = [v for found in points.values() for _, values in found for v in values]
    bottom = 0.0 if share else min(every, default=0.0)
    top = max([*every, bottom + 1e-9])  # all the same: an empty scale
    last = max((found[-1][0] for found in points.values()), default=0) or 1
    parts = [f'<text x="0" y="14">{title}</text>']
    for i in range(5):
        y, value = 30 + HEIGHT * (1 - i / 4), bottom + (top - bottom) * i / 4
        parts.append(f'<path d="M0 {y}h{WIDTH}" stroke="#ddd"/><text x="-6" y="{y + 4}" text-anchor="end">'
                     + (f"{value:.1%}" if share else f"{value:.3g}") + "</text>")

    for i in (0, last) if count else ():
        parts.append(f'<text x="{WIDTH * i / last}" y="{HEIGHT + 46}" text-anchor="middle">{i + 1}</text>')

    def place(i, value):
        return f"{WIDTH * i / last:.1f},{30 + HEIGHT * (1 - (value - bottom) / (top - bottom)):.1f}"

    for method, found in points.items():
        low, middle, high = ([place(i, f(values)) for i, values in found] for f in (min, np.mean, max))
        parts.append(f'<polygon points="{" ".join(high + low[::-1])}" fill="{COLORS[method]}" '
                     f'opacity="0.15"/><polyline points="{" ".join(middle)}" fill="none" '
                     f'stroke="{COLORS[method]}" stroke-width="2"/>')
    return "".join(parts), list(points)


def page(path: Path, charts: list[tuple[str, list[str]]]) -> None:
    """Charts in two columns over a legend."""
    across, down = WIDTH + 80, HEIGHT + 60
    parts = [f'<g transform="translate({60 + i % 2 * across} {10 + i // 2 * down})">{drawing}</g>'
             for i, (drawing, _) in enumerate(charts)]
    height = 10 + (len(charts) + 1) // 2 * down
    shown = [m for m in METHODS if any(m in methods for _, methods in charts)]
    parts += [f'<text x="{60 + 150 * i}" y="{height + 10}" fill="{COLORS[method]}">{method}</text>'
              for i, method in enumerate(shown)]
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * across + 10} {height + 30}" '
                    f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
                    f"{''.join(parts)}</svg>\n")


if __name__ == "__main__":
    main()
