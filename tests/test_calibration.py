"""Calibration of judges: statistics against plain versions, probes, the program, the watch on a run."""

import csv
import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

import judge as judge_module
from data import Problem, is_correct, load_problems
from data import miniature as mini
from exprl import Settings, trace_metrics
from judge import (Judge, Verdict, auroc, calibrate, calibrate_prefixes, centred, continue_prefixes,
                   corr_in_groups, correlation, gain, gamed, last_line, probe, probe_traces,
                   read_traces, short_calibration, usable, with_reference)
from sample import load_lm

sys.path.append(str(tiny.ROOT / "experiments"))
import judge_wording  # noqa: E402


def test_auroc_against_pairs():
    rng = np.random.default_rng(0)
    scores, correct = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4
    wins = [(a > b) + 0.5 * (a == b) for a in scores[correct] for b in scores[~correct]]
    assert auroc(scores, correct) == pytest.approx(np.mean(wins))
    assert math.isnan(auroc(scores, np.ones(60, bool)))


class Stand:
    """Grades 5 when the trace's last word stands in the reference, else 1; unread when it is empty."""

    readout, no_reference, tokens = "expected", "(none)", 0

    def check_view(self, view):
        pass

    def grade(self, problems, traces, view="outcome"):
        self.tokens += 10 * len(traces)
        steps = [[t] if view == "outcome" else t for t in traces]
        return [Verdict(tuple(float(s.split()[-1] in p.solution) if s.strip() else math.nan for s in some))
                for p, some in zip(problems, steps)]


PROBLEMS = [Problem(f"p/{i}", f"q{i}", f"it is w{i}w", f"{i}", "math") for i in range(20)]
RECORDS = [{"problem": p.id, "text": f"so w{i if k else 99}w", "correct": bool(k)}
           for i, p in enumerate(PROBLEMS) for k in (0, 1)]


def test_calibration_tells_a_judge_that_uses_the_reference():
    right = calibrate(Stand(), PROBLEMS, RECORDS, "right")
    assert right["auroc"] == 1 and right["misplace"] == 0
    assert right["grade_correct"] == 5 and right["unread"] == 0
    assert right["reliability"][4] == {"grade": 5, "traces": 20, "correct": 1.0}
    assert right["reliability"][0] == {"grade": 1, "traces": 20, "correct": 0.0}
    assert right["at_ends"] == 1 and right["repeat_gap"] == 0 and right["tokens_per_grade"] == 10
    wrong = calibrate(Stand(), PROBLEMS, RECORDS, "wrong")
    assert wrong["auroc"] == calibrate(Stand(), PROBLEMS, RECORDS, "none")["auroc"] == 0.5
    assert usable(right, wrong)[0] == "usable"
    likely = right | {"readout": "likelihood"}
    assert usable(likely, wrong)[0] == "usable"
    assert usable(likely | {"grade_correct": 2.0}, wrong)[0] == "weak"  # right work hardly stands out
    word, reason = usable(right, right)  # as good with a wrong reference: it does not look at it
    assert word == "weak" and "reference" in reason
    assert usable(wrong)[0] == "noise"


def test_unread_grades_are_counted_and_left_out():
    records = [r | {"text": ""} if i % 4 == 0 else r for i, r in enumerate(RECORDS)]
    right = calibrate(Stand(), PROBLEMS, records, "right")
    assert right["unread"] == 0.25 and right["auroc"] == 1
    word, reason = usable(right)
    assert word == "noise" and "25% of its grades cannot be read; its logits are no numbers" in reason
    assert "try --readout expected" in usable(right | {"readout": "generate"})[1]


def test_a_short_context_is_named_as_the_cause():
    lm = tiny.model(context=2600), tiny.tokenizer()
    records = [r | {"text": r["text"] * (400 if r["correct"] else 1)} for r in RECORDS[:4]]
    for readout in ("expected", "critique"):
        row = calibrate(Judge(*lm, readout=readout, reply_tokens=4), PROBLEMS[:2], records, "right")
        assert row["too_long"] == 0.5
        assert "50% are longer than the judge's context: take a judge with more" in usable(row)[1]


def test_one_problem_has_no_wrong_reference():
    with pytest.raises(SystemExit, match="there is one problem: take more --data"):
        calibrate(Stand(), PROBLEMS[:1], RECORDS[:2], "wrong")
    word, reason = short_calibration(Stand(), PROBLEMS[:1], RECORDS[:2])
    assert word == "noise" and "from 1 problems" in reason and "no other's reference" in reason


