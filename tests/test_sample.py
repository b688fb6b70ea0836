"""The sampler against transformers: greedy tokens, teacher-forced log-probs, distribution, refill, limits."""

import json
import os
import random
from pathlib import Path

import pytest
import tiny
import torch

from sample import Sampler, choose, load_lm, resolve_model, trace_noise


def random_prompts(count, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def generate(net, prompt, tokens):
    ids = torch.tensor([prompt])
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt):].tolist()


def teacher_forced(net, rollout, temperature):
    ids = torch.tensor([rollout.prompt_ids + rollout.token_ids])
    with torch.no_grad():
        logp = (net(ids).logits[0].float() / temperature).log_softmax(-1)
    start = len(rollout.prompt_ids) - 1
    return [logp[start + i, t].item() for i, t in enumerate(rollout.token_ids)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_is_generate_token_by_token(family):
    net, ends = tiny.model(family), list(range(0, 260, 20))  # several end tokens: rows end at different times
    net.generation_config.eos_token_id = ends
    prompts = random_prompts(24, 90)
    rollouts = Sampler(net, max_rows=5, prefill_tokens=100).sample(prompts, max_new_tokens=64, temperature=0)
    assert any(r.finished for r in rollouts) and not all(r.finished for r in rollouts)
    for prompt, rollout in zip(prompts, rollouts):
        assert list(rollout.token_ids) == generate(net, prompt, 64)
        assert rollout.finished == (rollout.token_ids[-1] in ends)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_teacher_forced_ones(family, temperature):
    net = tiny.model(family, seed=1)
    rollouts = Sampler(net, max_rows=7).sample(random_prompts(10, 60), 3, 40, temperature, seed=5)
    for r in rollouts:
        assert len(r.logprobs) == len(r.token_ids) and max(r.logprobs) <= 0
        assert r.logprobs == pytest.approx(teacher_forced(net, r, temperature), abs=1e-4)


def test_a_row_does_not_depend_on_its_neighbours():
    net = tiny.model(seed=2)
    prompts = random_prompts(9, 50)
    together = Sampler(net, max_rows=64).sample(prompts, 2, 30, seed=3)
    crowded = Sampler(net, max_rows=3, prefill_tokens=1).sample(prompts, 2, 30, seed=3)
    assert [r.token_ids for r in together] == [r.token_ids for r in crowded]
    alone = Sampler(net).sample(prompts[:1], 2, 30, seed=3)  # traces 0 and 1 keep their numbers
    assert [r.token_ids for r in alone] == [r.token_ids for r in together[:2]]
    assert together[0].token_ids != together[1].token_ids
    assert Sampler(net).sample(prompts, 2, 30, seed=4)[0].token_ids != together[0].token_ids


def test_shared_prefixes_change_nothing():
    net = tiny.model(seed=3)
    head, other = list(range(40)), list(range(60, 75))
    prompts = ([head + p for p in random_prompts(5, 20)] + [other + p for p in random_prompts(4, 20, seed=9)]
               + [[1, 2]])
    shared = [len(head)] * 5 + [len(other)] * 4 + [0]
    plain = Sampler(net, max_rows=4).sample(prompts, 2, 20, seed=1)
    for prefill_tokens in (1, 30, 8192):
        sampler = Sampler(net, max_rows=4, prefill_tokens=prefill_tokens)
        assert ([r.token_ids for r in sampler.sample(prompts, 2, 20, seed=1, shared=shared)]
                == [r.token_ids for r in plain])
        logits = sampler.next_logits(prompts, [3, 1, 250], shared=shared)
        with torch.no_grad():
            expected = torch.stack([net(torch.tensor([p])).logits[0, -1, [3, 1, 250]] for p in prompts])
        assert torch.allclose(logits, expected, atol=1e-4)


def test_sampled_tokens_follow_the_distribution():
    """Chi-square over the first token: 20,000 draws, 260 tokens in bins of at least 20 expected draws."""
    net, draws = tiny.model(seed=4), 20_000
    rollouts = Sampler(net, max_rows=1000).sample([[5, 6, 7]], draws, 1, temperature=1.3, seed=11)
    with torch.no_grad():
        p = (net(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 1.3).softmax(-1)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=260).double()
    big = p * draws >= 20
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([p[big], p[~big].sum()[None]]) * draws
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # 4 standard deviations


def test_choose_on_hard_rows():
    logits = torch.tensor([[-1e9, 0.0, -1e9, -1e9], [1e4, -1e4, 1e4, 0.0], [0.0, 0.0, 0.0, -float("inf")]])
    for u in (0.0, 0.25, 0.4999, 0.75, 1 - 2**-24):
        token, logp = choose(logits, 1.0, torch.full((3,), u))
        assert token[0] == 1 and token[1] in (0, 2) and token[2] < 3
        assert (logp <= 0).all() and logp.isfinite().all()
    token, logp = choose(logits, 0.0, torch.zeros(3))
    assert token[0] == 1 and token[1] == 0


def test_noise_is_a_function_of_seed_trace_and_position():
    assert torch.equal(trace_noise(3, 7, 50)[:20], trace_noise(3, 7, 20))
    assert not torch.equal(trace_noise(3, 7, 20), trace_noise(3, 8, 20))
    assert not torch.equal(trace_noise(3, 7, 20), trace_noise(4, 7, 20))
    assert float(trace_noise(2**80, 2**40, 10_000).max()) <= 1


def test_end_tokens_and_empty_input():
    net = tiny.model()
    assert Sampler(net).sample([]) == []
    rollout = Sampler(net).sample([[1]], max_new_tokens=400, seed=1, end_ids=list(range(128)))[0]
    assert rollout.finished and rollout.token_ids[-1] < 128 and all(t >= 128 for t in rollout.token_ids[:-1])
    assert not Sampler(net).sample([[1]], max_new_tokens=8, end_ids=[])[0].finished


def test_limits_are_refused_before_sampling():
    net = tiny.model(context=64)
    with pytest.raises(ValueError, match="prompt 1 has 40 tokens.*--max-new-tokens"):
        Sampler(net).sample([[1], [1] * 40], max_new_tokens=30)
    with pytest.raises(ValueError, match="--cache-gb"):
        Sampler(net, cache_gb=1e-6).sample([[1]], max_new_tokens=30)
    with pytest.raises(ValueError, match="negative"):
        Sampler(net).sample([[1]], max_new_tokens=3, temperature=-1)
    with pytest.raises(ValueError, match="at least one must be its own"):
        Sampler(net).sample([[1, 2]], max_new_tokens=3, shared=[2])


def test_attention_is_restored_even_after_an_error():
    net = tiny.model()
    before = net.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"):
        Sampler(net).sample([[1]] * 3, max_new_tokens=3,
                            progress=lambda n: (_ for _ in ()).throw(RuntimeError("stop")))
    assert net.config._attn_implementation == before
    assert generate(net, [1, 2, 3], 5)


def test_model_names(tmp_path, capsys):
    assert resolve_model("Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    assert resolve_model("SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_model("Llama-3.2-1B-Instruct") == "meta-llama/Llama-3.2-1B-Instruct"
    assert resolve_model("me/mine") == "me/mine"
    folder = tiny.save(tmp_path / "m")
    assert resolve_model(str(folder)) == str(folder)
    for bad in ("mystery", "./nowhere/model", str(tmp_path)):
        with pytest.raises(SystemExit):
            resolve_model(bad)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # pickles are never loaded
    with pytest.raises(SystemExit, match="safetensors"):
        load_lm(str(folder))


def test_other_architectures_are_refused(tmp_path):
    folder = tiny.save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(
        config | {"layer_types": ["full_attention", "sliding_attention"]}))
    with pytest.raises(SystemExit, match="sliding_attention"):
        load_lm(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    tok = tiny.tokenizer()
    tok.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tok.save_pretrained(folder)
    with pytest.raises(SystemExit, match="chat template"):
        load_lm(str(folder))


def test_hub_model_from_a_local_cache(tmp_path):
    """The hub's own cache layout, read offline by real code: models--owner--name/{refs,snapshots,blobs}."""
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--Qwen--Qwen2.5-Tiny"
    tiny.save(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    data = tiny.problems_file(tmp_path / "p.jsonl", 2)
    done = tiny.run("sample.py", "--model", "Qwen2.5-Tiny", "--data", data, "--n", 2, "--max-new-tokens", 4,
                    env={"HF_HOME": str(tmp_path)})
    assert "model Qwen2.5-Tiny -> Qwen/Qwen2.5-Tiny" in done.stderr and "pass@2" in done.stdout
    missing = tiny.run("sample.py", "--model", "Qwen2.5-Absent", "--data", data, check=False,
                       env={"HF_HOME": str(tmp_path)})
    assert missing.returncode and "HF_HOME" in missing.stderr and "Traceback" not in missing.stderr


def test_program_writes_traces_and_prints_pass_at_k(tmp_path):
    folder, data = tiny.save(tmp_path / "m"), tiny.problems_file(tmp_path / "p.jsonl", 5)
    done = tiny.run("sample.py", "--model", folder, "--data", data, "--n", 4, "--limit", 3,
                    "--max-new-tokens", 8, "--out", tmp_path / "t.jsonl", "--seed", 2)
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().split("\n")[:-1]]
    assert len(records) == 12 and {"problem", "text", "correct", "finished", "tokens"} <= set(records[0])
    assert "pass@1" in done.stdout and "pass@4" in done.stdout and "95% interval" in done.stdout
    again = tiny.run("sample.py", "--model", folder, "--data", data, "--n", 4, "--limit", 3,
                     "--max-new-tokens", 8, "--out", tmp_path / "u.jsonl", "--seed", 2)
    assert (tmp_path / "u.jsonl").read_text() == (tmp_path / "t.jsonl").read_text() and again.stdout
    bad = tiny.run("sample.py", "--model", folder, "--data", data, "--n", 2, "--k", 4, check=False)
    assert bad.returncode and "--k" in bad.stderr


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm", "qwen"])
def test_real_models_greedy_and_logprobs(name):
    """SmolLM2-135M, Qwen2.5-0.5B, fp32: 64 greedy tokens as generate, log-probs teacher forcing to 1e-4."""
    home = os.environ.get("EXPRL_REAL_MODELS")
    if not home or not (Path(home) / name).is_dir():
        pytest.skip("EXPRL_REAL_MODELS names no folder with real models")
    lm = load_lm(str(Path(home) / name))
    questions = ["What is 17 * 23?", "Tom has 3 boxes of 12 eggs and drops 5 eggs. How many are whole?",
                 "Hi " * 60]
    prompts = [lm.chat(q) for q in questions]
    for prompt, rollout in zip(prompts, Sampler(lm.model, max_rows=2).sample(prompts, 1, 64, temperature=0)):
        assert list(rollout.token_ids) == generate(lm.model, prompt, 64)
    for rollout in Sampler(lm.model, max_rows=4).sample(prompts, 2, 24, 0.8, seed=1):
        assert rollout.logprobs == pytest.approx(teacher_forced(lm.model, rollout, 0.8), abs=1e-4)
