"""One HTML file to see runs in: held-out results, curves, settings, and every trace to read.

    python experiments/report.py runs/NAME [runs/OTHER ...] [--out report.html] [--max-mb 60]

The file opens from disk in a browser of 2024 or later and asks no network. A run may still be going on: start
this again for its news. Runs that differ in the seed alone share a line with a band. This file reads folders
and computes the numbers; report.html beside it draws them. Left out: the traces of evaluations, smoothing.
"""

import argparse
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import fingerprint, load_problems  # noqa: E402  the repository's own, whatever the working directory

DATA = "training data"


@dataclass(frozen=True)
class Run:
    name: str
    settings: dict  # and the training data's fingerprint under DATA
    metrics: list[dict]  # lines of metrics.jsonl: training steps, and evaluations (those have pass@k)
    traces: list[dict]  # lines of rollouts.jsonl
    step: int  # the last one


def read_run(folder: Path, name: str, stride: int, notices: list[str]) -> Run:
    """The run, with the traces of every stride-th step and of the last; what is amiss joins `notices`."""
    config = json.loads((folder / "config.json").read_text())
    metrics, broken = read_jsonl(folder / "metrics.jsonl", lambda m: m["step"] >= 0)
    metrics = [m | {f"{name} ({domain})": value for domain, part in (m.get("domains") or {}).items()
                    for name, value in part.items()} for m in metrics]
    step = max((m["step"] for m in metrics), default=0)
    traces, more = read_jsonl(folder / "rollouts.jsonl",
                              lambda t: (t["step"] - 1) % stride == 0 or t["step"] == step)
    if broken + more:
        notices.append(f"{name}: {broken + more} broken lines of its .jsonl files are left out.")
    made_on = [m["held_out"] for m in metrics if "held_out" in m]
    if other := sum(one != made_on[-1] for one in made_on):  # the run was resumed with other flags
        notices.append(f"{name}: {other} of its evaluations were made on something else than the last, "
                       f"{made_on[-1]}, and are left out.")
        metrics = [m for m in metrics if m.get("held_out", made_on[-1]) == made_on[-1]]
    settings = config["settings"] | {DATA: config.get("train_fingerprint", "")}
    return Run(name, settings, metrics, traces, step)


def read_jsonl(path: Path, keep) -> tuple[list[dict], int]:
    """The records to keep, and the number of broken lines. A last line without its end is not broken: the run
    is about to write the rest."""
    records, broken = [], 0
    if path.exists():
        with path.open("rb") as file:  # bytes: a line ends at \n only, and may break off inside a character
            for line in file:
                try:
                    if keep(record := json.loads(line)):
                        records.append(record)
                except (ValueError, TypeError, KeyError):
                    broken += line.endswith(b"\n")
    return records, broken


def number(value) -> float | None:
    """4 significant digits; None for all that is no finite number: JSON has no NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def shown(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def curve(runs: list[Run], name: str) -> dict | None:
    """{x, y, low, high}: one run's values, with the interval of pass@k; of several runs the mean and the
    range, at the steps that all have reached."""
    lines = [{m["step"]: [number(m.get(name + end)) for end in ("", "_low", "_high")] for m in run.metrics
              if number(m.get(name)) is not None and ("pass@" in name) == any("pass@" in key for key in m)}
             for run in runs]  # an evaluation has a length too, which is not the training traces'
    lines = [line for line in lines if line]  # a run before its first step hides nothing
    steps = sorted(set.intersection(*map(set, lines))) if lines else []
    points = [lines[0][step] for step in steps]
    if len(lines) > 1:
        columns = [[line[step][0] for line in lines] for step in steps]
        points = [[sum(c) / len(c), min(c), max(c)] for c in columns]
    return {"x": steps} | dict(zip(("y", "low", "high"), map(list, zip(*points)))) if steps else None


def profile(runs: list[Run], name: str) -> dict | None:
    """As curve, of a metric with a value per "###" step: over their places, the mean of the last 10 lines."""
    lists = [values for run in runs for values in [m[name] for m in run.metrics if name in m][-10:]
             if isinstance(values, list)]
    columns = {k + 1: [v for values in lists if len(values) > k and (v := number(values[k])) is not None]
               for k in range(max(map(len, lists), default=0))}
    points = [(k, number(sum(column) / len(column)), None, None) for k, column in columns.items() if column]
    return dict(zip(("x", "y", "low", "high"), map(list, zip(*points)))) if points else None


def held_out(runs: list[Run], label: str, group: int, ks: list[str]) -> dict:
    """A row of the before-and-after table: pass@k -> [step, value, low, high], first and last evaluation."""
    points = {k: list(zip(*line.values())) for k in ks if (line := curve(runs, k))}
    return {"label": label, "group": group} | {k: p[:1] + p[1:][-1:] for k, p in points.items()}


def glossary() -> dict[str, str]:
    """README's table of metrics: name -> meaning and healthy range."""
    readme = (ROOT / "README.md").read_text()
    return {name: (meaning + f" · healthy: {healthy}" * bool(healthy)).replace("`", "")
            for names, meaning, healthy in re.findall(r"^\| ([\w@/, ]+) \| (.*?) \| (.*?) ?\|$", readme, re.M)
            for name in names.split(", ")}