def test_a_wrong_reference_has_another_answer():
    problems = [Problem(f"p/{i}", "q", f"s{i}", "AB"[i % 10 == 0], "choice") for i in range(40)]
    for seed in range(5):
        shown = with_reference(problems, "wrong", "", seed)
        assert all(shown[p.id].answer != p.answer for p in problems)
    alike = with_reference(problems[1:4], "wrong", "", 0)
    assert all(alike[p.id].solution != p.solution for p in problems[1:4])


def test_the_verdict_says_what_the_numbers_say():
    right = calibrate(Stand(), PROBLEMS, RECORDS, "right")
    below = right | {"auroc": 0.2, "auroc_low": 0.1, "auroc_high": 0.4}
    assert usable(below) == ("noise", "AUROC 0.20 (0.10 to 0.40): it ranks wrong traces first; try --readout "
                             "likelihood, or a larger judge")
    word, reason = usable(right, right | {"auroc": math.nan})
    assert word == "weak" and "cannot be read" in reason


def test_few_problems_tell_nothing():
    """A bootstrap over one problem has no width: grades at random would often pass."""
    for count, word in ((1, "noise"), (3, "noise"), (4, "usable")):
        asked = {p.id for p in PROBLEMS[:count]}
        row = calibrate(Stand(), PROBLEMS[:count], [r for r in RECORDS if r["problem"] in asked], "right")
        assert row["auroc"] == 1 and usable(row)[0] == word


def test_one_kind_of_traces_tells_nothing():
    row = calibrate(Stand(), PROBLEMS, [r for r in RECORDS if not r["correct"]], "right")
    assert math.isnan(row["auroc"]) and usable(row)[0] == "noise" and "sample more" in usable(row)[1]


def test_length_correlation_is_pearsons():
    a, b = np.array([1.0, 2, 4, 4]), np.array([2.0, 1, 5, 7])
    assert correlation(a, b) == pytest.approx(np.cov(a, b)[0, 1] / (a.std(ddof=1) * b.std(ddof=1)))
    assert math.isnan(correlation(a, np.ones(4)))


# ---- probes ----


def test_probes_are_what_they_say():
    problem = Problem("p/1", "How much is 12 + 8?", "12 + 8 = 20\n\\boxed{20}", "20", "math")
    right, wrong = "### Sum\n12 + 8 = 20\nSo \\boxed{20}.", "### Sum\n12 + 8 = 21\nSo \\boxed{21}."
    made = probe_traces(problem, right, wrong, np.random.default_rng(0))
    patched, = made["wrong work, right last line"]
    assert is_correct(patched, "20") and "21" in patched
    spoilt, = made["right work, wrong last line"]
    assert not is_correct(spoilt, "20") and "12 + 8 = 20" in spoilt
    copied, = made["the reference, one number changed"]
    assert copied == "12 + 8 = 21\n\\boxed{20}"
    assert made["the right answer alone"] == ["\\boxed{20}"] and made["empty"] == [""]
    for answer in ("\\boxed{20}", "$20$", "20."):
        again = probe_traces(replace(problem, answer=answer), right, wrong, np.random.default_rng(0))
        assert again == made
    assert len(made["very long noise"][0].split()) == 600 and len(made["grade 5, in many forms"]) > 4


def test_the_answer_starts_at_the_last_box():
    for text, rest in (("7 is right.\nSo \\boxed{7}.\nThat is all.", "\\boxed{7}.\nThat is all."),
                       ("one\nand 3\n", "and 3\n"), ("3", "3"), ("", "")):
        assert text[last_line(text):] == rest


def test_probes_of_an_answer_without_digits():
    problem = Problem("p/1", "Which planet?", "The hot one is Venus.\n\\boxed{A}", "A", "choice")
    right, wrong = "It is hot.\n\\boxed{A}", "It is cold.\n\\boxed{B}"
    made = probe_traces(problem, right, wrong, np.random.default_rng(0))
    assert not is_correct(made["right work, wrong last line"][0], "A")
    assert made["the reference, one number changed"] == []
    one_line = probe_traces(replace(problem, solution="3 + 4 = 7"), "x", "y", np.random.default_rng(0))
    assert one_line["the reference, one number changed"] == ["3 + 4 = 8"]


