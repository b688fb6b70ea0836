"""The methods: steps, credit by hand, cut-off and lone steps, mixed domains, SFT, distillation, presets."""

import dataclasses
import json
import math
import shutil

import pytest
import tiny
import torch

import exprl
from exprl import Settings, step_starts
from judge import Verdict
from kernels import reverse_kl
from sample import Rollout

STEP = "### a\nbbbbbb\n"  # one token a byte


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.training_world(tmp_path_factory.mktemp("world"))


def build(world, *more):
    settings, _ = exprl.parse([*world[1], *map(str, more)])
    return exprl.build_state(settings), settings


# ---- steps ----


def starts(text: str) -> list[int]:
    class Bytes:
        text = staticmethod(lambda ids: bytes(ids).decode(errors="replace"))

    return step_starts(Bytes, text.encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no heading at all", [0]),
        (STEP * 3, [0, 13, 26]),
        ("intro\n" + STEP, [0, 6]),
        ("a\n" + STEP + STEP, [0, 15]),  # two tokens before the first heading join its step
        ("#### four\n" + STEP + "text ### inside", [0, 10]),
        (STEP + "###", [0]),  # a heading at the very end is no step of its own
        (STEP + "###\n### x yz", [0, 13, 17]),
        ("", [0]),
    ],
)
def test_steps_open_at_headings(text, expected):
    assert starts(text) == expected


def test_steps_are_capped_and_found_inside_tokens():
    assert len(starts(STEP * 50)) == exprl.MAX_STEPS

    class Words:  # a token that ends one line and opens the next heading belongs to the new step
        text = staticmethod(lambda ids: ["one two three", "\n### next", " step is", " here", " now"][ids[0]])

    assert step_starts(Words, [0, 0, 0, 0, 1, 2, 3, 4]) == [0, 4]


# ---- credit by hand: rows of 2 + 6 tokens, steps of 2 tokens ----


def credited(grades, flags=(), domains=None, **settings):
    """Advantages per step, of traces with these grades, four to a group."""
    s = dataclasses.replace(Settings(group=len(grades), method="process"), **settings)
    rollouts = [
        Rollout((1, 2), tuple(range(2 * max(1, len(g)))), (0.0,) * 2 * max(1, len(g)), True) for g in grades
    ]
    begins = {i: [2 * k for k in range(max(1, len(g)))] for i, g in enumerate(grades)}
    batch = exprl.credit(
        s, exprl.collate(rollouts, "cpu"), {i: Verdict(g) for i, g in enumerate(grades)}, begins
    )
    for i, r in enumerate(rollouts):
        assert not batch.advantages[i][~batch.mask[i]].any()
        tokens = batch.advantages[i][batch.mask[i]].view(-1, 2)
        assert torch.equal(tokens[:, 0], tokens[:, 1])
    return [batch.advantages[i][batch.mask[i]][::2].tolist() for i in range(len(grades))], batch.read.tolist()


NAN = math.nan


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("delta", [[0.0], [0.5, -0.5], [-0.25, 0.5, -0.25], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0, 0.5]]),
        (
            "end",
            [
                [0.5],
                [0.5, 0.25],
                [-0.25, 0.25, 0.5],
                [0, 0, 0],
                [0, 0, 0],
                [0, 0, 0],
                [-0.5, -0.5, -0.5, 1.0],
            ],
        ),
    ],
)
def test_process_norms_by_hand(norm, expected):
    grades = [
        (0.5,),
        (0.75, 0.25),
        (0.25, 0.75, 0.5),
        (NAN, 0.5, 1.0),
        (0.5, NAN, 1.0),
        (0.5, 1.0, NAN),
        (0.5, 0.5, 0.5, 1.0),
    ]
    if norm == "delta":
        expected[-1][0] = -0.5
    advantages, read = credited(grades, process_norm=norm)
    assert advantages == expected and read == [True] * 3 + [False] * 3 + [True]


def test_step_mean_by_hand():
    advantages, _ = credited([(0.5,), (1.0, 0.0), (NAN, 1.0), (0.25, 0.25, 1.0)], process_norm="step-mean")
    baseline = (0.5 + 0.5 + 0.5) / 3  # the mean over readable traces of the mean over their steps
    for got, grades in zip(advantages, [(0.5,), (1.0, 0.0), None, (0.25, 0.25, 1.0)]):
        assert got == pytest.approx([g - baseline for g in grades] if grades else [0, 0])


