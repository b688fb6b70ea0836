"""Training: gradients, batches, exact resume, kills, signals, refusals. Real runs on tiny checkpoints."""

import dataclasses
import errno
import json
import math
import random
import shutil
import signal
import subprocess
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import exprl
from data import Problem, load_problems
from exprl import Settings, batch_for, logprobs, microbatches
from judge import Verdict
from sample import Rollout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home, flags = tiny.training_world(tmp_path_factory.mktemp("world"))
    return home, [*flags, "--overlong", "judge"]


def build(world, *more):
    settings, _ = exprl.parse([*world[1], *map(str, more)])
    return exprl.build_state(settings), settings


# ---- pure pieces -------------------------------------------------------------------------------------------


def test_few_problems_are_of_all_domains():
    problems = [Problem(f"p/{i}", "q", "s", "a", "science" if i > 5 else "math") for i in range(8)]
    assert [p.id for p in exprl.some_of_each(problems, 5)] == ["p/0", "p/6", "p/1", "p/7", "p/2"]
    assert exprl.some_of_each(problems[:6], 9) == problems[:6] and exprl.some_of_each([], 3) == []


def test_a_teacher_s_prompt_must_fit_too(world, capsys):
    state, settings = build(world, "--method", "distill", "--overlong", "zero", "--kl", 0)
    long = dataclasses.replace(state.train[0], id="long", solution="because " * 2000)
    assert exprl.fitting(state.policy, [*state.train, long], settings, exprl.TRAINING) == state.train
    assert "1 of 8 training problems (as the teacher sees them) with more than" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"none of the 1 training problems \(as the teacher .* is left"):
        exprl.fitting(state.policy, [long], settings, exprl.TRAINING)
    other = dataclasses.replace(settings, method="outcome")
    assert exprl.fitting(state.policy, [long], other, exprl.TRAINING) == [long]


def test_weights_that_are_not_finite_end_the_run(world):
    state, settings = build(world)
    state.policy.model.get_output_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(exprl.Stop, match="not finite"):
        exprl.sample_traces(state, settings, 1, [0])


def test_spoilt_weights_are_neither_evaluated_nor_saved(world, tmp_path):
    """By whatever update: the newest checkpoint stays sound, and --resume goes on from it."""
    run, flags = tmp_path / "run", [*map(str, flags_of_whole(world))]
    first = [*flags, "--keep", "1", "--save-every", "1", "--eval-every", "1", "--steps", "2"]
    exprl.main([*first, "--out", str(run)])
    with pytest.raises(SystemExit, match="1"):
        exprl.main(["--resume", str(run), "--steps", "4", "--lr", "1e30"])
    assert [path.name for path in exprl.complete_checkpoints(run)] == ["step_2"]
    lines = exprl.read_jsonl(run / "metrics.jsonl")
    assert [m["step"] for m in lines if "pass@1" in m] == [0, 1, 2] and lines[-1]["step"] == 3
    exprl.main(["--resume", str(run), "--steps", "4", "--lr", "1e-3"])
    assert [path.name for path in exprl.complete_checkpoints(run)] == ["step_4"]


def test_a_damaged_line_of_a_log_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nabc\n{"step": 2}\n')
    with pytest.raises(SystemExit, match="metrics.jsonl:2: damaged"):
        exprl.read_jsonl(path)


def test_a_run_is_resumed_from_anywhere(world, tmp_path, monkeypatch):
    home, flags = world
    monkeypatch.chdir(home)
    settings, _ = exprl.parse([*flags, "--model", "policy", "--data", "train.jsonl", "science=eval.jsonl"])
    assert settings.model == str(home / "policy")
    assert settings.data == (str(home / "train.jsonl"), f"science={home / 'eval.jsonl'}")
    (home / "Qwen2.5-1.5B").mkdir()  # no model's folder
    settings, _ = exprl.parse(["--model", "Qwen2.5-1.5B", "--data", "openai/gsm8k:main:train"])
    assert (settings.model, settings.data) == ("Qwen2.5-1.5B", ("openai/gsm8k:main:train",))


def test_problems_that_the_judge_cannot_read_are_left_out(world, tmp_path, capsys):
    home, flags = world
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().split("\n")[:-1]]
    rows[2]["solution"] = "x " * 3000 + rows[2]["solution"]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state, _ = build(world, "--data", tmp_path / "long.jsonl")
    assert len(state.train) == len(rows) - 1 and "too long for the judge's context" in capsys.readouterr().err