@pytest.fixture(scope="module")
def embedded():
    """The shipped judge; per problem of `dev` a right trace and one with a slip that spreads."""
    lm = load_lm(str(Path(mini.FOLDER) / "judge"))
    rng, problems = random.Random(3), load_problems(str(Path(mini.FOLDER) / "dev.jsonl"))[:16]
    records = []
    for p in problems:
        records += [{"problem": p.id, "text": mini.work(rng, p.question, 0), "correct": True},
                    {"problem": p.id, "text": mini.work(rng, p.question, 3), "correct": False}]
    return Judge(lm.model, lm.tokenizer, lm.prompts), problems, records


def test_no_probe_earns_an_honest_grade_from_the_embedded_judge(embedded):
    grades = probe(*embedded)
    honest = grades.pop("honest, right")
    assert honest > 4.7
    assert math.isnan(grades.pop("very long noise"))  # longer than its context: unread, so in no loss
    assert max(grades.values()) < honest - 0.3, grades


def test_the_embedded_judge_is_usable(embedded):
    assert short_calibration(*embedded)[0] == "usable"
    judge, problems, records = embedded
    wrong = [r for r in records if not r["correct"]]  # as at the start of a run: none right yet
    assert short_calibration(judge, problems, wrong)[0] == "usable"
    assert short_calibration(Noise(), problems, records)[0] == "noise"
    policy = load_lm(str(mini.FOLDER / "policy"))
    judge = Judge(policy.model, policy.tokenizer, policy.prompts, "likelihood")
    for some in (wrong, records):  # it ranks well, but right work does not stand out
        word, reason = short_calibration(judge, problems, some)
        assert word == "weak" and "hardly finds the reference's answer" in reason


class Noise(Stand):
    def grade(self, problems, traces, view="outcome"):
        return [Verdict((random.Random(t).random(),)) for t in traces]


def test_prefix_grades_against_continuations(embedded, capsys):
    """The shipped policy goes on from clean and from spoilt prefixes; the shipped judge tells them apart."""
    judge, problems, records = embedded
    policy = load_lm(str(Path(mini.FOLDER) / "policy"))
    some = [r for r in records if r["problem"] in {p.id for p in problems[:4]}]
    long = some[0] | {"text": "### a\n1" * 200}  # no room behind it: as if it were not there
    kept, steps, success = continue_prefixes(policy, problems, [long, *some], 4, 120, temperature=0.3)
    assert kept == some and "left out 1 of 9 traces with more than 392 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no trace is left.*lower --max-new-tokens"):
        continue_prefixes(policy, problems, [long], 4, 120)
    row = calibrate_prefixes(judge, problems, some, steps, success)
    assert row["prefixes"] == len(success) == sum(len(re.findall("###", r["text"])) for r in some)
    assert 0.1 < row["success"] < 0.9 and row["corr"] > 0.6 and row["corr_within"] > 0.6


# ---- the program ----


def test_program(tmp_path):
    folder, data = tiny.save(tmp_path / "m"), tiny.problems_file(tmp_path / "p.jsonl", 4)
    traces = tmp_path / "t.jsonl"
    traces.write_text("".join(
        json.dumps({"problem": p.id, "text": f"### a\n1\n### b\n{p.answer}{end}", "correct": not end}) + "\n"
        for p in load_problems(str(data)) for end in ("", "7")))
    done = tiny.run("judge.py", "--judge", folder, "--data", data, "--traces", traces, "--probes",
                    "--prefixes", 1, "--max-new-tokens", 4, "--out", tmp_path / "o.json")
    row, = json.loads((tmp_path / "o.json").read_text())["readouts"]
    assert [c["condition"] for c in row["conditions"]] == ["right", "none", "wrong"]
    assert row["verdict"] in ("usable", "weak", "noise") and f"verdict: {row['verdict']}" in done.stdout
    assert len(row["probes"]) == 12 and row["prefixes"]["prefixes"] == 16
    assert row["prefixes"]["continuations"] == 1
    assert "Qwen3-4B-Instruct-2507 18% / 39% / 50%" in done.stdout
    traces.write_text('{"problem": "elsewhere", "text": "", "correct": true}\n')
    bad = tiny.run("judge.py", "--judge", folder, "--data", data, "--traces", traces, check=False)
    assert bad.returncode and "t.jsonl:1" in bad.stderr and "--data" in bad.stderr


