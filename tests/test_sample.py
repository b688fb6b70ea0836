"""The sampler against transformers: greedy tokens, teacher-forced log-probs, distribution, refill, limits."""

import argparse
import gc
import importlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial, wraps
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import sample
from data import load_problems
from kernels.paged_attention import triton_paged_attention
from kernels.prefill_attention import plan_tiles
from sample import PAGE, Cache, Sampler, bucket, load_lm, pages_of, resolve_model, trace_noise


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


LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


@pytest.mark.parametrize("family, options", [("qwen2", {}), ("qwen3", dict(tie_word_embeddings=False)), (
    "llama", dict(rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=False))])
def test_the_forward_pass_is_transformers_own(family, options):
    """With biases and norms that are not 0 and 1. float32: the same logits; bfloat16: as near to them."""
    net = tiny.model(family, seed=8, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    prompts, asked = random_prompts(30, 200), list(range(260))

    def logits(of):
        ours = Sampler(of).next_logits(prompts, asked)
        with torch.no_grad():
            theirs = [of(torch.tensor([p])).logits[0, -1].float() for p in prompts]
        return ours, torch.stack(theirs)

    ours, exact = logits(net)
    assert torch.allclose(ours, exact, atol=1e-4)
    rollout = Sampler(net).sample(prompts[:1], 1, 40, temperature=0)[0]
    assert list(rollout.token_ids) == generate(net, prompts[0], 40)
    ours, theirs = logits(net.bfloat16())
    assert (ours - exact).square().mean() < 1.1 * (theirs - exact).square().mean()


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
    """Prompts that start alike, at and off the ends of pages: shared pages, the same logits and traces."""
    net = tiny.model(seed=3)
    head, other = [i % 250 for i in range(100)], list(range(60, 124))
    prompts = ([head + p for p in random_prompts(5, 20)] + [other + p for p in random_prompts(4, 70, seed=9)]
               + [[1, 2], head, head, head[:96], other])
    for prefill_tokens in (1, 30, 8192):
        sampler = Sampler(net, max_rows=4, prefill_tokens=prefill_tokens)
        logits = sampler.next_logits(prompts, [3, 1, 250])
        with torch.no_grad():
            expected = torch.stack([net(torch.tensor([p])).logits[0, -1, [3, 1, 250]] for p in prompts])
        assert torch.allclose(logits, expected, atol=1e-4)
        rollouts = sampler.sample(prompts, 2, 20, temperature=0)
        for prompt, pair in zip(prompts, zip(rollouts[::2], rollouts[1::2])):
            assert pair[0].token_ids == pair[1].token_ids
            assert list(pair[0].token_ids) == generate(net, prompt, 20)


needs_interpreter = pytest.mark.skipif(sample.triton is None or torch.cuda.is_available(),
                                       reason="Triton's interpreter stands for a GPU where there is none")


@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_interpreter)])
def test_forks_read_every_cut_in_one_pass(tiles, monkeypatch):
    """Also as on a GPU, by Triton's kernel."""
    if tiles:
        monkeypatch.setattr(sample, "plan_prefill", lambda *args: plan_tiles(*args[:4]))
    net = tiny.model(seed=5)
    prompts = [[i % 250 for i in range(80)] + p for p in random_prompts(6, 60, seed=1)]
    forks = [[(len(p), []), (40, [7, 8, 9]), (len(p), [7]), (40, []), (len(p) - 1, [1] * 40)]
             for p in prompts]
    forks[2] = []
    for prefill_tokens in (100,) if tiles else (1, 100, 8192):
        logits = Sampler(net, prefill_tokens=prefill_tokens).next_logits(prompts, [3, 1], forks)
        asked = [p[:cut] + suffix for p, some in zip(prompts, forks) for cut, suffix in some]
        with torch.no_grad():
            expected = torch.stack([net(torch.tensor([ids])).logits[0, -1, [3, 1]] for ids in asked])
        assert torch.allclose(logits, expected, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be cut"):
        Sampler(net).next_logits([[1, 2]], [3], [[(0, [1])]])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device")])])
def test_masked_prefill_in_bfloat16_at_every_alignment(device):
    """65 to 98 keys and a mask: no worse than plain passes in bfloat16. GPU kernels
    pad such masks, and take the heads' repetition by its strides."""
    shape = dict(hidden_size=128, num_attention_heads=6, num_key_value_heads=2, head_dim=64)
    exact = tiny.model(seed=5, **shape).bfloat16().double()
    net = tiny.model(seed=5, **shape).to(device, torch.bfloat16)
    head = [i % 250 for i in range(64)]
    prompts = [head + [(7 * n * i) % 250 for i in range(n)] for n in range(1, 35)]
    forks = [[(len(p), []), (40, [7, 8, 9]), (len(p) - 1, [5] * 4)] for p in prompts]
    got = Sampler(net, prefill_tokens=300).next_logits(prompts, list(range(260)), forks).double().cpu()
    asked = [p[:cut] + suffix for p, some in zip(prompts, forks) for cut, suffix in some]
    with torch.no_grad():
        want, plain = (torch.cat([lm(torch.tensor([ids], device=lm.device)).logits[:, -1].double().cpu()
                                  for ids in asked]) for lm in (exact, net))
    error, plain_error = ((x - want).norm(dim=1) / want.norm(dim=1) for x in (got, plain))
    assert error.max() < 1.5 * plain_error.max() and error.mean() < 1.2 * plain_error.mean()


@pytest.mark.parametrize("chunk", [2048, 9])
def test_target_logprobs_are_those_of_a_full_pass(chunk, monkeypatch):
    """Those of many long suffixes, too, which take several runs behind one prompt."""
    monkeypatch.setattr(sample, "cut_pieces", partial(sample.cut_pieces, chunk=chunk))
    net = tiny.model(seed=5)
    prompts = [[i % 250 for i in range(80)] + p for p in random_prompts(4, 60, seed=1)]
    forks = [[(len(p), [7], [5, 6, 9]), (40, [7, 8, 9], [1]), (len(p), [3, 4], [2, 2]),
              (50, [5] * 12, [6] * 9), (60, [4], [1])] for p in prompts]
    for sampler in (Sampler(net, prefill_tokens=100), Sampler(net)):
        for covered in (True, False):
            sampler.covered = covered
            got = iter(sampler.target_logprobs(prompts, forks))
            for p, some in zip(prompts, forks):
                for cut, suffix, target in some:
                    ids = torch.tensor([p[:cut] + suffix + target])
                    with torch.no_grad():
                        logp = net(ids).logits[0, -len(target) - 1 : -1].log_softmax(-1)
                    assert torch.allclose(next(got), logp[range(len(target)), target], atol=1e-4)


def test_suffixes_that_start_alike_are_computed_once():
    """The judge's likelihoods: one ask, several targets, behind one cut and another."""
    net, ask = tiny.model(seed=5), [7, 8, 9, 10, 11]
    prompts = [[i % 250 for i in range(80)] + p for p in random_prompts(3, 60, seed=2)]
    targets = [[5, 6, 9], [5, 6, 4, 1], [3], [2, 2]]
    forks = [[(cut, ask, target) for cut in (60, len(p)) for target in targets] for p in prompts]
    sampler = Sampler(net)
    got = iter(sampler.target_logprobs(prompts, forks))
    for p, some in zip(prompts, forks):
        for fork in some:
            alone, = Sampler(net).target_logprobs([p], [[fork]])
            assert torch.allclose(next(got), alone, atol=1e-5)
    # behind each cut: the ask with 5 6, then 4, nothing, 2; of the prompts the first page is the same
    assert sampler.tokens == sum(map(len, prompts)) - 2 * PAGE + len(prompts) * 2 * (len(ask) + 4)


@pytest.mark.parametrize("many, rows, pages", [(9, 5, None), (9, 5, 7), (24, 24, None), (24, 24, 9)])
def test_a_forced_stem_continues_the_reply(many, rows, pages):
    """The critique judge: reply, stem, logits, with pauses when pages are few. Of 24 rows three are read at
    once, unless pages run out before."""
    net = tiny.model(seed=6)
    prompts = [[i % 250 for i in range(70)] + p for p in random_prompts(many, 30, seed=4)]
    sampler = Sampler(net, max_rows=rows, cache_gb=pages and pages * page_bytes(net) / 2**30)
    ends, stem = list(range(0, 260, 20)), list(range(100, 140))
    rollouts, logits = sampler.reply_logits(prompts, stem, [3, 1], 40, end_ids=ends)
    assert bool(sampler.pauses) == bool(pages)
    assert any(r.finished for r in rollouts) and not all(r.finished for r in rollouts)
    for prompt, rollout, row in zip(prompts, rollouts, logits):
        net.generation_config.eos_token_id = ends
        assert list(rollout.token_ids) == generate(net, prompt, 40)
        body = rollout.token_ids[: len(rollout.token_ids) - rollout.finished]
        with torch.no_grad():
            expected = net(torch.tensor([prompt + list(body) + stem])).logits[0, -1, [3, 1]]
        assert torch.allclose(row, expected, atol=1e-4)


def page_bytes(net):
    c = net.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * PAGE * net.dtype.itemsize


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pauses_lose_nothing(family):
    """A cache of 14 pages for 8 rows: rows are paused, resumed, and end as they would with room for all.

    In float64: a resumed row is computed in another order, and one draw in some thousands of float32 is close
    enough to a token's edge to notice."""
    net = tiny.model(family, seed=2).double()
    prompts = random_prompts(9, 70)
    roomy, tight = Sampler(net), Sampler(net, max_rows=8, cache_gb=14 * page_bytes(net) / 2**30)
    for n, temperature in ((1, 0.0), (3, 1.0)):
        want = roomy.sample(prompts, n, 70, temperature, seed=3)
        got = tight.sample(prompts, n, 70, temperature, seed=3)
        assert [r.token_ids for r in got] == [r.token_ids for r in want]
        for a, b in zip(got, want):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert tight.pauses > 10 and roomy.pauses == 0


def test_pages_under_random_use():
    """Thousands of random admissions, growths, pauses and ends; after each, the invariants: every page is
    free or held, by as many as it says, by several only where the tokens before and in it are the same; and
    what was written to a page is there, wherever it was moved."""
    rng, cache = random.Random(0), Cache(torch.full((2, 2, 60, 1, PAGE, 1), torch.nan))
    live, serial = [], iter(range(1, 10**9))  # live: [pages, ids, how many pages are full]
    written = {}  # page: what it holds

    def fill(pages):
        for page in pages:
            assert not cache.pool[:, :, page.index].any()  # nothing of a former holder
            written[page] = next(serial)
            cache.pool[:, :, page.index] = written[page]

    for step in range(3000):
        kind = rng.random()
        if kind < 0.4 and len(live) < 12:
            ids = [rng.randrange(2) for _ in range(rng.randrange(1, 4))]
            ids = [t for t in ids for _ in range(PAGE)] + [5] * rng.randrange(PAGE)  # few kinds: many share
            reuse, spare, free = rng.randrange(len(ids) + 1), rng.randrange(4), list(cache.free)
            placed = cache.place(ids, reuse, spare)
            if placed is None:
                assert cache.free == free and pages_of(len(ids)) + spare > len(free)
            else:
                pages, found = placed
                assert found <= reuse and found % PAGE == 0 and len(cache.free) >= spare
                fill(pages[found // PAGE :])
                live.append([pages, ids, len(ids) // PAGE])
        elif kind < 0.6 and live and cache.free:
            taken = cache.take(1)
            fill(taken)
            rng.choice(live)[0].extend(taken)
        elif kind < 0.7 and live:  # another trace of the same prompt
            pages, ids, full = rng.choice(live)
            live.append([cache.share(pages[:full]), ids, full])
        elif kind < 0.95 and live:
            cache.drop(live.pop(rng.randrange(len(live)))[0])
        else:
            cache.compact()
            assert cache.holes() == 0
        users, tokens = Counter(), {}  # of a page; the tokens up to its end, as its users see them
        for pages, ids, _ in live:
            users.update(pages)
            for i, page in enumerate(pages):
                tokens.setdefault(page, set()).add(tuple(ids[: (i + 1) * PAGE]))
        taken = {page.index: page for page in users}
        assert sorted([*taken, *cache.free]) == list(range(60))
        assert all(cache.pages[i] is taken.get(i) for i in range(60))
        assert all(page.users == count for page, count in users.items())
        assert all(count == 1 or len(tokens[page]) == 1 for page, count in users.items())
        assert cache.pool[1, 1, list(taken), 0, -1, 0].tolist() == [written[page] for page in taken.values()]
        assert set(cache.known.values()) <= set(taken.values())
    for pages, _, _ in live:
        cache.drop(pages)
    assert sorted(cache.free) == list(range(60)) and not cache.known


@pytest.mark.parametrize("work", ["sample", "read"])
def test_an_interrupt_leaves_no_page_behind(work):
    """Ctrl-C in the middle of a step, a prefill, an admission, and in a judge's pass; the sampler works on as
    before."""
    net = tiny.model(seed=2)
    prompts = random_prompts(9, 70)
    sampler = Sampler(net, max_rows=4, prefill_tokens=64)

    def run():
        if work == "read":
            return sampler.next_logits(prompts, [3, 1]).tolist()
        return [r.token_ids for r in sampler.sample(prompts, 2, 30, seed=1)]

    want = run()
    for name, calls in (("prefill", 2), *((("step", 5), ("decode", 9), ("admit", 7), ("end", 8))
                                          if work == "sample" else ())):
        original, count = getattr(sampler, name), [0]

        def interrupted(*args, original=original, count=count, calls=calls):
            count[0] += 1
            if count[0] == calls:
                raise KeyboardInterrupt
            return original(*args)

        setattr(sampler, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
        delattr(sampler, name)
        assert sampler.cache is None or len(sampler.cache.free) == len(sampler.cache.pages)
        assert sampler.network is None
        assert run() == want


def test_weights_changed_in_place_are_noticed():
    net = tiny.model(seed=2)
    sampler = Sampler(net)
    before = sampler.sample([[1, 2, 3]], 1, 30, temperature=0)[0]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = sampler.sample([[1, 2, 3]], 1, 30, temperature=0)[0]
    assert before.token_ids != after.token_ids and list(after.token_ids) == generate(net, [1, 2, 3], 30)


def test_other_families_take_the_slow_path(capsys):
    """Sliding windows: transformers' own cache, said on stderr; the same results as generate."""
    net = tiny.model(seed=7, use_sliding_window=True, sliding_window=16, max_window_layers=0,
                     layer_types=["full_attention", "sliding_attention"])
    sampler = Sampler(net)
    assert "sliding_attention" in capsys.readouterr().err and not sampler.covered
    prompts, ends = random_prompts(3, 40), list(range(0, 260, 20))
    net.generation_config.eos_token_id = ends
    for prompt, rollout in zip(prompts, sampler.sample(prompts, 1, 40, temperature=0)):
        assert list(rollout.token_ids) == generate(net, prompt, 40)
        assert rollout.finished == (rollout.token_ids[-1] in ends)
    before = sampler.sample(prompts, 2, 20, 0.7, seed=5)
    assert len(before) == 6 and before[0].token_ids != before[1].token_ids
    for r in before:
        assert r.logprobs == pytest.approx(teacher_forced(net, r, 0.7), abs=1e-4)
    rollouts, logits = sampler.reply_logits(prompts, [7, 8], [3, 1], 10)
    bodies = [r.token_ids[: len(r.token_ids) - r.finished] for r in rollouts]
    again = sampler.next_logits([p + list(b) + [7, 8] for p, b in zip(prompts, bodies)], [3, 1])
    assert torch.allclose(logits, again, atol=1e-4)
    rows = []
    hook = net.register_forward_pre_hook(lambda _, args, given: rows.append(len(given["input_ids"])),
                                         with_kwargs=True)
    few = Sampler(net, max_rows=3).sample(prompts[:1], 7, 20, 0.7, seed=5)
    hook.remove()
    assert max(rows) == 3 and len(few) == 7
    assert [r.token_ids for r in few[:2]] == [r.token_ids for r in before[:2]]
    net.gradient_checkpointing_enable()  # in training mode transformers then keeps no cache
    net.train()
    assert [r.token_ids for r in sampler.sample(prompts, 2, 20, 0.7, seed=5)] == [r.token_ids for r in before]
    assert net.training


def test_a_folder_that_only_loads_is_saved_too(tmp_path):
    """Sampling flags without do_sample, as hubs have them: transformers loads and refuses to save them."""
    folder = tiny.save(tmp_path / "m")
    config = folder / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": 256, "temperature": 0.6, "top_p": 0.9}))
    lm = load_lm(str(folder))
    lm.save(tmp_path / "again")
    assert sample.end_tokens(load_lm(str(tmp_path / "again")).model) == sample.end_tokens(lm.model) == [256]
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(SystemExit, match=f"cannot load {folder}"):
        load_lm(str(folder))


def test_weights_side_by_side_are_saved_as_they_were(tmp_path):
    """On a GPU the layers' weights share storages, of which transformers would make copies there."""
    for tied in (True, False):
        folder = tiny.save(tmp_path / f"tied-{tied}", tie_word_embeddings=tied)
        lm = load_lm(str(folder))
        for layer in lm.model.base_model.layers:
            sample.side_by_side([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        lm.save(tmp_path / "again")
        want, got = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
        load_lm(str(tmp_path / "again"))


def test_bfloat16_is_taken_where_a_gpu_has_it(monkeypatch):
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert sample.pick_dtype("auto", "cuda:1") == dtype
        assert sample.pick_dtype("auto", "cpu") == torch.float32
        assert sample.pick_dtype("bfloat16", "cuda") == torch.bfloat16


def test_the_prompts_of_a_judge_are_no_policys(tmp_path):
    folder = tiny.save(tmp_path / "m")
    plain = load_lm(str(folder)).chat("1 + 1?")
    (folder / "prompts.json").write_text(json.dumps({"user": "{question}", "system": {"outcome": "grade"}}))
    assert load_lm(str(folder)).chat("1 + 1?") == plain
    (folder / "prompts.json").write_text(json.dumps({"system": "Be brief."}))
    assert "Be brief." in (lm := load_lm(str(folder))).tokenizer.decode(lm.chat("1 + 1?"))


@pytest.mark.parametrize("family, what", [("Granite", dict(logits_scaling=8.0)), ("Cohere", {}), ("Phi", {})])
def test_a_head_that_is_no_plain_product_is_refused(family, what):
    """Training and judging would take other logits than the model's own."""
    shape = dict(vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                 intermediate_size=64, bos_token_id=0, eos_token_id=256, pad_token_id=256)
    config = getattr(transformers, family + "Config")(**shape, **what)
    with pytest.raises(SystemExit, match="logits are not hidden states times"):
        sample.require_plain_head(transformers.AutoModelForCausalLM.from_config(config))
    layers = ["full_attention", "sliding_attention"]
    sample.require_plain_head(tiny.model(layer_types=layers, sliding_window=16, use_sliding_window=True,
                                         max_window_layers=0))


@pytest.mark.parametrize("text, said", [
    ('{"system": "a",}', "prompts.json: "), ("[]", "it is no object"),
    ('{"User": "a"}', "User: a policy has"), ('{"user": "a", "system": "b"}', "system: a judge has user"),
    ('{"user": "a", "stem": ""}', "not empty or 0"),
    ('{"user": "a", "critique_tokens": "62"}', "critique_tokens"),
])
def test_prompts_that_cannot_be_used_are_named(tmp_path, text, said):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(SystemExit, match=re.escape(said) + ".*correct or delete it"):
        sample.read_prompts(tmp_path / "prompts.json")
    (tmp_path / "prompts.json").write_text('{"system": "a"}', encoding="utf-8-sig")
    assert sample.read_prompts(tmp_path / "prompts.json") == {"system": "a"}


def test_a_family_without_sdpa_loads(tmp_path):
    shape = dict(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                 num_key_value_heads=2, intermediate_size=64, sliding_window=16)
    config = transformers.Gemma2Config(**shape, eos_token_id=256, pad_token_id=256, bos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    net = load_lm(str(tmp_path)).model
    rollout, = Sampler(net).sample([[1, 2, 3]], 1, 40, temperature=0.7)
    assert rollout.logprobs == pytest.approx(teacher_forced(net, rollout, 0.7), abs=1e-4)


def test_what_a_sampler_cannot_do_is_refused(monkeypatch):
    net = tiny.model(seed=2)
    sampler = Sampler(net)
    with pytest.raises(sample.Refused, match="empty suffix"):
        sampler.target_logprobs([[1, 2, 3]], [[(3, [], [4, 5])]])
    again = lambda *_: sampler.sample([[1, 2, 3]], 1, 4)
    with pytest.raises(RuntimeError, match="is at work"):
        sampler.sample([[1, 2, 3]], 2, 8, on_trace=again)
    assert again()
    sampler.covered = False
    monkeypatch.setattr(net, "forward", lambda **_: SimpleNamespace(logits=torch.zeros(1, 1, 260)))
    with pytest.raises(sample.Refused, match="no cache to go on from"):
        again()


def test_sampled_tokens_follow_the_distribution():
    """Chi-square over the first token: 20,000 draws, 260 tokens in bins of at least 20 expected draws."""
    net, draws = tiny.model(seed=4), 20_000
    rollouts = Sampler(net, max_rows=1000).sample([[5, 6, 7]], draws, 1, temperature=1.3, seed=11)
    with torch.no_grad():
        p = (net(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 1.3).softmax(-1)
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts]), minlength=260).double()
    tiny.assert_distributed(counts, p, draws)


def test_noise_is_a_function_of_seed_trace_and_position():
    assert (trace_noise(3, 7, 50)[:20] == trace_noise(3, 7, 20)).all()
    assert (trace_noise(3, 7, 20) != trace_noise(3, 8, 20)).any()
    assert (trace_noise(3, 7, 20) != trace_noise(4, 7, 20)).any()
    assert trace_noise(2**80, 2**40, 10_000).max() <= 1
    assert trace_noise(5, 3, 1)[0] == pytest.approx(0.92772645)  # what it always was
    for seed in (2**31, 2**32 - 1):  # as exprl.py makes one of its seed and the step: no low bit is lost
        assert len({trace_noise(seed << 32 | step, 3, 1)[0] for step in range(9)}) == 9


def test_a_part_of_a_batch_draws_what_the_whole_draws():
    net = tiny.model()
    prompts = [[5, 6, 7], [8] * 40, [9, 10], [5, 6, 7]]
    whole = Sampler(net).sample(prompts, 3, 20, seed=4)
    part = Sampler(net).sample([prompts[3], prompts[1]], 3, 20, seed=4, places=[3, 1])
    assert [r.token_ids for r in part] == [r.token_ids for r in whole[9:] + whole[3:6]]
    tight = Sampler(net, max_rows=2).sample([prompts[3], prompts[1]], 3, 20, seed=4, places=[3, 1])
    assert [r.token_ids for r in tight] == [r.token_ids for r in part]


def test_end_tokens_and_empty_input():
    net = tiny.model()
    assert Sampler(net).sample([]) == []
    rollout = Sampler(net).sample([[1]], max_new_tokens=400, seed=1, end_ids=list(range(128)))[0]
    assert rollout.finished and rollout.token_ids[-1] < 128 and all(t >= 128 for t in rollout.token_ids[:-1])
    assert not Sampler(net).sample([[1]], max_new_tokens=8, end_ids=[])[0].finished


def test_what_is_saved_is_read_by_transformers_4_too(tmp_path):
    """It reads these names only; see sample.with_older_names."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    lm = sample.LM("", tiny.model("llama", rope_parameters=dict(rope)), tiny.tokenizer())
    lm.save(tmp_path)
    config, words = (json.loads((tmp_path / name).read_text()) for name in ("config.json",
                                                                            "tokenizer_config.json"))
    assert config["rope_theta"] == rope.pop("rope_theta") and config["rope_scaling"] == rope
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in words
    assert words["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>"]
    again = load_lm(str(tmp_path))
    assert again.model.config.rope_parameters == lm.model.config.rope_parameters
    assert again.tokenizer.all_special_tokens == lm.tokenizer.all_special_tokens
    ids = torch.arange(1, 100)[None]
    assert torch.equal(again.model(ids).logits, lm.model(ids).logits)


def test_a_base_model_ends_its_turn(tmp_path):
    """Its config names the end of a document; its chat template closes a turn with another token."""
    folder = tiny.save(tmp_path / "base")
    config = json.loads((folder / "generation_config.json").read_text())
    for named, ends in ((250, [250, 256]), ([256, 250], [256, 250]), (None, [256])):
        (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": named}))
        lm = sample.load_lm(str(folder))
        assert lm.turn_end == 256 and sample.end_tokens(lm.model) == ends
    lm.save(tmp_path / "again")
    assert sample.end_tokens(sample.load_lm(str(tmp_path / "again")).model) == [256]
    tokenizer = tiny.tokenizer()
    for template, end in ((tiny.TEMPLATE.replace("<|end|>", ""), 256), (tiny.TEMPLATE, 256),
                          ("<|user|>", 256), ("{{ raise_exception('no answers') }}", 256),
                          (tiny.TEMPLATE.replace("<|end|>", "<|user|>\n"), 258)):
        tokenizer.chat_template = template
        assert sample.LM("", lm.model, tokenizer).turn_end == end


def test_limits_are_refused_before_sampling():
    net = tiny.model(context=64)
    with pytest.raises(ValueError, match="prompt 1 has 40 tokens.*--max-new-tokens"):
        Sampler(net).sample([[1], [1] * 40], max_new_tokens=30)
    with pytest.raises(ValueError, match="--cache-gb"):
        Sampler(net, cache_gb=1e-6).sample([[1]], max_new_tokens=30)
    for memory in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="--cache-gb"):
            Sampler(net, cache_gb=memory).sample([[1]], max_new_tokens=3)
    for temperature in (-1, 1e-39, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be 0 or"):
            Sampler(net).sample([[1]], max_new_tokens=3, temperature=temperature)
    with pytest.raises(ValueError, match="no token"):
        Sampler(net).sample([[1], []], max_new_tokens=3)
    with pytest.raises(ValueError, match="--max-new-tokens"):
        Sampler(net).sample([[1]], max_new_tokens=0)


def test_model_names(tmp_path, capsys):
    assert resolve_model("Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    assert resolve_model("SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_model("Llama-3.2-1B-Instruct") == "meta-llama/Llama-3.2-1B-Instruct"
    assert resolve_model("me/mine") == "me/mine"
    folder = tiny.save(tmp_path / "m")
    assert resolve_model(str(folder)) == str(folder)
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    (run / "config.json").write_text("{}")  # the run's settings
    assert resolve_model(str(run)) == str(run / "model")
    for bad in ("mystery", "./nowhere/model", str(tmp_path)):
        with pytest.raises(SystemExit):
            resolve_model(bad)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # pickles are never loaded
    with pytest.raises(SystemExit, match="safetensors"):
        load_lm(str(folder))


def test_a_model_without_chat_template_is_refused(tmp_path):
    folder, tok = tiny.save(tmp_path / "m"), tiny.tokenizer()
    tok.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tok.save_pretrained(folder)
    with pytest.raises(SystemExit, match="chat template"):
        load_lm(str(folder))


def test_buckets_pad_little():
    sizes = [bucket(rows) for rows in range(1, 1025)]
    assert all(rows <= size <= max(rows * 1.25, 8) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 40 and sizes[1023] == 1024


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
                     "--max-new-tokens", 8, "--out", tmp_path / "u.jsonl", "--seed", 2, "--against", folder)
    assert (tmp_path / "u.jsonl").read_text() == (tmp_path / "t.jsonl").read_text()
    assert (tmp_path / "u.against.jsonl").read_text() == (tmp_path / "t.jsonl").read_text()
    assert not list(tmp_path.glob("*.partial"))
    assert re.search(r"difference.*\n +pass@1 +\+0.00% +\+0.00% .. \+0.00%", again.stdout)


def test_unsolved_problems_are_written_as_data(tmp_path, monkeypatch, capsys):
    folder, data = tiny.save(tmp_path / "m"), tiny.problems_file(tmp_path / "p.jsonl", 3)
    hard, problems = tmp_path / "hard.jsonl", load_problems(str(data))
    monkeypatch.setattr(sample, "is_correct", lambda text, answer, *_: answer == problems[1].answer)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(folder), "--data", str(data), "--n", "2",
                                      "--max-new-tokens", "4", "--unsolved", str(hard)])
    sample.main()
    assert "of 2 of 3 problems" in capsys.readouterr().out
    again = load_problems(str(hard), need_solution=True)
    for more in (["--out", str(hard)], ["--unsolved", str(data), "--data", f"math={data}"],
                 ["--data", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", [*sys.argv[:9], "--unsolved", str(hard), *more])
        with pytest.raises(SystemExit):
            sample.main()
        assert "must be different files" in capsys.readouterr().err
    assert [replace(p, id="") for p in again] == [replace(problems[i], id="") for i in (0, 2)]
    assert [p.id for p in again] == [f"hard/{problems[i].id}" for i in (0, 2)]


def test_an_interrupted_program_goes_on_with_the_same_traces(tmp_path, monkeypatch, capsys):
    lm = load_lm(str(tiny.save(tmp_path / "m")))
    problems = load_problems(str(tiny.problems_file(tmp_path / "p.jsonl", 5)))
    out, partial = tmp_path / "t.jsonl", tmp_path / "t.jsonl.partial"

    def run(n=3, seed=4):  # few rows: problems end one after the other
        return sample.traces_into(out, lm, problems, n, 40, 1.0, seed, Sampler(lm.model, max_rows=3))

    want, left = run()
    assert left == 0 and want == sample.traces_of(lm, problems, 3, 40, 1.0, 4)
    text = out.read_text()
    assert run() == (want, 15) and out.read_text() == text  # no more than looked up
    out.unlink()
    partial.unlink()
    graded = sample.is_correct

    def stop_at(calls):
        count = [0]

        def interrupted(*args):
            count[0] += 1
            if count[0] == calls:
                raise KeyboardInterrupt
            return graded(*args)

        monkeypatch.setattr(sample, "is_correct", interrupted)
        with pytest.raises(SystemExit) as stop:
            run()
        assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
        monkeypatch.setattr(sample, "is_correct", graded)

    stop_at(8)
    assert not out.exists() and partial.read_text().count("\n") == 1 + 7
    with open(partial, "a") as file:
        file.write('[14, {"problem": "torn')  # by a kill
    stop_at(5)
    known = sorted(number for number, _ in map(json.loads, partial.read_text().split("\n")[1:-1]))
    whole = [p for p in range(5) if {3 * p, 3 * p + 1, 3 * p + 2} <= {*known}]
    for other in (dict(n=2), dict(seed=5)):
        with pytest.raises(SystemExit, match="t.jsonl.partial holds traces of an interrupted program with"):
            run(**other)
    os.utime(tmp_path / "m" / "model.safetensors", (1, 1))
    with pytest.raises(SystemExit, match="another model"):
        run()
    head, rest = partial.read_text().split("\n", 1)
    partial.write_text(json.dumps(json.loads(head) | {"written": [1.0]}) + "\n" + rest)
    assert 0 < len(whole) < 5 and run() == (want, 3 * len(whole))
    assert out.read_text() == text
    partial.write_text(json.dumps(json.loads(head) | {"written": [1.0]}) + "\n[7, {\n")
    with pytest.raises(SystemExit, match="t.jsonl.partial is damaged"):
        run()


def test_a_killed_program_goes_on(tmp_path):
    folder = tiny.save(tmp_path / "m", context=20000)
    data, out = tiny.problems_file(tmp_path / "p.jsonl", 3), tmp_path / "t.jsonl"
    command = ["sample.py", "--model", folder, "--data", data, "--n", "2", "--max-rows", "2", "--out", out,
               "--max-new-tokens", "300", "--device", "cpu"]
    want = sample.traces_of(load_lm(str(folder)), load_problems(str(data)), 2, 300, 1.0)
    partial = tmp_path / "t.jsonl.partial"
    for _ in range(5):  # beside other work the kill may come too late
        out.unlink(missing_ok=True)
        process = tiny.start(*command)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with suppress(FileNotFoundError):  # not yet there
                if partial.read_text().count("\n") > 1:
                    break
            time.sleep(0.002)
        process.kill()
        if process.wait():
            break
    assert not out.exists() and partial.exists()
    tiny.run(*command)
    assert [json.loads(line) for line in out.read_text().split("\n")[:-1]] == want and not partial.exists()


def test_one_long_question_does_not_cut_all_traces_short(tmp_path, capsys):
    lm, short = (load_lm(str(tiny.save(tmp_path / str(context), context=context))) for context in (512, 400))
    problems = load_problems(str(tiny.problems_file(tmp_path / "p.jsonl", 3)))  # prompts of 212 bytes
    long = replace(problems[1], question="x" * 100)
    assert sample.with_room([lm], problems, None) == (problems, 256)
    assert sample.with_room([lm], [problems[0], long], None) == (problems[:1], 256)
    assert "left out 1 of 2 problems with more than 256 prompt tokens" in capsys.readouterr().err
    assert sample.with_room([lm], [problems[0], long], 200) == ([problems[0], long], 200)
    assert sample.with_room([lm, short], problems, 180) == (problems, 180)
    for lms, room, limit, remedy in (([lm, short], None, 2048, "lower --max-new-tokens 200"),
                                     ([lm], None, 20, "raise --max-prompt-tokens")):
        with pytest.raises(SystemExit, match=f"none of the . problems is left.*: {remedy}"):
            sample.with_room(lms, problems, room, limit)
    with pytest.raises(SystemExit, match="--max-new-tokens 600 leaves no room for a prompt"):
        sample.with_room([lm], problems, 600)


def test_out_is_a_plain_file_or_a_link_to_one(tmp_path, monkeypatch):
    """It is renamed into its place: a device or pipe would be gone, and a link no link any more."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no plain file"):
            sample.new_file(str(tmp_path / name))
    (tmp_path / "other").symlink_to(tmp_path / "file")
    assert sample.new_file(str(tmp_path / "other")) == tmp_path / "file"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root, everything may be written
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
        sample.new_file(str(tmp_path / "other"))


@pytest.mark.parametrize("program, flags, message", [
    *((program, flags, message) for program in ("sample", "judge") for flags, message in (
        ("--limit 0", "--limit: must be at least 1"), ("--n -1", "--n: must be at least 1"),
        ("--max-new-tokens 0", "--max-new-tokens: must be at least 1"), ("--seed -1", "--seed: must be at"),
        ("--out .", " is a folder"), ("--out no/x", "/no does not exist"))),
    ("sample", "--max-rows 0", "--max-rows: must be at least 1"), ("sample", "--n 2 --k 4", "and --n 2, got"),
    ("sample", "--n 2 --limit 2 --temperature -1", "temperature must be 0 or at least"),
    ("judge", "--n 2 --limit 2 --temperature -1", "temperature must be 0 or at least"),
    ("sample", "--bench --n 4", "--bench does not heed --n"),
    ("sample", "--max-new-tokens 100000", "leaves no room for a prompt"),
    ("sample", "--n 2 --limit 2 --max-new-tokens 8 --against nowhere", "no model 'nowhere'"),
])
def test_bad_flags_end_a_program_before_its_work(program, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main()
    said = capsys.readouterr()
    assert message in f"{said.err}{stop.value}" and "pass@" not in said.out


def test_a_second_model_with_a_shorter_context_is_heeded_before_the_first_is_sampled(tmp_path, monkeypatch):
    long, short = (tiny.save(tmp_path / str(context), context=context) for context in (4096, 256))
    data = tiny.problems_file(tmp_path / "p.jsonl", 2)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(long), "--against", str(short), "--data",
                                      str(data), "--n", "1", "--max-new-tokens", "60"])
    monkeypatch.setattr(sample, "traces_of", None)
    with pytest.raises(SystemExit, match="more than 196 prompt tokens: lower --max-new-tokens 60"):
        sample.main()


@pytest.mark.parametrize("program", ["sample.py", "judge.py"])
def test_a_program_finds_its_default_from_any_folder(program, tmp_path):
    tiny.run(tiny.ROOT / program, "--n", 2, "--limit", 2, "--max-new-tokens", 2, cwd=tmp_path)


class EagerGraph:
    """Stands for torch.cuda.CUDAGraph where there is none: what was captured last is computed again."""

    def replay(self):
        graphs, state, drawn = self.captured
        drawn.copy_(sample.Graphs.compute.__wrapped__(graphs, state))

    def pool(self):
        return (0, 1)


@needs_interpreter
def test_graphs_decode_as_the_plain_path_does(monkeypatch):
    """All of Graphs but the capture itself, with the kernels in the interpreter: a host buffer, padding rows,
    refill, generate's tokens, teacher-forced log-probs, noise that does not depend on the batch."""
    calls, compute, zeros = [], sample.Graphs.compute, torch.zeros

    @wraps(compute)
    def noted(graphs, state):
        calls.append((weakref.proxy(graphs), state, compute(graphs, state)))
        return calls[-1][2]

    @contextmanager
    def capture(graph, pool, stream, mode):
        yield
        graph.captured = calls[-1]

    monkeypatch.setattr(sample.Graphs, "compute", noted)
    monkeypatch.setattr(sample, "paged_attention", lambda q, k, v, table, lengths, scaling, plan:
                        triton_paged_attention(q, k, v, table, lengths, scaling))
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stub in dict(Stream=lambda device: stream, current_stream=lambda: stream,
                           CUDAGraph=EagerGraph, graph=capture,
                           device=nullcontext, stream=nullcontext, device_of=nullcontext,
                           get_device_properties=lambda device: SimpleNamespace(multi_processor_count=132),
                           ).items():
        monkeypatch.setattr(torch.cuda, name, stub)
    net, prompts = tiny.model(seed=2), random_prompts(6, 50)
    sampler = Sampler(net, max_rows=5)
    sampler.graphs = True
    for prompt, rollout in zip(prompts, sampler.sample(prompts, 1, 6, temperature=0)):
        assert list(rollout.token_ids) == generate(net, prompt, 6)
    rollouts = sampler.sample(prompts[:2], 2, 3, 0.7, seed=3)
    alone = sampler.sample(prompts[:1], 2, 3, 0.7, seed=3)
    assert [r.token_ids for r in alone] == [r.token_ids for r in rollouts[:2]]
    for r in rollouts:
        assert r.logprobs == pytest.approx(teacher_forced(net, r, 0.7), abs=1e-4)
    gone = weakref.ref(sampler.replay)
    gc.disable()  # a capture must not meet old graphs in a garbage collection: they go with their sampler
    try:
        calls.clear()
        del sampler
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_gpu_greedy_graphs_and_weight_updates(graphs):
    """CUDA, float32: generate's tokens through refill and pauses, teacher-forced log-probs, and replayed
    graphs that see weights changed in place."""
    net = tiny.model(seed=2).cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = random_prompts(20, 70)
    sampler = Sampler(net, max_rows=12, cache_gb=20 * page_bytes(net) / 2**30, graphs=graphs)
    for _ in range(2):
        for prompt, rollout in zip(prompts, sampler.sample(prompts, 1, 60, temperature=0)):
            ids = torch.tensor([prompt]).cuda()
            want = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
            assert list(rollout.token_ids) == want[0, len(prompt):].tolist()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    rollouts = sampler.sample(prompts, 2, 30, 0.7, seed=3)
    alone = sampler.sample(prompts[:1], 2, 30, 0.7, seed=3)
    assert [r.token_ids for r in alone] == [r.token_ids for r in rollouts[:2]]
    net.cpu()
    for r in rollouts:
        assert r.logprobs == pytest.approx(teacher_forced(net, r, 0.7), abs=1e-3)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm", "qwen"])
def test_real_models_are_greedy_as_generate(name):
    """64 prompts of 1 to about 700 tokens, float32, at most 40 new tokens: generate's tokens, through
    refill (12 rows) and pauses (a cache of 27 pages)."""
    lm, rng = tiny.real_model(name), random.Random(0)
    words = lm.tokenizer.encode("Tom has 3 boxes of 12 eggs and drops 5 eggs. How many are whole? Let us see")
    prompts = [lm.chat("What is 17 * 23?"), words[:1]]
    while len(prompts) < 64:
        length = int(2 ** rng.uniform(1, 9.5))
        prompts.append([rng.choice(words) if rng.random() < 0.3 else words[i % len(words)]
                        for i in range(length)])
    config = lm.model.config
    page = 2 * config.num_hidden_layers * config.num_key_value_heads * PAGE * 4
    page *= getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sampler = Sampler(lm.model, max_rows=12, cache_gb=27 * page / 2**30, prefill_tokens=1024)
    rollouts = sampler.sample(prompts, 1, 40, temperature=0)
    for prompt, rollout in zip(prompts, rollouts):
        want = generate(lm.model, prompt, 40)
        for i, (a, b) in enumerate(zip(rollout.token_ids, want)):
            if a != b:  # only where two logits are equal up to float32 rounding may the paths differ
                logits = lm.model(torch.tensor([prompt + want[:i]])).logits[0, -1]
                assert abs(logits[a] - logits[b]) < 1e-4, (len(prompt), i)
                break
        else:
            assert list(rollout.token_ids) == want
    assert sampler.pauses > 0


@pytest.mark.real
@pytest.mark.parametrize("name, dtype", [("smollm", "float32"), ("qwen", "float32"),
                                         ("smollm", "bfloat16"), ("qwen", "bfloat16")])
def test_real_models_logprobs_are_teacher_forced_ones(name, dtype):
    """float32: to 1e-4. bfloat16: as near to float32 as transformers in bfloat16 is; the shares of tokens
    with a ratio outside [0.9, 1.1] are printed."""
    lm = tiny.real_model(name, getattr(torch, dtype))
    prompts = [lm.chat(q) for q in ("What is 17 * 23?", "How many eggs are 12 boxes of 12?", "Hi " * 60)]
    rollouts = Sampler(lm.model, max_rows=4).sample(prompts, 3, 40, 0.8, seed=1)
    ours = torch.tensor([logp for r in rollouts for logp in r.logprobs])
    forced = torch.tensor([logp for r in rollouts for logp in teacher_forced(lm.model, r, 0.8)])
    if dtype == "float32":
        assert (ours - forced).abs().max() < 1e-4
        return
    exact = tiny.real_model(name, torch.float32).model
    exact = torch.tensor([logp for r in rollouts for logp in teacher_forced(exact, r, 0.8)])
    off, theirs, between = (((a - b).exp() - 1).abs().gt(0.1).float().mean().item()
                            for a, b in ((ours, exact), (forced, exact), (ours, forced)))
    print(f"{name} {dtype}, tokens outside [0.9, 1.1] of {len(ours)}: ours and float32 {off:.1%}, "
          f"transformers and float32 {theirs:.1%}, ours and transformers {between:.1%}")
    assert off <= 1.25 * theirs + 0.02