def test_a_lone_step_gets_its_score_on_request():
    grades = [(0.5,), (0.25, 0.75), (NAN,), ()]
    assert credited(grades, step_credit="score")[0] == [[0.5], [-0.5, 0.5], [0.0], [0.0]]
    assert credited(grades, step_credit="zero")[0] == [[0.0], [-0.5, 0.5], [0.0], [0.0]]


class FakeJudge:
    """Grades that a test can foresee: a step's number of tokens, in hundredths."""

    tokens, model, readout = 0, None, "expected"

    def __init__(self):
        self.asked = []

    def grade(self, problems, traces, view):
        self.asked += [(view, p.solution, t) for p, t in zip(problems, traces)]
        return [
            Verdict((len(t) / 100,) if view == "outcome" else tuple(len(step) / 100 for step in t))
            for t in traces
        ]


def traced(state, texts, finished=True):
    rollouts = [
        Rollout((1,), tuple(state.policy.tokenizer.encode(t)), (-1.0,) * len(t), finished) for t in texts
    ]
    problems = [p for p in state.train for _ in range(4)][: len(texts)]
    return exprl.Traces(problems, rollouts, texts, [False] * len(texts))


@pytest.mark.parametrize(
    ("overlong", "expected", "read"),
    [
        ("zero", [0.0, 0.0], True),
        ("last", [0.13, -0.13], True),
        ("judge", [-0.07, 0.07], True),
        ("drop", [0.0, 0.0], False),
    ],
)
def test_a_cut_off_trace_under_process(world, overlong, expected, read):
    state, settings = build(world, "--method", "process", "--overlong", overlong)
    state.judge = FakeJudge()
    batch = exprl.process(state, settings, traced(state, [STEP + "### twenty tokens ab"] * 4, finished=False))
    got = batch.advantages[0][batch.mask[0]]
    assert got[[0, 13]].tolist() == pytest.approx(expected, abs=1e-6) and bool(batch.read[0]) == read
    whole = exprl.outcome(state, settings, traced(state, [STEP] * 4, finished=False))
    grade = {"zero": 0.0, "last": 0.0, "judge": 0.13, "drop": NAN}[overlong]
    assert whole.verdicts[0].grades == pytest.approx((grade,), nan_ok=True)


def test_mixed_domains_share_a_batch(world):
    state, settings = build(world, "--method", "process")
    settings = dataclasses.replace(settings, outcome_domains=("code",))
    state.judge, state.train = (
        FakeJudge(),
        [dataclasses.replace(p, domain="code" if i == 1 else "math") for i, p in enumerate(state.train)],
    )
    texts = [STEP + "### 67890123", STEP, STEP * 2, STEP * 3] * 2
    batch = exprl.process(state, settings, traced(state, texts))
    assert [view for view, *_ in state.judge.asked] == ["outcome"] * 4 + ["prefix"] * 4
    assert batch.advantages[0][batch.mask[0]][[0, 13]].tolist() == pytest.approx([0.01, -0.01], abs=1e-6)
    grades = torch.tensor([len(t) / 100 for t in texts[4:]])
    normed = (grades - grades.mean()) / (grades.std() + 1e-6)
    for i in range(4):
        assert batch.advantages[4 + i][batch.mask[4 + i]].tolist() == pytest.approx(
            [float(normed[i])] * len(texts[i]), abs=1e-4
        )
    records = exprl.trace_records(1, traced(state, texts), batch)
    assert exprl.trace_metrics(settings, records)["step_grades"][0] == pytest.approx(0.13)


def test_the_judge_sees_the_reference_that_was_asked_for(world):
    for condition in ("right", "none", "wrong"):
        state, settings = build(world, "--reference", condition)
        shown = [state.shown[p.id].solution for p in state.train]
        own = [p.solution for p in state.train]
        assert {
            "right": shown == own,
            "none": set(shown) == {state.judge.no_reference},
            "wrong": sorted(shown) == sorted(own) and not any(map(str.__eq__, shown, own)),
        }[condition]


# ---- imitation and self-distillation ----


