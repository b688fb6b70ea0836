"""The embedded miniature: task, language, rubric, and the two shipped models. About 25 s on one free core."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Problem, is_correct, load_problems
from data import miniature as mini
from judge import Judge
from sample import Sampler, load_lm

FOLDER = Path(mini.FOLDER)


def solve(question: str) -> dict[str, int]:
    """All values of a question, computed without the module under test."""
    values: dict[str, int] = {}
    for name, right in re.findall(r"([a-z])[=:]([^;?]+)", question):
        values[name] = eval(re.sub(r"\b0(\d)", r"\1", right), {}, values) % 100
    return values


def problem_of(row) -> Problem:
    return Problem("", row.question, row.solution, row.answer, "math")


def example() -> Problem:
    """A problem by hand: c = 7, d = 10, e = 30; d and e are asked for."""
    return Problem("", "a=04; b=10; c:a+3; d:c+3; e:b*3? d e",
                   "1) c=07\n2) d=10\n3) e=30\n\\boxed{d=10,e=30}", "d=10,e=30", "math")


STEP_C, STEP_D, STEP_E = "### c\na=04+3 c=07\n", "### d\nc=07+3 d=10\n", "### e\nb=10*3 e=30\n"
RIGHT = STEP_C + STEP_D + STEP_E + "\\boxed{d=10,e=30}"


# ---- task ----


@pytest.mark.parametrize("depths", [(1,), (2, 4), mini.HARD, mini.DEEP])
def test_answers_and_references_hold(depths):
    rng = random.Random(1)
    for _ in range(200):
        problem = mini.make_problem(rng, depths)
        values = solve(problem.question)
        asked = problem.question.split("? ")[1].split()
        assert problem.answer == ",".join(f"{n}={values[n]:02d}" for n in asked)
        checks = mini.CHECK.findall(problem.solution)
        assert 1 <= len(checks) <= mini.MAX_CHECKS and all(int(v) == values[n] for n, v in checks)
        assert set(asked) <= {n for n, _ in checks}
        assert is_correct(problem.solution, problem.answer)
        for name, source in re.findall(r"([a-z]):([a-z])", problem.question):
            assert values[name] != values[source]  # so that a skipped step is always wrong
        right = mini.work(rng, problem.question, errors=0)
        assert mini.worked(problem, right) and is_correct(right, problem.answer)


def test_one_wrong_step_never_ends_in_the_right_answer():
    rng = random.Random(2)
    for _ in range(300):
        problem = mini.make_problem(rng)
        text = mini.work(rng, problem.question, forced={rng.randrange(10): "skip"})
        assert not mini.worked(problem, text) and not is_correct(text, problem.answer)


def test_habits_strike_as_often_as_stated():
    rng, steps, right = random.Random(3), 0, 0
    for _ in range(500):
        problem = mini.make_problem(rng, (1, 1, 1))
        for name, source, value, op, operand, _, result in mini.STEP.findall(
            mini.work(rng, problem.question)
        ):
            due = re.search(rf"{name}:([a-z])", problem.question)[1]
            literal = {n: v for n, v in re.findall(r"([a-z])=(\d\d)", problem.question)}
            steps += 1
            right += source == due and f"{mini.compute(int(literal[due]), op, int(operand)):02d}" == result
    share = 1 - sum(mini.HABITS.values()) + mini.HABITS["stop"]  # a stop leaves no step
    assert abs(right / steps - share) < 0.05


def test_worked_needs_every_step():
    problem = example()
    assert mini.worked(problem, RIGHT)
    assert mini.worked(problem, STEP_E + RIGHT.replace(STEP_E, ""))  # another valid order
    assert not mini.worked(problem, RIGHT.replace(STEP_D, ""))  # a step missing
    assert not mini.worked(problem, RIGHT.replace("c=07", "c=08"))  # a wrong value on the way
    assert not mini.worked(problem, RIGHT.replace("### d", "### q"))  # a wrong heading
    assert not mini.worked(problem, RIGHT.replace("{d=10", "{d=11"))
    assert not mini.worked(problem, "\\boxed{d=10,e=30}") and not mini.worked(problem, "")


def test_shipped_splits_share_no_question_and_are_remade_from_the_seed(tmp_path, monkeypatch):
    shipped = {split: (FOLDER / f"{split}.jsonl").read_text() for split in mini.SPLITS}
    questions = [json.loads(line)["question"] for text in shipped.values() for line in text.splitlines()]
    assert len(questions) == len(set(questions)) == sum(count for count, _ in mini.SPLITS.values())
    monkeypatch.setattr(mini, "FOLDER", tmp_path)
    mini.make_data(seed=0)
    for split, text in shipped.items():
        assert (tmp_path / f"{split}.jsonl").read_text() == text
        assert len(load_problems(str(tmp_path / f"{split}.jsonl"))) == mini.SPLITS[split][0]


# ---- language ----


@pytest.fixture(scope="module")
def tokenizer():
    return mini.make_tokenizer()


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from(mini.WORDS), max_size=60))
def test_its_own_language_survives_the_round_trip(tokenizer, words):
    text = "".join(words)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text and ids == mini.encode(text)
    assert tokenizer.unk_token_id not in ids


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=40) | st.sampled_from(["<|trace|>", "<|end|>x<|system|>", "Score: 5", "\\boxed{١}"])
)
def test_any_text_is_encoded_and_special_tokens_in_it_are_not_recognised(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ids == mini.encode(text)  # what is not of the language is dropped
    assert not set(ids) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def test_chat_template_and_segments(tokenizer):
    """A prompt encoded whole equals its pieces encoded one by one: the judge quotes contents apart."""
    problem = mini.make_problem(random.Random(4))
    for messages in (
        [{"role": "user", "content": problem.question}],
        [{"role": "system", "content": ""}, {"role": "user", "content": problem.question}],
    ):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == [
            mini.ID["<|user|>"],
            *mini.encode(problem.question),
            mini.ID["<|end|>"],
            mini.ID["<|assistant|>"],
        ]
    user = mini.JUDGE_PROMPTS["user"].format(
        question=problem.question, reference=problem.solution, trace=RIGHT
    )
    whole = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": mini.JUDGE_PROMPTS["system"]["outcome"]},
            {"role": "user", "content": user},
        ],
        add_generation_prompt=True,
        return_dict=False,
    )
    judge = Judge(torch_model(), tokenizer, mini.JUDGE_PROMPTS)
    before, after = judge.prompt(problem_of(problem))
    assert whole == before + judge.quote(RIGHT) + after


def test_training_rows_are_the_exchange_that_the_judge_has(tokenizer):
    judge = Judge(torch_model(), tokenizer, mini.JUDGE_PROMPTS)
    for seed in range(30):
        rng = random.Random(seed)
        problem = mini.make_problem(rng)
        trace = mini.some_trace(rng, problem)
        for view, rubric in mini.GRADES.items():
            ids, targets, weights = mini.judge_prompt(view, problem.question, problem.solution, trace)
            before, after = judge.prompt(problem_of(problem), view)
            written = mini.encode(mini.critique(view, problem.solution, trace))
            grade = judge.digit_ids[rubric(problem.solution, trace) - 1]
            assert ids == before + judge.quote(trace) + after + written + judge.stem + [grade]
            reply = [target for target, weight in zip(targets, weights) if weight]
            assert reply == written + judge.stem + [grade, mini.ID["<|end|>"]]


def test_the_longest_critique_and_exchange_fit():
    """A critique cut by its limit would grade exactly the complete traces wrong."""
    rng, longest = random.Random(6), 0
    for _ in range(300):
        problem = mini.make_problem(rng, mini.DEEP)
        right = mini.work(rng, problem.question, 0)
        written = mini.encode(mini.critique("outcome", problem.solution, right))
        longest = max(longest, len(written))
        assert len(written) + 3 <= mini.JUDGE_PROMPTS["critique_tokens"]  # and stem, grade, end token
        ids = mini.judge_prompt("outcome", problem.question, problem.solution, right)[0]
        assert len(ids) + 64 <= 512  # traces may be that much longer than right ones
    assert longest > 0.8 * mini.JUDGE_PROMPTS["critique_tokens"]  # the case was met


def torch_model():
    torch.manual_seed(0)
    return mini.make_model(16, 1, 1, 16)


# ---- rubric ----


@pytest.mark.parametrize(
    ("trace", "outcome", "prefix"),
    [
        (RIGHT, 5, 5),
        (STEP_C + STEP_D + STEP_E, 4, 5),  # not boxed yet
        (RIGHT.replace("{d=10", "{d=11"), 3, 1),  # the box contradicts a checkpoint, whatever the steps say
        (RIGHT.replace("{d=10,", "{"), 4, 1),  # the box is not complete
        (RIGHT.replace("c=07", "c=08"), 3, 1),  # one of three checkpoints
        (STEP_C, 2, 5),
        (STEP_C.replace("7", "8"), 1, 1),
        (STEP_E.replace("30", "31"), 1, 5),  # checkpoints are taken in order, and c has not been stated yet
        ("### c\na=04+3 c=08\n### e\nb=10*3 e=31\n\\boxed{d=00,e=31}", 1, 1),
        (STEP_C + "\\boxed{d=07,e=10}", 2, 1),  # stopped early
        (STEP_C + "\\boxed{}", 2, 1),  # what is missing counts once the trace is boxed
        (RIGHT + " c=08", 3, 1),  # stated twice, differently: does not count
        ("\\boxed{d=10,e=30}", 3, 1),
        ("", 1, 5),
    ],
)
def test_rubric_by_hand(trace, outcome, prefix):
    assert mini.outcome_grade(example().solution, trace) == outcome
    assert mini.prefix_grade(example().solution, trace) == prefix
    assert mini.outcome_grade("", trace) == mini.prefix_grade("", trace) == 1


@pytest.mark.parametrize(
    ("step", "grade"),
    [(STEP_C, 5), (STEP_D, 5), ("### f\nb=10*2 f=20\n", 3), ("", 3), (STEP_C.replace("7", "8"), 1),
     (STEP_D.replace("10", "11"), 1),  # c agrees, d does not
     ("### f\nb=10*2 f=20\n\\boxed{d=10,e=31}", 1), ("\\boxed{d=10,e=30}", 5)],
)
def test_segment_rubric_by_hand(step, grade):
    assert mini.segment_grade(example().solution, step) == grade
    assert mini.segment_grade("", step) == 1


# ---- the shipped models ----


@pytest.fixture(scope="module")
def policy():
    return load_lm(str(FOLDER / "policy"))


@pytest.fixture(scope="module")
def judge():
    lm = load_lm(str(FOLDER / "judge"))
    return Judge(lm.model, lm.tokenizer, lm.prompts)


def test_folders_hold_what_the_generator_says(policy, judge, tokenizer):
    assert policy.prompts == mini.POLICY_PROMPTS
    assert json.loads((FOLDER / "judge/prompts.json").read_text()) == mini.JUDGE_PROMPTS
    for tok in (policy.tokenizer, judge.tokenizer):
        assert tok.get_vocab() == tokenizer.get_vocab() and tok.chat_template == tokenizer.chat_template


def test_policy_knows_but_fails(policy):
    """Greedy it is nearly always right; sampled it rarely is: bad habits, not gaps in skill."""
    problems = load_problems(str(FOLDER / "dev.jsonl"))[:40]
    prompts = [policy.chat(p.question) for p in problems]
    for temperature, low, high in ((0.0, 0.6, 1.0), (1.0, 0.0, 0.1)):
        rollouts = Sampler(policy.model).sample(prompts, 1, 160, temperature, seed=0)
        assert all(r.finished for r in rollouts)
        right = sum(mini.worked(p, policy.text(r.token_ids)) for p, r in zip(problems, rollouts)) / len(
            problems
        )
        assert low <= right <= high


def test_judge_grades_by_hand(judge):
    rng = random.Random(5)
    problems = load_problems(str(FOLDER / "dev.jsonl"))[:12]

    def mean_grade(trace_of, problems=problems, other=None):
        asked = [problem_of(other or p) for p in problems]
        verdicts = judge.grade(asked, [trace_of(p) for p in problems])
        return 1 + 4 * sum(v.grades[0] for v in verdicts) / len(verdicts)

    def right(p):
        return mini.work(rng, p.question, 0)

    def half(p):
        return "".join(mini.ONE_STEP.findall(right(p))[:5])

    def stopped(p):
        return mini.work(rng, p.question, forced={1: "stop"})

    deep = load_problems(str(FOLDER / "deep.jsonl"))[:48]
    assert mean_grade(right) > 4.7
    assert mean_grade(right, deep) > 4.7  # the longest traces
    assert mean_grade(right, other=mini.make_problem(rng)) < 2  # a wrong reference
    assert mean_grade(lambda p: "") < 1.3
    assert mean_grade(lambda p: p.question) < 1.5
    assert mean_grade(half) < 4
    assert mean_grade(stopped) < 3
    assert mean_grade(lambda p: mini.work(rng, p.question, 3)) < 2.2


def test_judge_values_prefixes_by_hand(judge):
    """High while nothing is contradicted, lower after an error, on whole steps."""
    rng = random.Random(8)
    problems = [problem_of(mini.make_problem(rng, mini.HARD)) for _ in range(12)]

    def grades(trace_of):
        steps = [re.split(r"(?=###)", trace_of(p))[1:] for p in problems]
        return [v.grades for v in judge.grade(problems, steps, "prefix")]

    clean = grades(lambda p: mini.work(rng, p.question, 0))
    spoilt = grades(lambda p: mini.work(rng, p.question, forced={2: "slip", 3: "slip", 4: "slip"}))
    assert all(len(g) == 10 for g in clean + spoilt)
    mean_clean = [1 + 4 * sum(g[k] for g in clean) / 12 for k in range(10)]
    assert min(mean_clean) > 4
    assert 1 + 4 * sum(g[-1] for g in spoilt) / 12 < 2.5 < 1 + 4 * sum(g[1] for g in spoilt) / 12


def test_judge_grades_lone_steps_by_hand(judge):
    """A step that states a checkpoint right, none, or one wrong."""
    rng, asked = random.Random(9), {"+": [], "?": [], "-": []}
    for _ in range(12):
        problem = mini.make_problem(rng, mini.HARD)
        steps = re.split(r"(?=###)", mini.work(rng, problem.question, 0).partition("\\boxed")[0])[1:]
        graded = {mini.segment_grade(problem.solution, step): step for step in steps}
        for mark, step in (("+", graded.get(5)), ("?", graded.get(3))):
            if step:
                asked[mark].append((problem, step))
        name = mini.CHECK.findall(problem.solution)[0][0]
        asked["-"].append((problem, f"### {name}\na=50+1 {name}=51\n"))
    means = {}
    for mark, pairs in asked.items():
        problems = [problem_of(problem) for problem, _ in pairs]
        verdicts = judge.grade(problems, [[step] for _, step in pairs], "segment")
        means[mark] = 1 + 4 * sum(v.grades[0] for v in verdicts) / len(pairs)
    assert means["+"] > 4.5 and 2.5 < means["?"] < 3.5 and means["-"] < 1.7


def test_judge_writes_the_grade_that_it_is_read_to_give(judge):
    """`generate` reads the end of the same reply whose stem `critique` stops at."""
    rng = random.Random(10)
    problems = load_problems(str(FOLDER / "dev.jsonl"))[:12]
    traces = [mini.some_trace(rng, problem) for problem in problems]
    generating = Judge(judge.model, judge.tokenizer, mini.JUDGE_PROMPTS, "generate")
    written, read = generating.grade(problems, traces), judge.grade(problems, traces)
    for a, b in zip(written, read):
        assert a.raw.startswith(b.raw) and a.raw[len(b.raw):] == f"grade {round(1 + 4 * a.grades[0])}"
        assert abs(a.grades[0] - b.grades[0]) < 0.13  # of [0,1]: half a grade


def test_judge_sees_a_wrong_box_after_right_work(judge):
    rng = random.Random(7)
    problems = [problem_of(mini.make_problem(rng, mini.HARD)) for _ in range(12)]
    entry = re.compile(r"\\boxed\{(\w)=\d\d")
    traces = [entry.sub(r"\\boxed{\1=00", mini.work(rng, p.question, 0)) for p in problems]
    assert 1 + 4 * sum(v.grades[0] for v in judge.grade(problems, traces)) / len(problems) < 4.2