def trace_rows(index: int, run: Run) -> list[list]:
    """Rows of what report.html calls FIELDS. A group: the next `group` lines of the same step and problem."""
    rows, group, place, left = [], -1, None, 0
    for t in run.traces:
        if place != (t["step"], t.get("problem")) or not left:
            place, group, left = (t["step"], t.get("problem")), group + 1, run.settings.get("group", 1)
        left -= 1
        steps = t.get("advantages")  # one per "###" step; without it only the range over the trace is known
        rows.append([index, group, t["step"], str(t.get("problem")), str(t.get("text")),
                     [number(g) for g in t.get("grades") or []], t.get("correct"),
                     [number(a) for a in (steps or t.get("advantage") or [])], bool(steps),
                     t.get("finished", True), t.get("tokens", 0), shown(t.get("judge") or ""),
                     t.get("domain", "")])
    return rows


def problems_of(run: Run, named: set[str], notices: list[str]) -> dict[str, list[str]]:
    """{id: [question, solution, answer]} of the problems that traces name."""
    try:
        problems = load_problems(list(run.settings["data"]), need_answer=False, skip_bad_rows=True)
    except (ValueError, OSError, ImportError, KeyError) as error:
        notices.append(f"{run.name}: only the ids of its problems are shown, for its data cannot be read. "
                       f"Start this where the run was started, with the data in its place. {error}")
        return {}
    if run.settings[DATA] not in ("", fingerprint(problems)):
        notices.append(f"{run.name}: its data is not just what it trained on (edited since, or rows were "
                       "skipped or left out as too long): take the references with care.")
    return {p.id: [p.question, p.solution, p.answer] for p in problems if p.id in named}


def build(folders: list[Path], max_mb: float) -> dict:
    """All that the page shows, as plain JSON."""
    files = [folder / "rollouts.jsonl" for folder in folders]
    size = sum(file.stat().st_size for file in files if file.exists()) / 1e6
    stride, notices, problems, groups = max(math.ceil(size / max_mb), 1), [], {}, {}
    if stride > 1:
        notices.append(f"The traces take {size:.0f} MB, more than --max-mb {max_mb:g}: below stand those of "
                       f"every {stride}th step and of the last.")
    names = [folder.resolve().name for folder in folders]
    runs = [read_run(folder, name if names.count(name) == 1 else str(folder), stride, notices)
            for folder, name in zip(folders, names)]
    named = {t.get("problem") for run in runs for t in run.traces}
    made_on = {run.name: m["held_out"] for run in runs for m in run.metrics if "held_out" in m}
    if len({*made_on.values()}) > 1:
        different = "; ".join(f"{name}: {what}" for name, what in made_on.items())
        notices.append("These runs' pass@k do not compare, they were evaluated on different things. "
                       f"{different}.")
    for run in runs:
        same_but_seed = json.dumps(run.settings | {"seed": 0, "out": ""}, sort_keys=True)
        groups.setdefault(same_but_seed, []).append(run)
        if not problems.get(run.settings[DATA]):
            problems[run.settings[DATA]] = problems_of(run, named, notices)
    groups = list(groups.values())
    labels = [g[0].name + f" and {len(g) - 1} more" * (len(g) > 1) for g in groups]

    found = [key for key in dict.fromkeys(key for run in runs for m in run.metrics for key in m)
             if key != "step" and not key.endswith(("_low", "_high"))]
    found.sort(key=lambda key: 0 if key in ("score", "accuracy") else 1 if "pass@" in key else 2)
    ks, about = [key for key in found if "pass@" in key], glossary()
    return {
        "made": time.strftime("%Y-%m-%d %H:%M"), "notices": notices, "groups": labels, "ks": ks,
        "runs": [{"name": run.name, "step": run.step,
                  "settings": {k: shown(v) for k, v in run.settings.items()}} for run in runs],
        "heldOut": [held_out(part, label, i, ks) for i, g in enumerate(groups) for part, label in
                    [([run], run.name) for run in g] + [(g, f"mean of {labels[i]}")] * (len(g) > 1)],
        "curves": [{"name": name, "lines": lines,
                    "about": about.get("pass@k" if name in ks else name.split(" (")[0], "")}
                   for name in found if (lines := [{"group": i, **line} for i, g in enumerate(groups)
                                                   if (line := curve(g, name) or profile(g, name))])],
        "problems": problems, "traces": [row for i, run in enumerate(runs) for row in trace_rows(i, run)],
    }


def render(report: dict) -> bytes:
    """The template with the data in its script tag. "<" stands only inside JSON's strings; escaped there, no
    "</script>" or "<!--" of a trace ends or opens anything."""
    data = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    before, after = Path(__file__).with_suffix(".html").read_text().split("DATA")
    page = before + data.replace("<", "\\u003c") + after
    return page.encode("utf-8", "replace")  # half a surrogate pair has no UTF-8


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs (runs/NAME)")
    parser.add_argument("--out", type=Path, help="default: report.html in the first run's folder")
    parser.add_argument("--max-mb", type=float, default=60,
                        help="of traces; beyond it, those of every n-th step only (default: 60)")
    args = parser.parse_args(argv)
    args.runs = list(dict.fromkeys(args.runs))
    for folder in args.runs:
        try:
            sound = "settings" in json.loads((folder / "config.json").read_text())  # a model has one, too
        except (OSError, ValueError):
            sound = False
        if not sound:
            parser.error(f"{folder}: no config.json of a run there; name a run's folder")
    out = args.out or args.runs[0] / "report.html"
    if not args.max_mb > 0 or out.is_dir() or not out.parent.is_dir():
        parser.error(f"--max-mb {args.max_mb:g} must be above 0, and {out} a file in a folder that exists")
    tmp = out.with_name(out.name + ".tmp")
    tmp.write_bytes(render(build(args.runs, args.max_mb)))
    tmp.replace(out)  # an open page that is loaded again never meets half a file
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