def test_sft_is_the_likelihood_of_the_reference_behind_the_policys_prompt(world):
    state, settings = build(world, "--method", "sft", "--max-new-tokens", 60, "--temperature", 0.5)
    assert settings.kl == 0.01 and settings.schedule == "cosine" and state.judge is None
    settings = dataclasses.replace(settings, kl=0.0)
    prompts = [state.policy.chat(p.question) for p in state.train[:3]]
    traces = exprl.references(state.policy, state.train[:3], prompts)
    got, metrics = tiny.gradient(state, settings, exprl.sft(state, settings, traces))
    state.policy.model.zero_grad()
    total, count = 0.0, 0
    for problem, prompt in zip(state.train[:3], prompts):
        target = [*state.policy.tokenizer.encode(problem.solution), 256]
        logp = (
            state.policy.model(torch.tensor([prompt + target]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
        )
        total, count = total - logp[torch.arange(len(target)), target].sum(), count + len(target)
    (total / count).backward()
    assert metrics["nll"] == pytest.approx(total.item() / count, rel=1e-4)
    for a, p in zip(got, state.policy.model.parameters()):
        assert torch.allclose(a.float(), p.grad, atol=1e-6, rtol=1e-4)


def test_sft_leaves_out_references_that_it_would_cut(world, capsys):
    state, settings = build(world, "--method", "sft", "--max-new-tokens", 60)
    longest = max(len(exprl.reference_ids(state.policy, p)) for p in state.train)
    capsys.readouterr()
    fewer, _ = build(world, "--method", "sft", "--max-new-tokens", longest - 1)
    assert 0 < len(fewer.train) < len(state.train)
    assert f"a reference of more than {longest - 1} tokens; to keep" in capsys.readouterr().err


def test_cosine_schedule_by_hand():
    s = Settings(lr=1.0, steps=10, schedule="cosine", warmup=0.2)
    rates = [exprl.learning_rate(s, step) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5) and 0 < rates[9] < 0.05
    assert exprl.learning_rate(Settings(lr=2.0), 7) == 2.0


def distilled(world, *more):
    state, settings = build(world, "--method", "distill", "--kl", 0, *more)
    prompts = [state.policy.chat(p.question) for p in state.train[:2]]
    rollouts = state.sampler.sample(prompts, 4, 12, 1.0, seed=5)
    traces = exprl.Traces.of(state.policy, [p for p in state.train[:2] for _ in range(4)], rollouts)
    length = sum(len(r.token_ids) for r in rollouts) / 8
    return state, settings, dataclasses.replace(traces, mean_length=length)


def test_the_teacher_is_the_start_that_sees_the_reference(world):
    state, settings, traces = distilled(world)
    batch = exprl.distill(state, settings, traces)
    for i, (r, p) in enumerate(zip(traces.rollouts, traces.problems)):
        hinted = state.policy.chat(exprl.hinted_question(state.policy, p))
        assert p.solution in state.policy.tokenizer.decode(hinted) and p.solution not in (
            state.policy.tokenizer.decode(r.prompt_ids)
        )
        with torch.no_grad():
            logp = state.reference(torch.tensor([hinted + list(r.token_ids)])).logits[0].log_softmax(-1)
        logp = logp[len(hinted) - 1 : -1][torch.arange(len(r.token_ids)), list(r.token_ids)]
        expected = (logp - torch.tensor(r.logprobs)) * traces.mean_length / len(r.token_ids)
        assert torch.allclose(batch.advantages[i][batch.mask[i]], expected, atol=1e-4)
        gap = float((torch.tensor(r.logprobs) - logp).mean())
        assert float(batch.notes["teacher_kl"][i]) == pytest.approx(gap, abs=1e-4)


def test_full_distillation_is_the_reverse_kl(world):
    state, settings, traces = distilled(world, "--distill-kl", "full", "--microbatch-tokens", 200)
    got, metrics = tiny.gradient(state, settings, exprl.distill(state, settings, traces))
    state.policy.model.zero_grad()
    total = 0.0
    for r, p in zip(traces.rollouts, traces.problems):
        hinted = state.policy.chat(exprl.hinted_question(state.policy, p))
        ids = list(r.token_ids)
        student = state.policy.model(torch.tensor([[*r.prompt_ids, *ids]])).logits[
            0, len(r.prompt_ids) - 1 : -1
        ]
        teacher = state.reference(torch.tensor([hinted + ids])).logits[0, len(hinted) - 1 : -1].detach()
        p, q = student.log_softmax(-1), teacher.log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum(-1).mean() / len(
            traces.rollouts
        )  # each trace weighs the same
    total.backward()
    for a, p in zip(got, state.policy.model.parameters()):
        assert torch.allclose(a.float(), p.grad, atol=1e-6, rtol=1e-3)
    assert metrics["ratio_gap"] < 1e-4


def test_a_slot_in_a_question_is_not_filled(world):
    state, _ = build(world, "--method", "grpo")
    problem = dataclasses.replace(state.train[0], question="What is {reference}?")
    assert exprl.hinted_question(state.policy, problem).count(problem.solution) == 1


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_reverse_kl_against_float64(rows):
    torch.manual_seed(0)
    h, t, w, v = (torch.randn(n, d, dtype=torch.double) for n, d in ((rows, 6), (rows, 5), (33, 6), (33, 5)))
    h.requires_grad_(), w.requires_grad_()
    p, q = ((a @ b.T / 0.7).log_softmax(-1) for a, b in ((h, w), (t, v)))
    want = (p.exp() * (p - q)).sum(-1)
    if not rows:
        assert reverse_kl(h, w, t, v, 0.7).shape == (0,)
        return
    wants = torch.autograd.grad(want.square().sum(), (h, w))
    got = reverse_kl(h.float(), w.float(), t.float(), v.float(), 0.7, chunk=3)
    gots = torch.autograd.grad(reverse_kl(h, w, t, v, 0.7, chunk=3).square().sum(), (h, w))
    assert torch.allclose(got.double(), want, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(gots, wants))


# ---- settings and whole runs ----


def test_presets_and_methods_set_what_they_say(capsys):
    def settings(*flags):
        return exprl.parse([*flags, "--model", "Qwen2.5-1.5B-Instruct"])[0]

    assert (settings("--method", "sft").kl, settings("--method", "sft").schedule) == (0.0, "cosine")
    paper = settings("--preset", "paper", "--method", "process")
    assert (paper.questions, paper.group, paper.updates, paper.clip_high) == (36, 16, 1, 0.26)
    assert "preset paper, process: " in (shown := capsys.readouterr().err) and "questions 36" in shown
    assert (
        settings("--preset", "paper").updates == 2
        and settings("--preset", "paper", "--group", "4").group == 4
    )
    assert settings("--preset", "paper", "--method", "distill").lr == 1e-7
    second = settings("--preset", "paper-stage2")
    assert (second.method, second.norm, second.kl, second.group) == ("grpo", "mean", 0.0, 32)
    assert second.loss_mean == "trace" and second.data == exprl.PAPER_DATA and second.eval_data == ()
    assert exprl.parse(["--preset", "paper"])[0].model == "Qwen/Qwen3-4B-Instruct-2507"
    with pytest.raises(SystemExit):
        settings("--method", "distill", "--updates", "2")


def test_steps_graded_by_likelihood_are_warned_of(world, capsys):
    for method, readout in (("process", "expected"), ("outcome", "likelihood"), ("process", "likelihood")):
        assert "a likelihood mostly rises along a trace" not in capsys.readouterr().err
        build(world, "--method", method, "--readout", readout)
    assert "a likelihood mostly rises along a trace" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["process", "sft", "distill"])
def test_each_method_runs_and_resumes_exactly(world, tmp_path, method):
    more = {"sft": ["--max-new-tokens", 60], "process": ["--overlong", "judge"], "distill": []}[method]
    flags = [*world[1], "--method", method, "--save-every", 1, "--keep", 9, "--show-every", 1, *more]
    done = tiny.inside(*flags, "--steps", 4, "--out", tmp_path / "whole")
    assert f"ExpRL {method}" in done.stdout
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("step_[34]", "model"))
    done = tiny.inside("--resume", tmp_path / "cut")
    assert "after step 2" in done.stdout and (tmp_path / "cut/model").exists()
    read = {
        run: [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "cut")
    }
    volatile = {"seconds", "sample_tok_s", "judge_tok_s", "train_tok_s", "peak_gb"}
    strip = [
        [{k: v for k, v in line.items() if k not in volatile} for line in lines] for lines in read.values()
    ]
    assert strip[0] == strip[1] and len(strip[0]) == 4
    special = {"process": "step_grades", "sft": "nll", "distill": "teacher_kl"}[method]
    assert all(line[special] is not None and math.isfinite(line["grad_norm"]) for line in strip[0])
    rollouts = (tmp_path / "whole/rollouts.jsonl").read_text().splitlines()
    assert len(rollouts) == (0 if method == "sft" else 4 * 12)
    if method == "process":
        record = json.loads(rollouts[0])
        assert len(record["grades"]) == len(record["advantages"]) >= 1