def test_traces_that_do_not_fit_are_named_by_file_and_line(tmp_path):
    path, good = tmp_path / "t.jsonl", json.dumps(RECORDS[0])
    path.write_text(f"{good}\n\n{good}\n")
    assert read_traces(path, PROBLEMS) == [RECORDS[0]] * 2
    bad = ({"correct": "false"}, {"correct": 0}, {"text": 7}, {"text": "half \ud800"}, {"problem": ["p/1"]})
    bad = ["{}", "[]", *(json.dumps(RECORDS[0] | wrong) for wrong in bad)]
    for content, message in (*((f"{good}\n\n{line}\n".encode(), "t.jsonl:3: not a trace") for line in bad),
                             (json.dumps(RECORDS[1] | {"problem": "p/3"}).encode(),
                              "t.jsonl:1: marked correct, but the answer of 'p/3' in --data is '3': write"),
                             (b"\xff\xfe weights", "can't decode"), (b"", "holds no trace")):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            read_traces(path, PROBLEMS)
    with pytest.raises(SystemExit, match="No such file or directory: write the file with"):
        read_traces(tmp_path / "none.jsonl", PROBLEMS)


def test_program_samples_its_own_traces(tmp_path):
    folder, data = tiny.save(tmp_path / "m"), tiny.problems_file(tmp_path / "p.jsonl", 6)
    tiny.run("judge.py", "--judge", folder, "--data", f"science={data}", "--n", 2, "--limit", 8,
             "--max-new-tokens", 4, "--conditions", "right", "--readout", "expected", "critique",
             "--out", tmp_path / "o.json")
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["traces"] == 8 and [r["readout"] for r in report["readouts"]] == ["expected", "critique"]
    assert len((tmp_path / "o.traces.jsonl").read_text().splitlines()) == 8
    assert not list(tmp_path.glob("*.partial"))
    done = tiny.run("judge.py", "--judge", folder, "--data", data, "--n", 2, "--limit", 2, "--readout",
                    "expected", "--max-new-tokens", 4)
    assert "2 traces of at most 4 tokens for each of 1 problems" in done.stdout
    assert "condition wrong is left out" in done.stdout


def test_a_stop_loses_no_condition_that_was_graded(tmp_path, monkeypatch):
    folder, data = tiny.save(tmp_path / "m"), tiny.problems_file(tmp_path / "p.jsonl", 3)
    asked = []

    def interrupted(judge, problems, records, condition, seed):
        asked.append(condition)
        if condition == "wrong":
            raise KeyboardInterrupt
        return calibrate(judge, problems, records, condition, seed)

    monkeypatch.setattr(judge_module, "calibrate", interrupted)
    monkeypatch.setattr(sys, "argv", ["judge.py", "--judge", str(folder), "--data", str(data), "--n", "2",
                                      "--max-new-tokens", "4", "--out", str(tmp_path / "o.json")])
    with pytest.raises(KeyboardInterrupt):
        judge_module.main()
    row, = json.loads((tmp_path / "o.json").read_text())["readouts"]
    assert asked == ["right", "none", "wrong"]
    assert [c["condition"] for c in row["conditions"]] == ["right", "none"]
    assert (tmp_path / "o.traces.jsonl.partial").read_text().count("\n") == 1 + 6  # none is sampled again


def test_a_judge_is_refused_before_any_trace_is_sampled(tmp_path):
    folder, data = tiny.save(tmp_path / "m"), tiny.problems_file(tmp_path / "p.jsonl", 3)
    own = {"system": {"outcome": "grade"}, "user": "{question}{reference}{trace}"}
    (folder / "prompts.json").write_text(json.dumps(own))
    done = tiny.run("judge.py", "--judge", folder, "--data", data, "--prefixes", 1, check=False)
    assert done.returncode and "does not know the view 'prefix'" in done.stderr
    assert "writes" not in done.stdout


# ---- the watch on a run ----


def test_correlation_within_groups():
    nan = math.nan
    scores = [0.9, 0.8, 0.1, 0.2,   0.5, 0.6, 0.7, 0.8,   0.0, nan, 0.4, 0.5]
    correct = [1, 1, 0, 0,   1, 1, 1, 1,   0, 1, 1, 0]
    a = np.array([0.4, 0.3, -0.4, -0.3, -0.3, 0.1, 0.2])
    b = np.array([0.5, 0.5, -0.5, -0.5, -1 / 3, 2 / 3, -1 / 3])
    assert corr_in_groups(scores, correct, 4) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert corr_in_groups(scores[4:8], correct[4:8], 4) is None  # all right: nothing to rank


