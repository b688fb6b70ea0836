"""The computed memory of a step beside what PyTorch's allocator counted."""

import json
import random
import re

import pytest
import tiny
import torch

import exprl
from experiments.bench_head import peak_extra_bytes
from experiments.memory import main, memory
from sample import Rollout

SMALL = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, head_dim=16)
MIDDLE = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6, head_dim=32,
              vocab_size=8192)
# SmolLM2-135M's widths, a sixth of its layers
SMOLLM = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=5, num_attention_heads=9,
              num_key_value_heads=3, head_dim=64, vocab_size=49152)


@pytest.mark.parametrize("family, dtype, checkpointing, shape", [
    ("qwen3", "bfloat16", False, SMALL), ("qwen3", "float32", True, SMALL),
    ("qwen2", "bfloat16", True, MIDDLE), ("llama", "float32", False, MIDDLE),
    ("llama", "bfloat16", False, SMOLLM)])
def test_training_peak_is_within_a_tenth_of_the_computed_one(tmp_path, monkeypatch, family, dtype,
                                                             checkpointing, shape):
    monkeypatch.setattr(exprl, "fast_dtype", tiny.as_asked)
    prompt, new, rows = (100, 100, 16) if shape is not SMOLLM else (60, 60, 8)
    _, flags = tiny.training_world(tmp_path)
    tiny.save(tmp_path / "policy", family=family, **shape)
    flags += ["--method", "grpo", "--kl", "0", "--dtype", dtype, "--questions", str(rows // 4),
              "--max-new-tokens", str(new), "--microbatch-tokens", str(rows // 2 * (prompt + new))]
    settings, _ = exprl.parse(flags + ["--checkpoint-activations"] * checkpointing)
    state, rng = exprl.build_state(settings), random.Random(0)
    draw = lambda count: tuple(rng.randrange(256) for _ in range(count))
    prompts = [draw(prompt) for _ in range(rows // 4)]
    rollouts = [Rollout(prompts[i // 4], draw(new), (-1.0,) * new, True) for i in range(rows)]
    batch = exprl.credit(settings, exprl.collate(rollouts, "cpu"),
                         {i: exprl.Verdict((float(i % 2),)) for i in range(rows)})
    for parameter in state.policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    exprl.optimizer_step(state, settings, 1e-6)  # makes AdamW's moments
    measured = peak_extra_bytes(lambda: exprl.update(state, settings, batch, 1e-6), "cpu")
    parts = memory(state.policy.model.config, settings, 1, state.dtype, "cpu", prompt)
    computed = parts["weights, gradients, AdamW"] / 4 + parts["activations"] + parts["head"]
    assert 0.9 < computed / measured < 1.1, (computed, measured)


def test_parts_follow_the_flags():
    config = tiny.model(**MIDDLE).config
    at = lambda ranks=1, **changes: memory(config, exprl.Settings(**changes), ranks)
    one, eight = at(), at(8)
    assert eight["weights, gradients, AdamW"] * 8 == pytest.approx(one["weights, gradients, AdamW"])
    assert eight["sampling copy"] == one["sampling copy"] > 0
    assert at(method="grpo", kl=0)["frozen start"] == 0 < one["frozen start"]
    assert at(checkpoint_activations=True)["activations"] < one["activations"] / 3
    assert at(max_rows=8)["cache, logits"] < one["cache, logits"] / 8
    assert one["peak"] == sum(size for name, size in one.items() if name != "peak")


def test_the_memory_table_of_readme_is_what_the_program_prints(capsys):
    main()
    assert capsys.readouterr().out in (tiny.ROOT / "README.md").read_text()


def test_dry_run_prints_computed_and_measured_and_leaves_no_run(tmp_path):
    home, flags = tiny.training_world(tmp_path)
    done = tiny.run("exprl.py", *flags, "--dry-run", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (home / "runs").exists()
    computed = float(re.search(r"peak +([\d.]+) GB", done.stdout)[1])
    measured = float(re.search(r"measured.*: ([\d.]+) GB", done.stdout)[1])
    assert "traces of 12" in done.stdout and 0 <= computed < measured


def test_a_dry_run_of_sft_takes_the_longest_references(tmp_path, capsys):
    home, flags = tiny.training_world(tmp_path)
    row = dict(question="?", answer="1", domain="math", solution="step " * 40 + "\\boxed{1}")
    with open(home / "train.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    exprl.main([*flags, "--method", "sft", "--max-new-tokens", "500", "--dry-run"])
    length = len(row["solution"].encode()) + 1  # a token a byte, and the turn's end
    assert f"traces of {length}:" in capsys.readouterr().out
