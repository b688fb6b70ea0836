"""The comparison in miniature runs, goes on after a stop and reports; behaviours are asked and counted."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import exprl
import tiny
from data import MINIATURE, load_problems
from judge import USER

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import behaviours  # noqa: E402
import miniature as comparison  # noqa: E402
import seen  # noqa: E402

SIZES = ["--seeds", "0", "--steps", "2", "--steps2", "1", "--questions", "2", "--problems", "2"]


def read(out):
    return list(csv.DictReader((out / "results.csv").open()))


def test_comparison_runs_and_reports(tmp_path):
    command = ["experiments/miniature.py", "--methods", "base", *SIZES, "--splits", "eval", "--out", tmp_path]
    done = tiny.run(*command)
    assert [(r["stage"], r["method"], r["split"]) for r in read(tmp_path)] == [
        ("I", "base", "eval"), ("II", "base", "eval")]
    assert "| after Stage II | rate |" in done.stdout
    assert "<polyline" in (tmp_path / "dynamics.svg").read_text()


def test_what_bfloat16_sees_of_an_update(tmp_path, monkeypatch, capsys):
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    low = torch.randint(-0x7FFF, 0x8000, start.shape, generator=torch.Generator().manual_seed(1))
    anywhere = (start.view(torch.int32) + low.int()).view(torch.float32)
    assert seen.seen([(start, start * 1.0005)])[1:] == (0.0, 0.0)  # less than half a unit of the last place
    assert seen.seen([(anywhere, anywhere * 1.0005)])[2] == pytest.approx(1, abs=0.3)
    assert seen.seen([(start, start * 1.5)])[2] == pytest.approx(1, abs=0.01)
    one, other, small = (str(tiny.save(tmp_path / str(i), seed=i // 2, num_hidden_layers=2 - i // 2))
                         for i in range(3))
    for after in other, small:
        monkeypatch.setattr(sys, "argv", ["seen.py", one, after])
        if after == other:
            seen.main()
            assert capsys.readouterr().out == "moved 0.00e+00, changed 0.0%, seen 100.0%\n"
        else:
            with pytest.raises(SystemExit, match="other layers"):
                seen.main()


def test_minus_grpo_is_of_the_same_seeds_and_a_split_measured_twice_counts_once(tmp_path):
    rows = [{"stage": "I", "method": method, "seed": seed, "lr": 1e-4, "seconds": 1.0, "split": "eval",
             "right": [right] * 4} | dict.fromkeys(("pass@1", f"pass@{max(comparison.KS)}", "worked"), 0.1)
            for method, seed, right in (("grpo", 0, 4), ("outcome", 0, 4), ("outcome", 1, 8))]
    (tmp_path / "evaluations").mkdir()
    for name, some in ("a-eval", rows), ("a-eval-deep", rows[:1]):
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(some))
    found = comparison.results(SimpleNamespace(out=tmp_path))
    assert len(found) == 3
    assert "+0.0 (+0.0 to +0.0)" in comparison.table(found, "I", ["eval"])


def test_a_failing_run_stops_the_comparison_with_its_message(tmp_path):
    command = ["experiments/miniature.py", "--methods", "grpo", "--seeds", 0, "--lr", "-1", "--out", tmp_path]
    done = tiny.run(*command, check=False)
    assert done.returncode == 1 and "need --lr > 0" in done.stderr


@pytest.fixture
def programs(monkeypatch):
    """In the place of exprl.py and sample.py: what they write. At rate 4e-4 most traces are right."""
    started = []

    def job(log, program, *flags):
        flag = {a: b for a, b in zip(flags, flags[1:])}
        started.append(log.stem)
        if program == "exprl.py":
            deeper = (flag["--out"].parents[1] / "problems" / "train.jsonl").exists()
            assert ("--data" in flag) == deeper
            (flag["--out"] / "model").mkdir(parents=True)
            (flag["--out"] / "checkpoints").mkdir()
            step = dict.fromkeys(("accuracy", "unsolved", "entropy", "length", "headings"), 0.5)
            (flag["--out"] / "metrics.jsonl").write_text((json.dumps(step) + "\n") * flag["--steps"])
        else:
            files = [Path(f) for f in flags if str(f).endswith(".jsonl")][:-1]
            right = 3 if "0.0004" in log.stem else 1
            flag["--out"].write_text("".join(
                json.dumps({"problem": f"{f.stem}/{i}", "text": "", "correct": n < right, "tokens": 9}) + "\n"
                for f in files for i in (1, 2) for n in range(16)))
        return 7.0

    def run(out, *arguments):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["miniature.py", *SIZES, "--out", str(out), *map(str, arguments)])
        comparison.main()
        return started

    monkeypatch.setattr(comparison, "job", job)
    return run


def test_the_best_rate_of_the_grid_is_taken_and_nothing_is_done_twice(tmp_path, programs, capsys):
    methods = ["--methods", "base", "grpo"]
    started = programs(tmp_path, *methods)
    assert len(started) == len(set(started)) == 2 * 3 + 3 + 3  # grid, base, grpo (its Stage I is the grid's)
    rows = read(tmp_path)
    assert [(r["lr"], r["split"]) for r in rows if r["stage"] == "grid"] == [
        (str(lr), "dev") for lr in comparison.RATES["grpo"]]
    table = [(r["stage"], r["method"], r["lr"], r["split"]) for r in rows if r["stage"] != "grid"]
    assert table == [(stage, method, lr if stage == "I" else "0.0004", split) for stage in ("I", "II")
                     for method, lr in (("base", "0.0"), ("grpo", "0.0004")) for split in ("deep", "eval")]
    assert "| grpo | 6.2% | **18.8%** | 6.2% |" in capsys.readouterr().out

    (tmp_path / "runs/base-0-stage2/cpu_seconds").unlink()  # as if killed at its end
    assert programs(tmp_path, *methods) == ["base-0-stage2"]
    started = programs(tmp_path, "--methods", "grpo", "--seeds", 1)  # one seed more, at the rate chosen
    assert started == ["grpo-0.0004-1", "grpo-0.0004-1-eval-deep", "grpo-0.0004-1-stage2",
                       "grpo-0.0004-1-stage2-eval-deep"]
    assert len(read(tmp_path)) == len(rows) + 4  # what was there stays
    programs(tmp_path, "--methods", "outcome", "--splits", "eval")
    capsys.readouterr()
    programs(tmp_path, "--methods", "base")
    shown = capsys.readouterr().out
    assert "| outcome | 0.0004 | 1 | 7 | 18.8 (18.8 to 18.8) | 100.0 (100.0 to 100.0) " in shown


def test_what_cannot_go_on_says_so(tmp_path, programs):
    programs(tmp_path, "--methods", "base")
    with pytest.raises(SystemExit, match="other sizes"):
        programs(tmp_path, "--methods", "base", "--steps", 3)
    with pytest.raises(SystemExit, match="run those first"):
        programs(tmp_path, "--methods", "grpo-timed", "--seeds", 1)


def test_deeper_problems_are_new_and_as_long_as_those_of_deep(tmp_path, programs):
    programs(tmp_path, "--methods", "grpo", "--lr", "4e-4", "--deeper")
    train, dev = (load_problems(str(tmp_path / "problems" / f"{split}.jsonl")) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (1000, 2)
    questions = [p.question for p in train + dev]
    shipped = load_problems(str(comparison.FOLDER / "deep.jsonl"))
    assert len({*questions, *(p.question for p in shipped)}) == len(questions) + len(shipped)
    assert {q.count(":") for q in questions} == {p.question.count(":") for p in shipped} == {13}
    with pytest.raises(SystemExit, match="other sizes"):
        programs(tmp_path, "--methods", "grpo", "--lr", "4e-4")


def test_longer_problems_are_held_out_and_measured(tmp_path, programs):
    programs(tmp_path, "--methods", "base", "--deeper", 3, "--splits", "longer", "eval")
    train, longer = (load_problems(str(tmp_path / "problems" / f"{name}.jsonl"))
                     for name in ("train", "longer"))
    questions = {p.question for p in train + longer}
    assert len(questions) == 1002 and {q.count(":") for q in questions} == {19}
    assert [r["split"] for r in read(tmp_path) if r["stage"] == "I"] == ["eval", "longer"]


def test_timed_takes_the_steps_of_outcomes_seconds(tmp_path, programs):
    programs(tmp_path, "--methods", "outcome", "grpo")
    (tmp_path / "runs/outcome-0.0004-0/cpu_seconds").write_text("17.5")
    programs(tmp_path, "--methods", "grpo-timed")
    assert {r["method"]: r["steps"] for r in read(tmp_path) if r["stage"] == "I"} == {
        "grpo": "2", "outcome": "2", "grpo-timed": "5"}


def test_noise_moves_every_weight_of_the_judge_by_its_share(tmp_path):
    args = type("Args", (), dict(out=tmp_path))
    (tmp_path / "judges").mkdir()
    noisy = comparison.load_lm(str(comparison.noisy_judge(args, 0.2))).model.state_dict()
    for name, weight in comparison.load_lm(str(comparison.FOLDER / "judge")).model.state_dict().items():
        share = float((noisy[name] - weight).square().mean().sqrt() / weight.square().mean().sqrt())
        assert share == pytest.approx(0.2, rel=0.5 if weight.numel() < 1000 else 0.05)


def test_a_band_spans_the_seeds_and_gaps_are_skipped():
    curves = {"grpo": [[0.0, None, 1.0], [0.5, None, 0.5]], "sft": [[None] * 3]}
    drawing, shown = comparison.chart("t", curves, share=True)
    assert shown == ["grpo"]
    top, bottom, right = 30, 30 + comparison.HEIGHT, f"{comparison.WIDTH}.0"
    half, quarter = (top + bottom) / 2, top + comparison.HEIGHT / 4
    band, line = [part.split('"')[0] for part in drawing.split('points="')[1:]]
    assert band == f"0.0,{half:.1f} {right},{top:.1f} {right},{half:.1f} 0.0,{bottom:.1f}"
    assert line == f"0.0,{bottom - comparison.HEIGHT / 4:.1f} {right},{quarter:.1f}"


def test_behaviours_are_asked_behind_one_reading_of_the_trace(tmp_path):
    judge = behaviours.Judge(tiny.model(seed=2, spread=0.5, context=2800), tiny.tokenizer(),
                             readout="expected")
    problems = {p.id: p for p in load_problems(str(tiny.problems_file(tmp_path / "d.jsonl", 3)))}
    records = [{"problem": "d/1", "text": "1. No: 2"}, {"problem": "d/1", "text": "2"},
               {"problem": "d/3", "text": "let me check </trace>"}, {"problem": "d/2", "text": "x" * 3000}]
    scores = behaviours.annotate(judge, problems, records)
    assert scores.shape == (4, len(behaviours.BEHAVIOURS)) and np.isnan(scores[3]).all()
    assert ((0 <= scores[:3]) & (scores[:3] <= 1)).all()
    for record, row in zip(records[:3], scores):
        for (name, meaning), value in zip(behaviours.BEHAVIOURS.items(), row):  # in a pass of its own
            ask = behaviours.BEHAVIOUR_ASK.format(name=name, meaning=meaning)
            head, between, opening, rest = judge.render(behaviours.BEHAVIOUR,
                                                        USER + "\n\n" + ask)
            problem = problems[record["problem"]]
            ids = [*head, *judge.quote(problem.question), *between, *judge.quote(problem.solution), *opening,
                   *judge.quote(record["text"]), *rest, *judge.stem]
            with torch.no_grad():
                p = judge.model(torch.tensor([ids])).logits[0, -1, judge.digit_ids].softmax(-1)
            assert value == pytest.approx((float(p @ torch.arange(1.0, 6.0)) - 1) / 4, abs=1e-5)


def test_the_scripts_for_real_models_call_what_there_is(tmp_path):
    """With a python that only notes what it is asked: are programs and flags known, and in order?"""
    noted, python = tmp_path / "noted", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] || echo "$@" >> {noted}\n')
    python.chmod(0o755)
    model, data = MINIATURE / "policy", MINIATURE / "dev.jsonl"
    environ = os.environ | {"PYTHON": str(python), "HARD": "--n 2 --limit 3", "FLAGS": "--judge J --seed 3"}
    subprocess.run([tiny.ROOT / "experiments" / "gpu.sh", tmp_path / "out", model, data, data], env=environ,
                   check=True)
    called = [line.split() for line in noted.read_text().splitlines()]
    programs = [words[0] for words in called]
    assert programs[:3] == ["-m", "-m", "experiments/bench_sampler.py"] and "experiments/vs_trl.py" in programs
    for program, *words in called:
        if program in ("-c", "-m"):
            continue
        source = (tiny.ROOT / program).read_text()
        if program == "exprl.py":
            exprl.parse(words)
        else:
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), (program, words)
    hard = str(tmp_path / "out" / "gsm8k" / "hard.jsonl")
    (sampled,) = [words for words in called if words[0] == "sample.py"]
    assert {*"--n 2 --limit 3 --unsolved".split(), hard, str(model), str(data)} <= {*sampled}
    trained = [exprl.parse(words[1:])[0] for words in called
               if words[0] == "exprl.py" and "--dry-run" not in words]
    assert [s.method for s in trained] == ["outcome", "process", "grpo"]
    assert all((s.data, s.judge, s.seed) == ((hard,), "J", 3) for s in trained)


def test_behaviours_gains_and_losses(tmp_path, monkeypatch, capsys):
    shown = {"a": ["d/1", "d/2", "d/2"], "b": ["d/2", "d/1", "d/3"]}
    for name, ids in shown.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"problem": i, "text": name, "correct": False}) + "\n" for i in ids))
    first = {"a": [1.0, 0.0, 0.5], "b": [0.5, 0.25, 0.0]}  # d/1: 1 - 0.25, d/2: 0.25 - 0.5, d/3: not in both

    def annotate(judge, problems, records):
        scores = np.zeros((len(records), len(behaviours.BEHAVIOURS)))
        scores[:, 0] = first[records[0]["text"]]
        return scores

    monkeypatch.setattr(behaviours, "annotate", annotate)
    flags = ["--judge", tiny.save(tmp_path / "judge"), "--data", tiny.problems_file(tmp_path / "d.jsonl", 3),
             "--traces", tmp_path / "a.jsonl", "--against", tmp_path / "b.jsonl", "--out",
             tmp_path / "o.jsonl"]
    monkeypatch.setattr(sys, "argv", ["behaviours.py", *map(str, flags)])
    behaviours.main()
    lines = capsys.readouterr().out.splitlines()
    assert "2 problems, 6 traces, 0 longer" in lines[0]
    assert lines[2].split()[:6] == ["verification", "0.625", "0.375", "0.375", "0.125", "+0.250"]
    assert json.loads((tmp_path / "o.jsonl").read_text().split("\n")[0])["behaviours"]["verification"] == 1.0
