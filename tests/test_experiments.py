"""The comparison in miniature: it runs, goes on where it was stopped, and writes its table and figure."""

import csv

import tiny


def test_comparison_runs_resumes_and_reports(tmp_path):
    out = tmp_path / "comparison"
    command = ["experiments/miniature.py", "--methods", "base", "--seeds", 0, "--lr", 3e-4, "--steps2", 1]
    command += ["--questions", 2, "--problems", 2, "--splits", "eval", "--out", out]
    first = tiny.run(*command)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(r["stage"], r["method"], r["split"]) for r in rows] == [("I", "base", "eval"), ("II", "base", "eval")]
    assert "after Stage II, eval" in first.stdout and "<polyline" in (out / "curves.svg").read_text()
    made = (out / "runs/base-0-stage2/metrics.jsonl").stat().st_mtime_ns
    again = tiny.run(*command)  # nothing is run twice
    assert made == (out / "runs/base-0-stage2/metrics.jsonl").stat().st_mtime_ns and "base-0" not in again.stdout


def test_a_failing_run_stops_the_comparison_with_its_message(tmp_path):
    command = ["experiments/miniature.py", "--methods", "grpo", "--lr", "-1", "--out", str(tmp_path)]
    done = tiny.run(*command, check=False)
    assert done.returncode == 1 and "need --lr > 0" in done.stderr
