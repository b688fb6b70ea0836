"""Packed traces: the same states and gradients as rows on their own, with next to no padding."""

import sys

import numpy as np
import pytest
import tiny
import torch

from exprl import Settings, microbatches, predictors
from kernels import pack, policy_head

module = sys.modules["kernels.packed_attention"]  # the package has a function of that name


def rows(prompts, traces, seed=0):
    """ids and mask (N,T): traces[i] lists the lengths of the traces behind a prompt of prompts[i] tokens."""
    rng, lines = np.random.default_rng(seed), []
    for start, lengths in zip(prompts, traces):
        prompt = rng.integers(0, 256, start)
        lines += [(start, np.append(prompt, rng.integers(0, 256, n))) for n in lengths]
    ids = torch.zeros(len(lines), max(len(line) for _, line in lines), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (start, line) in enumerate(lines):
        ids[i, :len(line)] = torch.from_numpy(line)
        mask[i, start:len(line)] = True
    return ids, mask


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["attend_by_span", "attend_by_row"])
def test_states_and_gradients_equal_those_of_rows_alone(monkeypatch, family, checkpointing, way):
    monkeypatch.setattr(module, "attend_by_span", getattr(module, way))
    monkeypatch.setattr(module, "BLOCK", 16)
    ids, mask = rows([5, 1, 9, 5], [[3, 40, 1], [2], [7, 7, 30, 4], [1, 1]])
    net = tiny.model(family).double()
    noise = torch.randn(int(mask.sum()), 32, dtype=torch.float64)
    results = []
    for implementation in ("sdpa", "exprl_packed"):
        net.set_attn_implementation(implementation)
        if checkpointing and implementation == "exprl_packed":
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            net.train()
        net.zero_grad()
        hidden, tokens = predictors(net, ids, mask)
        (hidden * noise).sum().backward()
        results.append([hidden.detach(), tokens, *(p.grad for p in net.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        # the models' norms and rotations are float32 in any case
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(a.abs().max()))


def test_a_prompt_stands_once_and_nothing_is_padding():
    ids, mask = rows([5, 9], [[3, 40, 1], [7, 2]])
    tokens, positions, places, packed = pack(ids, mask)
    assert len(tokens) == 5 + 9 + (3 + 40 + 1 + 7 + 2) - 5  # a row's last token predicts none
    for i in range(len(ids)):
        end = int(mask[i].nonzero().max())
        assert torch.equal(tokens[places[i, :end]], ids[i, :end])
        assert torch.equal(positions[places[i, :end]], torch.arange(end))
    slots = torch.cat([run.flatten() for run in packed.runs])
    assert torch.equal(slots[packed.home], torch.arange(len(tokens)))
    assert sorted(t for *_, start, end in packed.spans for t in range(start, end)) == list(range(len(tokens)))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_spans_equal_rows_in_float64(dtype, bound):
    """With keys that have a large part in common, as Qwen2.5's biases make them."""
    packed = pack(*rows([120, 9], [[128, 40, 300, 1], [7, 260]]))[3]
    torch.manual_seed(0)
    inputs = [torch.randn(heads, len(packed.home), 64) for heads in (6, 2, 2)]
    inputs[1] += 40 * torch.randn(2, 1, 64)
    noise, results = torch.randn(len(packed.home), 6, 64).to(dtype), []
    for way, kind in ((module.attend_by_row, torch.float64), (module.attend_by_span, dtype)):
        some = [x.to(dtype).to(kind, copy=True).requires_grad_() for x in inputs]
        out = way(*some, packed)
        out.backward(noise.to(kind))
        results.append([out.detach(), *(x.grad for x in some)])
    for exact, ours in zip(*results):
        assert float((ours.double() - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("questions, group", [(32, 8), (36, 16)])
def test_padding_on_gsm8k_like_lengths_is_below_a_tenth(questions, group):
    """Log-normal prompts and traces with the means and deviations of GSM8K's questions and solutions in the
    tokens of Qwen2.5 (2,000 rows, measured 2026-11-23); the system prompt and its frame are 52 tokens."""
    rng = np.random.default_rng(0)
    prompts = 52 + rng.lognormal(4.026, 0.346, questions).astype(int)
    traces = 1 + rng.lognormal(4.421, 0.431, (questions, group)).astype(int)
    lengths = (prompts[:, None] + traces).flatten().tolist()
    attended = real = packed = 0
    for part in microbatches(list(range(len(lengths))), lengths, Settings.microbatch_tokens, group):
        part = np.array(part)
        ids, mask = torch.zeros(2, len(part), max(lengths[r] for r in part), dtype=torch.long)
        for i, row in enumerate(part):
            ids[i, :prompts[row // group]] = row // group + 1
            mask[i, prompts[row // group]:lengths[row]] = 1
        tokens, _, _, packing = pack(ids, mask.bool())
        attended += sum(run.numel() for run in packing.runs)
        packed += len(tokens)
        real += sum(lengths[row] - 1 for row in part)
    assert attended < 1.1 * real  # the only place with padding, and on a CPU not even that
    assert packed < 0.6 * real  # what all other layers see


@pytest.mark.real
@pytest.mark.parametrize(("name", "dtype", "least"), [
    ("smollm", torch.float32, 1 - 1e-6), ("smollm", torch.bfloat16, 0.997),
    ("qwen", torch.float32, 1 - 1e-6), ("qwen", torch.bfloat16, 0.997)])
def test_a_real_models_gradient_is_plain_transformers(name, dtype, least):
    """Of the policy gradient of four traces behind two prompts, over all weights: the cosine. Packed, through
    the head, in `dtype`; against row by row, through the logits, with eager attention, in float32."""
    lm = tiny.real_model(name)
    prompts = [lm.chat("What is 17 * 23?")] * 2 + [lm.chat("How many eggs are in 3 boxes of 12?")] * 2
    traces = [lm.quote(text) for text in (
        "### Multiply\n17 * 23 = 391, so \\boxed{391}.", "It is 17 + 23 = 40.",
        "3 * 12 = 36 eggs: \\boxed{36}", "### Add\n12 + 3 = 15")]
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.1])
    lm.model.set_attn_implementation("eager")
    for prompt, trace, advantage in zip(prompts, traces, advantages):
        logits = lm.model(torch.tensor([prompt + trace]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(trace)[:, None])
        (-advantage * logp.sum()).backward()
    plain = [p.grad for p in lm.model.parameters()]
    lm.model.zero_grad()
    lm.model.set_attn_implementation("exprl_packed")
    padded = torch.nn.utils.rnn.pad_sequence
    ids = padded([torch.tensor(p + t) for p, t in zip(prompts, traces)], batch_first=True)
    mask = padded([torch.arange(len(p + t)) >= len(p) for p, t in zip(prompts, traces)], batch_first=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden, tokens = predictors(lm.model, ids, mask)
        head = policy_head(hidden, lm.model.get_output_embeddings().weight, tokens,
                           (advantages[:, None] * mask)[mask], temperature=0.8)
    head.loss.backward()
    ours = [p.grad for p in lm.model.parameters()]

    def dot(a, b):
        return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))

    assert dot(ours, plain) / (dot(ours, ours) * dot(plain, plain)) ** 0.5 > least
    assert dot(ours, ours) / dot(plain, plain) == pytest.approx(1, abs=0.05)