def test_alarm_when_the_score_rises_and_accuracy_falls():
    rng = np.random.default_rng(0)

    def run(score, accuracy, steps=20):
        return [{"score": 0.5 + score * i + 0.01 * rng.normal(), "accuracy": 0.3 + accuracy * i
                 + 0.01 * rng.normal()} for i in range(steps)]

    assert gamed(run(0.01, -0.01)) and gamed(run(0, 0) + run(0.01, -0.01))
    assert not gamed(run(0.01, 0.01)) and not gamed(run(-0.01, -0.01)) and not gamed(run(0, 0))
    assert not gamed(run(0.01, -0.01, 19))  # not yet enough steps
    assert not gamed([m | {"score": None} for m in run(0.01, -0.01)])


def test_a_step_reports_its_domains_and_how_the_judge_agrees():
    settings = Settings(group=2)

    def record(domain, grade, correct, finished=True):
        return {"domain": domain, "grades": [grade], "correct": correct, "finished": finished, "text": "",
                "tokens": 1, "advantage": [0.0, 1.0], "judge": ""}

    records = [record("math", 1.0, True), record("math", 0.5, False), record("science", 0.2, False),
               record("science", None, True), record("math", 0.9, True), record("math", 0.0, False, False)]
    metrics = trace_metrics(settings, records)
    assert metrics["domains"] == {"math": {"score": pytest.approx(0.6), "accuracy": 0.5},
                                  "science": {"score": pytest.approx(0.2), "accuracy": 0.5}}
    assert metrics["judge_corr"] == pytest.approx(1.0)  # of the first problem alone: unread, cut off
    assert "domains" not in trace_metrics(settings, records[:2])


def test_the_wording_search_reads_every_variant(tmp_path, monkeypatch):
    """Each variant gives one number a trace, the conclusion as judge.py's readout reads the final answer."""
    lm = load_lm(str(tiny.save(tmp_path / "m")))
    problem = Problem("p/1", "Ann has 3 bags of 6 eggs.", "She has 3*6 = 18 eggs, 18/2 = 9 each.\n\\boxed{9}",
                      "9", "math")
    records = [{"problem": "p/1", "text": t, "correct": False} for t in ("3*6 = 18 so 18", "no idea", "")]
    assert [judge_wording.progress(problem, r["text"]) for r in records] == [1, 0, 0]
    sampler = judge_wording.Sampler(lm.model)
    for variant in judge_wording.VARIANTS:
        (read,), = judge_wording.readings(lm, sampler, [variant], [{"p/1": problem}], records)
        assert len(read) == 3 and np.isfinite(read).all() and read[0] != read[1]
        if variant == "conclusion":
            judge = Judge(lm.model, lm.tokenizer, readout="likelihood")
            monkeypatch.setattr(judge_module, "checkpoints", lambda solution: [])
            given = judge.grade([problem] * 3, [r["text"] for r in records])
            *likelihoods, without = np.exp(read)
            want = [gain(s, without) for s in likelihoods]
            assert [v.grades[0] for v in given] == pytest.approx([*want, 0], abs=1e-5)
            monkeypatch.undo()


def test_the_wording_search_as_a_program(tmp_path, monkeypatch):
    folder, data = tiny.save(tmp_path / "m"), tiny.problems_file(tmp_path / "p.jsonl", 3)
    traces, table = tmp_path / "t.jsonl", tmp_path / "w.csv"
    records = [{"problem": f"p/{i}", "text": f"that is {i + k - 2}", "correct": i == k, "finished": True}
               for i in (1, 2, 3) for k in (1, 2, 3)]
    traces.write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = ["--judge", folder, "--data", data, "--traces", traces, "--variants", "conclusion",
             "--readouts", "likelihood", "--csv", table]
    monkeypatch.setattr(sys, "argv", ["judge_wording.py", *map(str, flags)])
    judge_wording.main()
    rows = list(csv.DictReader(table.open()))
    assert [(r["variant"], r["reference"]) for r in rows] == [
        (name, reference) for name in ("conclusion", "readout likelihood")
        for reference in ("right", "wrong", "both")]
    assert all(r["traces"] == "9" and r["right"] == "3" and 0 <= float(r["auroc"]) <= 1 for r in rows)


def test_centred_takes_off_each_problems_mean():
    x, y = centred(np.array(["a", "b", "a"]), np.array([1.0, 5.0, 3.0]), np.array([0.0, 2.0, 0.0]))
    assert x.tolist() == [-1, 0, 1] and y.tolist() == [0, 0, 0]