def test_domains_without_a_rubric_are_named(world, tmp_path, capsys):
    lines = (world[0] / "train.jsonl").read_text().split("\n")[:-1]
    rows = [json.loads(line) | {"domain": domain} for line, domain in
            zip(lines, ["math", "science/physics", "chain"] * 3, strict=False)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(world, "--data", tmp_path / "mixed.jsonl")
    assert "no entry for chain: graded as math" in capsys.readouterr().err


def test_a_judge_that_knows_steps_only_is_not_checked_on_whole_traces(world, tmp_path):
    shutil.copytree(world[0] / "judge", tmp_path / "judge")
    own = {"system": {"prefix": "grade"}, "user": "{question}{reference}{trace}"}
    (tmp_path / "judge/prompts.json").write_text(json.dumps(own))
    tiny.inside(*world[1], "--judge", tmp_path / "judge", "--method", "process", "--check-judge", 2,
                "--steps", 1, "--out", tmp_path / "run")
    assert (tmp_path / "run/model").exists()


def test_what_never_began_leaves_no_folder(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="(?s)raise --cache-gb.*nothing was begun"):
        exprl.main([*world[1], "--cache-gb", "1e-7", "--out", str(run)])
    assert not run.exists()
    with pytest.raises(SystemExit, match="raise --cache-gb"):
        exprl.main([*world[1], "--cache-gb", "1e-7", "--dry-run"])
    monkeypatch.setattr(exprl, "ranks", lambda: 2)
    monkeypatch.setattr(exprl, "gather", lambda value: [None, value])
    with pytest.raises(exprl.Stop, match="raise it") as stop, exprl.together():
        raise exprl.Refused("raise it")
    assert stop.value.refused  # what main deletes the folder by
    with pytest.raises(exprl.Stop, match="failed while saving: .*No space"), exprl.together(phase="saving"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def own_signals():
    """Several processes ignore signals once they end, and what is started later would, too."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_no_signal_keeps_a_process_from_the_others(own_signals, monkeypatch):
    """Several processes meet in `gather`: whenever signals come, each gets there once."""
    met = []
    monkeypatch.setattr(exprl, "ranks", lambda: 2)
    monkeypatch.setattr(exprl, "gather", lambda value: met.append(value) or [None, value])
    with exprl.Interrupts() as interrupts:
        state, explain = types.SimpleNamespace(interrupts=interrupts, phase="sampling"), exprl.explain
        for number in (signal.SIGTERM, signal.SIGHUP):
            met.clear()
            signal.raise_signal(number)  # while the weights move: it waits
            with monkeypatch.context() as patched, pytest.raises(exprl.Stop, match=f"by {number.name}"):
                patched.setattr(exprl, "explain",  # a second one, while the first is told
                                lambda *a: signal.raise_signal(signal.SIGTERM) or explain(*a))
                with exprl.together(state):
                    pass
            assert len(met) == 1 and interrupts.deferred and interrupts.waiting == signal.SIGTERM
            interrupts.waiting = None
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # under nohup
    with exprl.Interrupts():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_process_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert exprl.own_device("--device", "cpu") == "cpu"
    with pytest.raises(SystemExit, match="--device auto, process 1: torch sees 1 GPUs here"):
        exprl.own_device("--device", "auto")


def test_what_cannot_be_written_or_saved_is_found_before_training(world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run, flags = tmp_path / "run", [*world[1], "--method", "grpo", "--steps", "1"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="(?s)No space.*nothing was begun"):
        patched.setattr(exprl, "write_atomically", full)
        exprl.main([*flags, "--out", str(run)])
    assert not run.exists()

    def refused(*_):
        raise ValueError("this configuration cannot be saved")

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="cannot be saved"):
        patched.setattr(exprl.LM, "save_config", refused)
        exprl.main([*flags, "--out", str(run)])
    assert not run.exists()
    exprl.main([*flags, "--out", str(run)])


def test_a_shown_trace_has_a_grade_only_if_a_judge_gave_one(capsys):
    record = {"problem": "p/1", "grades": [1.0, None], "correct": True, "text": "So 4."}
    bar = types.SimpleNamespace(disable=True, write=print, set_description_str=lambda _: None)
    for method, word in (("process", "p/1: grade 5.00 unread of 5, right"), ("grpo", "p/1: right")):
        settings = replace(Settings(), method=method, show_every=1)
        exprl.report(bar, [{"step": 1, "seconds": 1.0, "sample_tok_s": 9.0}], [record], settings)
        assert f"step 1, {word}\nSo 4.\n" in capsys.readouterr().out


def test_batches_are_a_function_of_seed_and_step_and_straddle_epochs():
    problems = [Problem(f"p/{i}", "q", "s", "a", "math") for i in range(7)]
    s = Settings(questions=3, seed=5)
    stream = [p.id for step in range(1, 15) for p in batch_for(problems, s, step)]
    assert len(stream) == 42
    for epoch in range(6):
        assert sorted(stream[7 * epoch:7 * epoch + 7]) == sorted(p.id for p in problems)
    assert [p.id for p in batch_for(problems, s, 9)] == stream[24:27]
    assert stream != [p.id for step in range(1, 15)
                      for p in batch_for(problems, dataclasses.replace(s, seed=6), step)]


def test_microbatches_hold_every_row_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randrange(1, 100) for _ in range(rng.randrange(1, 40))]
        rows, budget = rng.sample(range(len(lengths)), rng.randrange(len(lengths) + 1)), rng.randrange(1, 500)
        batches = microbatches(rows, lengths, budget)
        assert sorted(sum(batches, [])) == sorted(rows)
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= budget


def test_headings_are_exactly_three_hashes_at_a_line_start():
    assert len(exprl.HEADING.findall("### a\ntext ### no\n#### no\n###b\n ### no\n### c")) == 3


def test_settings_help_covers_every_flag():
    done = tiny.inside("--help")
    for f in dataclasses.fields(Settings):
        assert "--" + f.name.replace("_", "-") in done.stdout


# ---- one step ----------------------------------------------------------------------------------------------


def made_up_batch(state, settings, grades):
    rng = random.Random(1)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randrange(3, 20)))
               for _ in range(len(grades) // settings.group)]
    rollouts = [Rollout(prompts[i // settings.group],
                        tuple(rng.randrange(256) for _ in range(rng.randrange(1, 30))), (), True)
                for i in range(len(grades))]
    rollouts = [dataclasses.replace(r, logprobs=tuple(logprobs(
        state.policy.model, torch.tensor([r.prompt_ids + r.token_ids]),
        torch.tensor([[False] * len(r.prompt_ids) + [True] * len(r.token_ids)]), 1.0).tolist()))
        for r in rollouts]
    verdicts = {i: Verdict((g,)) for i, g in enumerate(grades)}
    return exprl.credit(settings, exprl.collate(rollouts, "cpu"), verdicts)


GRADES = [0.0, 1.0, 0.25, 0.5, math.nan, 0.2, 0.9, 0.3, 0.5, 0.5, 0.5, 0.5]


def test_a_preset_s_own_values_are_not_blamed_on_the_user(world, capsys):
    exprl.parse([*world[1], "--preset", "paper-stage2", "--method", "process"])
    with pytest.raises(SystemExit):
        exprl.parse([*world[1], "--preset", "paper-stage2", "--method", "process", "--norm", "mean"])
    assert "--norm has no effect under --method process" in capsys.readouterr().err
    exprl.parse([*world[1], "--method", "process", "--group", "1"])  # a step is compared with the next


def test_gradient_does_not_depend_on_microbatches_and_matches_the_plain_loss(world):
    state, settings = build(world)
    batch = made_up_batch(state, settings, GRADES)
    whole, metrics = tiny.gradient(state, dataclasses.replace(settings, microbatch_tokens=10**6), batch)
    for budget in (1, 60, 150):
        split, same = tiny.gradient(state, dataclasses.replace(settings, microbatch_tokens=budget), batch)
        for a, b in zip(whole, split):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)
        assert same == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    # the same by transformers' own logits, one row at a time, in plain lines
    state.policy.model.zero_grad()
    total, count = 0.0, 0
    for i in range(len(GRADES)):
        if math.isnan(GRADES[i]):
            continue
        ids, mask = batch.ids[i:i + 1, :batch.lengths[i]], batch.mask[i, :batch.lengths[i]]
        logp = state.policy.model(ids).logits[0, :-1].log_softmax(-1)
        logp = logp.gather(1, ids[0, 1:, None])[:, 0][mask[1:]]
        with torch.no_grad():
            ref = state.reference(ids).logits[0, :-1].log_softmax(-1)
            ref = ref.gather(1, ids[0, 1:, None])[:, 0][mask[1:]]
        d = ref - logp
        total = total + (-batch.advantages[i, :batch.lengths[i]][mask] * (logp - logp.detach()).exp()
                         + settings.kl * (d.exp() - d - 1)).sum()
        count += len(logp)
    (total / count).backward()
    for a, p in zip(whole, state.policy.model.parameters()):
        assert torch.allclose(a, p.grad.double(), atol=1e-5, rtol=1e-3)
    # Eq. 1: sums of each trace's tokens, their mean over the 11 traces that were read
    summed, _ = tiny.gradient(state, dataclasses.replace(settings, loss_mean="trace"), batch)
    for a, b in zip(whole, summed):
        assert torch.allclose(a * count / 11, b, atol=1e-5, rtol=1e-4)


def test_unread_rows_leave_loss_and_statistics(world):
    state, settings = build(world)
    batch = made_up_batch(state, settings, GRADES)
    row = GRADES.index(next(g for g in GRADES if math.isnan(g)))
    assert not batch.advantages[row].any()
    others = [g for g in GRADES[4:8] if not math.isnan(g)]
    expected = (0.9 - np.mean(others)) / (np.std(others, ddof=1) + 1e-6)
    assert batch.advantages[6].max().item() == pytest.approx(expected, rel=1e-4)
    assert not batch.advantages[8:].any()  # equal grades
    nothing = made_up_batch(state, settings, [math.nan] * 12)
    grads, _ = tiny.gradient(state, settings, nothing)
    assert not any(g.any() for g in grads)


def test_the_end_token_is_trained(world):
    state, settings = build(world)
    rollout = Rollout((1, 2, 3), (7, 8, 256), (-1.0, -1.0, -1.0), True)
    batch = exprl.credit(settings, exprl.collate([rollout] * 4, "cpu"),
                         {i: Verdict((g,)) for i, g in enumerate((0.0, 1.0, 0.0, 1.0))})
    assert batch.mask[0].tolist() == [False] * 3 + [True] * 3 and batch.advantages[1, 5] > 0


def test_ratio_gap_is_zero_on_policy_and_later_updates_use_old_logprobs(world):
    state, settings = build(world, "--updates", 3, "--lr", 0.05)
    metrics, records = exprl.train_step(state, settings, 1)
    assert metrics["ratio_gap"] < 1e-4 and len(records) == 12 and metrics["clip_share"] > 0


def test_the_reference_never_reaches_the_policy(world, monkeypatch):
    state, settings = build(world, "--eval-data", world[0] / "eval.jsonl", "--steps", 2)
    seen = []
    original = state.sampler.__class__.sample

    def watch(self, prompts, *args, **kwargs):
        if self.model is not state.judge.model:
            seen.extend(state.policy.tokenizer.decode(p) for p in prompts)
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(state.sampler.__class__, "sample", watch)
    run = world[0] / "watch"
    run.mkdir()
    exprl.run_training(state, settings, run)
    assert len(seen) >= 2 * 3 + 2 * 3  # rollouts of two steps, two evaluations
    for text in seen:
        assert "REF" not in text and "twice" not in text
        assert text.count("What is") == 1


def test_a_grade_of_a_cut_trace(world):
    for overlong, check in (("zero", lambda g: g == 0), ("drop", math.isnan), ("judge", lambda g: 0 < g < 1)):
        state, settings = build(world, "--overlong", overlong)
        cut = Rollout((1,), (2, 3), (-1.0, -1.0), False)
        traces = exprl.Traces(state.train[:1], [cut], ["x"], [False])
        verdicts = exprl.grade_whole(state, settings, traces, [0])
        assert check(verdicts[0].grades[0])


def test_traces_dropped_for_their_length_are_not_unread(world):
    for method in ("outcome", "grpo"):
        state, settings = build(world, "--overlong", "drop", "--method", method, "--max-unread", 0)
        metrics, records = exprl.train_step(state, settings, 1)
        assert metrics["cut_off"] > 0 and metrics["unread"] == (0 if method == "outcome" else None)
        assert all(r["grades"] == [None] for r in records if not r["finished"])


def test_unread_is_a_share_of_what_was_graded():
    """A dozen traces cut off must not hide that the judge read none of the others."""
    record = dict(domain="math", text="", correct=False, advantage=[0.0, 0.0], tokens=1)
    traces = [([None], False, exprl.CUT_OFF)] * 12 + [([None], True, "?"), ([0.5], True, "")] * 2
    records = [record | dict(grades=g, finished=f, judge=j) for g, f, j in traces]
    assert exprl.trace_metrics(Settings(), records)["unread"] == 0.5
    assert exprl.trace_metrics(Settings(), records[:8])["unread"] == 0


def test_a_non_finite_gradient_is_skipped_counted_and_stops_the_run(world, tmp_path):
    state, settings = build(world, "--steps", 9)
    before = {k: v.clone() for k, v in state.policy.model.state_dict().items()}
    original = exprl.policy_head

    def spoilt(*arguments, **settings):
        head = original(*arguments, **settings)
        return head._replace(loss=head.loss * math.nan)

    exprl.policy_head = spoilt
    try:
        with pytest.raises(exprl.Stop, match="not finite"):
            exprl.run_training(state, settings, tmp_path)
    finally:
        exprl.policy_head = original
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert [m["skipped_updates"] for m in lines] == [1, 1, 1]
    assert all(torch.equal(v, before[k]) for k, v in state.policy.model.state_dict().items())


def test_unread_grades_stop_the_run_and_the_replies_are_kept(world, tmp_path):
    state, settings = build(world, "--readout", "generate", "--steps", 2)
    state.judge.reply_tokens = 5
    with pytest.raises(exprl.Stop, match="could not be read"):
        exprl.run_training(state, settings, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().split("\n")[:-1]]
    assert len(records) == 12 and records[0]["grades"] == [None] and records[0]["judge"]


def test_judge_and_reference_share_memory_when_they_are_the_start(world):
    state, _ = build(world, "--judge", world[0] / "policy")
    assert state.judge.model is state.reference is not state.policy.model
    state, _ = build(world, "--method", "grpo", "--kl", 0)
    assert state.judge is None and state.reference is None


def passes_of(module, seen):
    """Record the tokens of each pass through a model."""
    module.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)


@pytest.mark.parametrize("flags, policy, start", [
    (["--kl", "0"], 1, 0), (["--kl", "0.01"], 1, 1), (["--kl", "0.01", "--updates", "3"], 3 + 1, 3)])
def test_no_pass_is_made_twice(world, flags, policy, start):
    """A pass per micro-batch, one of the start under a KL, one for the old log-probs of all later updates.
    The start's weights are the judge's where both are the same model."""
    state, settings = build(world, *flags, "--judge", world[0] / "policy")
    assert state.judge.model is state.reference and state.optimizer.defaults["fused"]
    batch, ours, theirs = made_up_batch(state, settings, [*GRADES[:8], 0.1, 0.5, 0.5, 0.5]), [], []
    passes_of(state.policy.model, ours)
    passes_of(state.reference, theirs)
    exprl.update(state, settings, batch, settings.lr)
    assert (len(ours), len(theirs)) == (policy, start)


def test_rows_without_advantage_are_passed_over_unless_something_else_pulls(world):
    for kl, groups in ((0.0, 2), (0.01, 3)):
        state, settings = build(world, "--kl", kl)
        batch, seen = made_up_batch(state, settings, [*GRADES[:4], *GRADES[8:], 0.2, 0.9, 0.3, 0.6]), []
        passes_of(state.policy.model, seen)
        exprl.update(state, settings, batch, settings.lr)
        rows = [i for i in range(12) if groups == 3 or not 4 <= i < 8]
        prompts = [int(batch.mask[i].int().argmax()) for i in rows[::4]]
        assert seen == [sum(prompts) + int(batch.mask[rows].sum()) - len(rows)]  # see packing.py


def test_checkpointed_activations_give_the_same_gradients(world):
    results = []
    for flags in ([], ["--checkpoint-activations"]):
        state, settings = build(world, *flags)
        results.append(tiny.gradient(state, settings, made_up_batch(state, settings, GRADES))[0])
    assert state.policy.model.is_gradient_checkpointing
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*results))


def test_low_precision_copy_keeps_its_storage(world, monkeypatch):
    monkeypatch.setattr(exprl, "fast_dtype", tiny.as_asked)
    state, settings = build(world, "--dtype", "bfloat16")
    assert state.sampling.dtype == torch.bfloat16 and state.policy.model.dtype == torch.float32
    places = [p.data_ptr() for p in state.sampling.parameters()]
    metrics, _ = exprl.train_step(state, settings, 1)
    assert places == [p.data_ptr() for p in state.sampling.parameters()] and metrics["ratio_gap"] < 0.1
    for low, master in zip(state.sampling.parameters(), state.policy.model.parameters()):
        assert torch.equal(low, master.to(torch.bfloat16))


def test_bfloat16_is_float32_on_a_cpu_without_its_instructions(world, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    state, _ = build(world, "--dtype", "bfloat16")
    assert state.dtype == torch.float32 and state.sampling is state.policy.model
    assert "no instructions for bfloat16" in capsys.readouterr().err


# ---- whole runs --------------------------------------------------------------------------------------------


def weights(run):
    newest = exprl.complete_checkpoints(run)[-1]
    return newest.name, load_file(newest / "model.safetensors"), load_file(newest / "optimizer.safetensors")


def same_end(a, b):
    (name_a, *tensors_a), (name_b, *tensors_b) = weights(a), weights(b)
    assert name_a == name_b
    for x, y in zip(tensors_a, tensors_b):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    volatile = {"seconds", "sample_tok_s", "judge_tok_s", "train_tok_s", "peak_gb", "tokens_per_second"}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        lines = [[{k: v for k, v in json.loads(line).items() if k not in volatile}
                  for line in (run / name).read_text().split("\n")[:-1]] for run in (a, b)]
        assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def whole(world):
    """The undisturbed run of 6 steps (7 problems, 3 a step: across two edges of epochs), for comparison."""
    run = world[0] / "whole"
    done = tiny.run("exprl.py", *world[1], "--steps", 6, "--save-every", 2,
                    "--eval-data", world[0] / "eval.jsonl", "--eval-every", 3, "--eval-n", 2,
                    "--eval-k", 1, 2, "--out", run)
    return run, done


def flags_of_whole(world):
    return [*world[1], "--save-every", 2, "--eval-data", world[0] / "eval.jsonl", "--eval-every", 3,
            "--eval-n", 2, "--eval-k", 1, 2]


def test_a_run_writes_what_it_promises(world, whole):
    run, done = whole
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
    steps = [m for m in lines if "score" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in lines if "pass@1" in m] == [0, 3, 6]
    promised = ("score accuracy length headings cut_off unread zero_groups unsolved entropy kl ratio_gap "
                "clip_share grad_norm lr sample_tok_s judge_tok_s train_tok_s seconds peak_gb").split()
    assert all(isinstance(m[name], float) for m in steps for name in promised)
    records = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().split("\n")[:-1]]
    assert len(records) == 6 * 12
    assert {"step", "problem", "text", "grades", "advantage", "correct", "judge"} <= set(records[0])
    assert [p.name for p in exprl.complete_checkpoints(run)] == ["step_4", "step_6"]  # --keep 2
    assert "pass@1" in done.stdout and "before" in done.stdout and f"run: {run}" in done.stdout
    assert "next:" in done.stdout and "grade" in done.stdout
    from transformers import AutoModelForCausalLM
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    trained = load_file(run / "checkpoints" / "step_6" / "model.safetensors")
    assert all(torch.equal(v, trained[k]) for k, v in loaded.state_dict().items() if k in trained)
    sampled = tiny.run("sample.py", "--model", run / "model", "--data", world[0] / "eval.jsonl", "--n", 1,
                       "--max-new-tokens", 4)
    assert "pass@1" in sampled.stdout


def test_resume_is_exact(world, whole, tmp_path):
    """3 + 3 steps equal 6, bit for bit: weights, optimizer, metrics, traces."""
    run = tmp_path / "split"
    tiny.run("exprl.py", *flags_of_whole(world), "--steps", 3, "--out", run)
    done = tiny.run("exprl.py", "--resume", run, "--steps", 6)
    assert "after step 3" in done.stdout
    same_end(run, whole[0])


def logged(run) -> list[int]:
    """The steps of which metrics.jsonl has a line."""
    return [m["step"] for m in exprl.read_jsonl(run / "metrics.jsonl")]


def test_kill_at_random_moments_and_resume(world, whole, tmp_path):
    """kill -9 at three random moments of its steps: the run still ends where the undisturbed one ended."""
    seed = time.time_ns()
    print(f"seed {seed}")  # shown on failure
    rng, run, killed = random.Random(seed), tmp_path / "killed", []
    command = ["exprl.py", *flags_of_whole(world), "--steps", 6, "--out", run]
    for step in (1, 3, 5):
        process = tiny.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 240
        while max(logged(run), default=0) < step and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        killed.append(process.poll() is None)
        process.kill()
        process.wait()
        command = ["exprl.py", "--resume", run]
    assert any(killed), "all were quicker than the kill"
    tiny.run("exprl.py", "--resume", run)
    same_end(run, whole[0])


def test_a_step_is_saved_before_it_is_evaluated(world, tmp_path, monkeypatch):
    """A kill in a long evaluation costs no training step."""
    run, saved = tmp_path / "run", []
    monkeypatch.setattr(exprl, "evaluation", lambda state, *_: saved.append(
        (state.step, [path.name for path in exprl.complete_checkpoints(run)])))
    exprl.main([*map(str, flags_of_whole(world)), "--steps", "3", "--check-judge", "0", "--out", str(run)])
    assert saved == [(0, []), (3, ["step_2", "step_3"])]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit_cleanly(world, whole, tmp_path, number):
    for attempt in range(5):  # beside other work the signal may come too late
        run = tmp_path / f"stopped-{attempt}"
        process = tiny.start("exprl.py", *flags_of_whole(world), "--steps", 6, "--save-every", 0, "--out",
                             run, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while not max(logged(run), default=0) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(number)
        error = process.communicate(timeout=120)[1]
        if process.returncode:
            break
    assert "stopped by" in error
    assert process.returncode == 128 + number and "--resume" in error and exprl.complete_checkpoints(run)
    tiny.run("exprl.py", "--resume", run, "--save-every", 2)
    assert weights(run)[0] == "step_6"
    assert all(torch.equal(x, y) for x, y in zip(weights(run)[1].values(), weights(whole[0])[1].values()))


def test_a_damaged_newest_checkpoint_falls_back(world, whole, tmp_path):
    """And is kept aside, so that its step is saved again."""
    run = tmp_path / "damaged"
    shutil.copytree(whole[0], run)
    path = run / "checkpoints" / "step_6" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (run / "checkpoints" / "step_9.tmp").mkdir()  # a torn save is no checkpoint
    done = tiny.run("exprl.py", "--resume", run)
    assert "cannot use" in done.stderr and "after step 4" in done.stdout
    assert (run / "checkpoints" / "step_6.damaged" / path.name).stat().st_size == 100
    same_end(run, whole[0])


def test_bad_starts_name_the_remedy_before_any_model_is_loaded(world, tmp_path):
    home, flags = world
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "#### 1"}\n{"question": "", "answer": "#### 2"}\n')
    cases = [
        (["--data", bad], "bad.jsonl", "2"),
        (["--data", tmp_path / "absent.jsonl"], "absent.jsonl", ""),
        (["--model", "mystery"], "mystery", "Qwen"),
        (["--group", 1], "--group", ""),
        (["--temperature", 0], "--temperature", ""),
        (["--out", home], "not empty", "--resume"),
        (["--method", "process", "--outcome-domains", "maths"], "maths", "only of math"),
        (["--judge-device", "cuda:99"], "--judge-device cuda:99", "look at nvidia-smi"),
        (["--outcome", "math"], "unrecognized arguments: --outcome", ""),  # not short for another flag
    ]
    for more, *words in cases:
        done = tiny.inside(*flags, *more, check=False)
        assert done.returncode and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert all(word in done.stderr for word in words), done.stderr[-2000:]
    settings, _ = exprl.parse([*flags, "--data", str(bad), "--skip-bad-rows"])
    assert len(load_problems(list(settings.data), skip_bad_rows=True)) == 1


def test_resume_refuses_another_run(world, whole, tmp_path):
    for more, word in ((["--seed", 9], "--seed"), (["--data", world[0] / "eval.jsonl"], "--data"),
                       (["--method", "grpo"], "--method cannot change"),
                       (["--norm", "mean"], "--norm cannot")):
        done = tiny.inside("--resume", whole[0], *more, check=False)
        assert done.returncode and word in done.stderr
    for text in (None, '{"settings": {', "[]", "{}"):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        done = tiny.inside("--resume", tmp_path, check=False)
        assert done.returncode and "no config.json of a run there" in done.stderr
    done = tiny.inside("--resume", whole[0], "--steps", 5, check=False)  # it would not have stopped at all
    assert done.returncode and "already reached step_6, and --steps is 5" in done.stderr
    finished = tiny.inside("--resume", whole[0], "--eval-n", 5)  # the table again
    assert "before" in finished.stdout and "nothing is left to do" in finished.stdout


def test_the_closing_table_shows_what_both_ends_measured(tmp_path):
    """A run may be resumed with other --eval-k."""
    lines = [{"step": step} | {f"pass@{k}{end}": 0.5 for k in ks for end in ("", "_low", "_high")}
             for step, ks in ((0, (1, 4)), (6, (1, 8)))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = exprl.closing_table(tmp_path, Settings(eval_k=(1, 8)))
    assert "pass@1 " in table and "pass@8" not in table and "after, step 6" in table


def test_the_closing_table_compares_like_with_like(world, tmp_path):
    """A run may be resumed with other held-out problems, or fewer."""
    run = tmp_path / "run"
    tiny.inside(*world[1], "--method", "sft", "--overlong", "zero", "--group", 1, "--max-new-tokens", 60,
                "--steps", 1, "--eval-data", world[0] / "eval.jsonl", "--eval-n", 1, "--eval-k", 1,
                "--out", run)
    done = tiny.inside("--resume", run, "--steps", 2, "--eval-limit", 2)
    assert "from here on --eval-limit 2, it was 200\n" in done.stderr and " references a step" in done.stdout
    table = done.stdout
    assert "before" not in table and "after, step 2" in table and "step 0 is not shown" in table
    table = tiny.inside("--resume", run, "--steps", 3).stdout
    assert "before, step 2" in table and "after, step 3" in table and "step 0 is not shown" in table


def test_flags_that_make_no_sense_are_refused(world, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for flags, word in ((["--kl", "nan"], "--kl must be a number"), (["--grad-clip", "nan"], "--grad-clip"),
                        (["--resume", "run", "--preset", "paper"], "not allowed with"),
                        (["--method", "distill", "--overlong", "zero", "--distill-kl", "full"],
                         "--kl and --entropy-bonus"),
                        (["--method", "distill"], "--overlong has no effect under --method distill"),
                        (["--method", "sft", "--reference", "none"], "--reference has no effect"),
                        (["--step-credit", "score", "--method", "process", "--process-norm", "end"],
                         "--step-credit has no effect"),
                        (["--seed", "-1"], "--seed must be at least 0"),
                        (["--seed", str(2**32)], "--seed must be below 2^32"),
                        (["--lr", "inf"], "need --lr > 0"), (["--temperature", "inf"], "at least 0.0001"),
                        (["--method", "process", "--norm", "mean"], "--norm has no effect"),
                        (["--warmup", "20"], "--warmup is a share"),
                        (["--judge-device", "+2"], "N must be at least the number of processes"),
                        (["--step-view", "segment"], "--step-view has no effect under --method outcome")):
        with pytest.raises(SystemExit):
            exprl.parse([*world[1], *flags])
        assert word in capsys.readouterr().err
    for flags, said in (([], True), (["--updates", "2"], False)):
        exprl.parse([*world[1], "--clip-high", "0.4", *flags])
        assert ("--clip-high has no effect" in capsys.readouterr().err) == said


def test_a_resumed_run_says_what_is_no_longer_what_it_was(world, tmp_path, capsys):
    home, run = shutil.copytree(world[0], tmp_path / "home"), tmp_path / "run"
    flags = [str(flag).replace(str(world[0]), str(home)) for flag in world[1]]
    tiny.inside(*flags, "--kl", 0.1, "--steps", 1, "--out", run)
    assert "WARNING" not in tiny.inside("--resume", run, "--steps", 2, "--dtype", "bfloat16").stderr
    assert "WARNING" not in tiny.inside("--resume", run, "--steps", 3, "--kl", 0).stderr
    tiny.save(home / "judge", seed=3, spread=0.5)
    done = tiny.inside("--resume", run, "--steps", 4, "--kl", 0.1)
    assert "the judge is not what it was" in done.stderr and "the frozen start is" not in done.stderr
    config = json.loads((run / "config.json").read_text())
    assert {*config["frozen"]} == {"judge", "frozen start"}  # the latter over a time without a KL
    for method, name in (("sft", "overlong"), ("distill", "loss_mean")):  # heard by neither, once no error
        config["settings"] |= {"method": method, name: {"overlong": "judge", "loss_mean": "trace"}[name]}
        (run / "config.json").write_text(json.dumps(config))
        settings, _ = exprl.parse(["--resume", str(run)])
        assert getattr(settings, name) == getattr(Settings, name)
    (run / "config.json").write_text(json.dumps(
        {"settings": json.loads((run / "config.json").read_text())["settings"] | {"bonus": 1.0}}))
    with pytest.raises(SystemExit):
        exprl.parse(["--resume", str(run)])
    assert "settings this does not have: bonus" in capsys.readouterr().err


def test_held_out_problems_that_are_trained_on_are_counted(world, capsys):
    build(world, "--eval-data", world[0] / "eval.jsonl")
    assert "3 of 3 held-out problems are training problems, too" in capsys.readouterr().err


def test_what_a_kill_before_the_first_step_leaves_is_no_run(world, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("lock", "config.json.tmp"):
        (run / name).touch()
    tiny.inside(*world[1], "--steps", 1, "--out", run)
    assert (run / "model").exists()


def test_gradients_of_a_shared_token_are_added_in_one_order(world):
    """Threads that add to one place as they come gave the demo another gradient each time, from step 3 on."""
    state, settings = build(world)
    batch = made_up_batch(state, settings, GRADES)
    hidden, _ = exprl.predictors(state.policy.model, batch.ids, batch.mask)
    assert type(hidden.grad_fn).__name__ == "IndexSelectBackward0"  # not IndexBackward0


def test_the_sampling_copy_turns_by_the_same_angles(world, monkeypatch):
    """Rotary frequencies in bfloat16 would be whole turns off after some thousand tokens."""
    monkeypatch.setattr(exprl, "fast_dtype", lambda dtype, device: dtype)
    state, _ = build(world, "--dtype", "bfloat16")
    ours, theirs = (lm.base_model.rotary_emb.inv_freq for lm in (state.sampling, state.policy.model))
    assert next(state.sampling.parameters()).dtype == torch.bfloat16 and torch.equal(ours, theirs)


def test_grpo_needs_no_judge(world, tmp_path):
    done = tiny.inside(*world[1], "--method", "grpo", "--judge", "/nowhere/at/all", "--steps", 1,
                       "--out", tmp_path / "g")
    line = json.loads((tmp_path / "g" / "metrics.jsonl").read_text().split("\n")[:-1][0])
    assert line["score"] is None and line["judge_tok_s"] is None and "no judge" in done.stdout


def test_out_of_memory_names_the_flag():
    refused = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    for error in refused, torch.OutOfMemoryError("x"), MemoryError():
        assert "lower --microbatch-tokens" in exprl.explain(error, "training")
    assert "Error: shape" in exprl.explain(RuntimeError("shape"), "training")
    assert all("--" in remedy for remedy in exprl.REMEDIES.values())


def test_without_model_flags_the_embedded_miniature_runs(tmp_path):
    run = tmp_path / "demo"
    done = tiny.run("exprl.py", "--steps", 2, "--questions", 4, "--eval-limit", 6, "--show-every", 1,
                    "--out", run)
    assert "before, step 0" in done.stdout and "after, step 2" in done.stdout and "--- step 1" in done.stdout
    steps = [m for m in exprl.read_jsonl(run / "metrics.jsonl") if "score" in m]
    assert len(steps) == 2
    assert all(0 < m["score"] < 1 and m["unread"] == 0 and m["headings"] > 1 for m in steps)
    grades = {record["grades"][0] for record in exprl.read_jsonl(run / "rollouts.jsonl")}
    assert len(grades) > 10  # a language model's expected grades, not five steps of a script


def test_the_cache_is_sized_when_all_models_are_loaded(world, monkeypatch):
    done, load = [], exprl.load_lm
    monkeypatch.setattr(exprl, "load_lm", lambda name, *more: done.append(name) or load(name, *more))
    monkeypatch.setattr(exprl, "cache_room", lambda *_: done.append("cache"))
    build(world)
    assert done[-1] == "cache" and str(world[0] / "judge") in done


def test_the_cache_leaves_room_for_gradients_and_moments(monkeypatch):
    net = tiny.model()
    size = sum(p.numel() for p in net.parameters())
    assert exprl.cache_room(net, "cpu") is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * size + 2**31, 2**40))
    assert exprl.cache_room(net, "cuda:0") == pytest.approx(0.6)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, 2**40))
    with pytest.raises(SystemExit, match="take a smaller --model, another --judge-device, or more GPUs"):
        exprl.cache_room(net, "cuda:0")
