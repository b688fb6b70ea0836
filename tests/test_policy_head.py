"""policy_head, PyTorch and Triton, against float64 autograd: every term of the loss, edges, memory. 20 s.

As in test_kernels.py: without a CUDA device Triton runs in its interpreter, and torch.empty holds NaN.
"""

import importlib
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from experiments.bench_head import check, peak_extra_bytes

head = importlib.import_module("kernels.policy_head")  # `kernels.policy_head` is the function
logprob = importlib.import_module("kernels.token_logprob")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(head.triton is None, reason="Triton is not installed")
VERSIONS = ["torch", pytest.param("triton", marks=needs_triton)]
FIELDS = "loss logp entropy kl clipped dhidden dweight".split()

TERMS = {  # name -> which of old_logp, ref_logp the loss gets, and its settings
    "on-policy": ((0, 0), {}),
    "clip and dual clip": ((1, 0), {}),
    "narrow clip": ((1, 0), dict(clip_low=0.05, clip_high=0.1, dual_clip=1.5)),
    "kl": ((0, 1), dict(kl=0.7)),
    "kl measured only": ((1, 1), {}),
    "entropy": ((0, 0), dict(entropy_weight=0.3)),
    "all": ((1, 1), dict(kl=0.4, entropy_weight=0.2, dual_clip=2.5)),
}


@pytest.fixture(autouse=True)
def nan_in_empty_tensors():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=VERSIONS)
def version(request, monkeypatch):
    """Runs a test with each version of what lies between the products; Triton in blocks of 64 columns."""
    row_loss_ = getattr(head, f"{request.param}_row_loss_")
    for name in ("torch_row_loss_", "triton_row_loss_"):
        monkeypatch.setattr(head, name, row_loss_, raising=False)
    monkeypatch.setattr(head, "block", lambda V: 64)
    monkeypatch.setitem(logprob.SLAB_BYTES, DEVICE, 4 * 4 * 130)  # PyTorch's functions: 4 rows of 130 at once
    return request.param


def run(function, case, terms, temperature=1.0, scale=1.0):
    """Every output and gradient of a head by its name, the loss multiplied by scale."""
    (use_old, use_ref), keywords = TERMS[terms] if isinstance(terms, str) else terms
    hidden, weight, ids, advantages, old_logp, ref_logp = (x.detach().to(DEVICE) for x in case)
    hidden.requires_grad_(), weight.requires_grad_()
    out = function(hidden, weight, ids, advantages, old_logp if use_old else None,
                   ref_logp if use_ref else None, temperature=temperature, denominator=3, **keywords)
    (out.loss * scale).backward()
    values = (*out, hidden.grad, weight.grad)
    return {name: value.detach() for name, value in zip(FIELDS, values, strict=True)}


def reference(case, terms, temperature=1.0, scale=1.0):
    exact = [x.double() if x.is_floating_point() else x for x in case]
    return run(head.plain_policy_head, exact, terms, temperature, scale)


def assert_near(got, want, tolerance):
    for name, x in got.items():
        y = want[name].double()
        atol = tolerance * (float(y.abs().max()) if y.numel() else 1) + 1e-6
        torch.testing.assert_close(x.double(), y, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def bounds_met(case, terms):
    """The case does what the test is for: every branch of the loss is taken."""
    logp = reference(case, terms)["logp"].cpu()
    A, old, ref = case[3:]
    ratio = (logp - old).exp()
    taken = [(A > 0) & (ratio > 1.28), (A > 0) & (ratio < 0.8), (A < 0) & (ratio > 3),
             (A < 0) & (ratio < 0.8), A == 0, ref - logp > 3]
    return all(branch.any() for branch in taken)


# ---- values and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS)
def test_every_term_against_float64(version, monkeypatch, terms):
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 25 * 130 * 4)  # 80 rows: 4 chunks of 20
    case = head.random_case(80, 16, 130)
    assert bounds_met(case, terms)
    got, want = run(kernels.policy_head, case, terms), reference(case, terms)
    assert {x.dtype for name, x in got.items() if name != "clipped"} == {torch.float32}
    assert got["clipped"].equal(want["clipped"]) and got["clipped"].any() == TERMS[terms][0][0]
    assert_near(got, want, 1e-5)


@pytest.mark.parametrize("shape, temperature", [((1, 8, 5), 1.0), ((17, 16, 130), 0.6), ((5, 12, 1003), 1.7)])
def test_ragged_shapes_and_temperatures(version, monkeypatch, shape, temperature):
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 7 * shape[2] * 4)
    case = head.random_case(*shape)
    assert_near(run(kernels.policy_head, case, "all", temperature), reference(case, "all", temperature), 2e-5)


def test_loss_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 5.0])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, k3, clipped = head.token_loss(ratio.log(), ratio, advantages, torch.zeros(6))
    # -A r | bounded at 1.28 | -A r | -A r | at 0.8 | dual clip: 3 * 2, not 10
    assert loss.tolist() == pytest.approx([-2.0, -2.56, -1.0, 3.0, 1.6, 6.0])
    assert clipped.tolist() == [False, True, False, False, True, True] and not k3.any()
    logp, entropy, ref = torch.tensor([-1.0]), torch.tensor([2.0]), torch.tensor([-1.5])
    loss, k3, _ = head.token_loss(logp, entropy, torch.zeros(1), logp, ref, kl=0.5, entropy_weight=0.1)
    assert k3.item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert loss.item() == pytest.approx(0.5 * k3.item() - 0.2)
    loss, k3, _ = head.token_loss(logp - 300, entropy, torch.ones(1), logp, logp, kl=0.5)
    assert loss.isfinite() and k3.item() == 10


def test_on_policy_it_is_reinforce(version):
    hidden, weight, ids, advantages, *rest = head.random_case(20, 8, 50)
    got = run(kernels.policy_head, (hidden, weight, ids, advantages, *rest), "on-policy")
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp, _ = logprob.plain_token_logprob(hidden, weight, ids)
    (-(advantages * logp).sum() / 3).backward()
    assert got["loss"].item() == pytest.approx(-advantages.sum().item() / 3, abs=1e-6)
    for name, want in (("dhidden", hidden.grad), ("dweight", weight.grad)):
        torch.testing.assert_close(got[name].cpu().double(), want, rtol=0, atol=1e-5)


def test_large_logits(version):
    hidden, weight, ids, advantages, _, _ = head.random_case(40, 4, 200)
    weight = torch.nn.functional.normalize(weight) * 100  # logits up to 1e4
    hidden = torch.nn.functional.normalize(hidden) * 100
    ids[1] = (weight @ hidden[1]).argmax()
    case = (hidden, weight, ids, advantages, torch.full((40,), -1.0), torch.full((40,), -2.0))
    got = run(kernels.policy_head, case, "all")
    assert all(x.isfinite().all() for x in got.values())
    assert (got["logp"] <= 0).all() and (got["entropy"] >= 0).all() and got["logp"][1] > -1e-3
    want = reference(case, "all")
    assert_near({name: got[name] for name in ("logp", "entropy", "kl")}, want, 1e-6)
    assert_near({name: got[name] for name in ("dhidden", "dweight")}, want, 2e-3)


def test_no_rows(version):
    got = run(kernels.policy_head, head.random_case(0, 8, 11), "all")
    assert got["loss"] == 0 and got["logp"].shape == (0,) and got["dhidden"].shape == (0, 8)
    assert (got["dweight"] == 0).all() and got["dweight"].shape == (11, 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 5), st.integers(2, 40), st.floats(0.3, 3.0),
       st.tuples(st.booleans(), st.booleans()), st.floats(0, 0.9), st.floats(0, 0.9), st.floats(1.1, 4),
       st.floats(0, 2), st.floats(-1, 1))
def test_random_losses_in_float64(seed, N, d, V, temperature, use, low, high, dual, kl, entropy_weight):
    """The gradients against autograd's, and the loss along a random direction against its difference."""
    case = [x.double() if x.is_floating_point() else x for x in head.random_case(N, d, V, seed)]
    terms = use, dict(clip_low=low, clip_high=high, dual_clip=dual, kl=kl * use[1],
                      entropy_weight=entropy_weight)
    got, want = run(kernels.policy_head, case, terms, temperature), reference(case, terms, temperature)
    for name in FIELDS:
        torch.testing.assert_close(got[name].double(), want[name].double(), rtol=1e-9, atol=1e-9)
    if not use[0]:  # on-policy the ratio is held at 1 while logp moves: the loss's value does not follow
        return
    generator = torch.Generator().manual_seed(seed)
    step = [1e-6 * torch.randn(x.shape, generator=generator).double() for x in case[:2]]
    losses = [run(kernels.policy_head, [case[0] + s * step[0], case[1] + s * step[1], *case[2:]], terms,
                  temperature) for s in (-1, 1)]
    if losses[0]["clipped"].equal(losses[1]["clipped"]):  # else a bound lies between the two
        slope = sum((got[name].cpu() * s).sum() for name, s in zip(("dhidden", "dweight"), step))
        difference = (losses[1]["loss"] - losses[0]["loss"]).item() / 2
        assert difference == pytest.approx(slope.item(), rel=1e-3, abs=1e-9)


# ---- 16 bits -----------------------------------------------------------------------------------------------


def rms_errors(got, want, names=("logp", "entropy", "dhidden", "dweight")):
    return {name: float((got[name].double() - want[name]).square().mean().sqrt()) for name in names}


@pytest.mark.parametrize("temperature", [1.0, 0.5])  # powers of two: both ways round the same logits
def test_bfloat16_errs_hardly_more_than_plain_pytorch(version, monkeypatch, temperature):
    monkeypatch.setattr(logprob, "product_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 25 * 300 * 2)  # 4 chunks
    case = head.random_case(96, 32, 300, dtype=torch.bfloat16)
    case = (case[0] / 2, *case[1:])
    want = reference(case, "kl", temperature)
    plain = rms_errors(run(head.plain_policy_head, case, "kl", temperature), want)
    slack = 1.35 if version == "triton" and DEVICE == "cpu" else 1.1  # the interpreter cuts bfloat16 off
    for name, error in rms_errors(run(kernels.policy_head, case, "kl", temperature), want).items():
        assert error <= slack * plain[name] + 1e-6, name


def test_dweight_summed_in_16_bits(version, monkeypatch):
    """As CUDA sums it for a 16-bit weight: a rounding per chunk. Four chunks, the case of the benchmark."""
    monkeypatch.setattr(logprob, "product_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(logprob, "new_dweight", lambda weight, hidden: torch.empty_like(weight))
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 24 * 300 * 2)
    case = head.random_case(96, 32, 300, dtype=torch.bfloat16)
    want = reference(case, "kl")
    plain = rms_errors(run(head.plain_policy_head, case, "kl"), want)
    assert rms_errors(run(kernels.policy_head, case, "kl"), want)["dweight"] <= 1.4 * plain["dweight"]


@pytest.mark.parametrize("instructions", [True, False])
def test_autocast_with_float32_master_weights(monkeypatch, instructions):
    """With a CPU's bfloat16 instructions; and without, when autocast must leave the products in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    case = head.random_case(30, 16, 50)
    half = (case[0].bfloat16(), *case[1:])
    want = run(kernels.policy_head, half, "all")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(kernels.policy_head, case, "all")
    assert got["dweight"].dtype == want["dweight"].dtype == torch.float32  # never rounded to 16 bits as a sum
    assert all(got[name].equal(want[name]) for name in ("loss", "logp", "entropy", "dweight"))
    rounded = [x.bfloat16().float() for x in case[:2]]
    assert_near(got, reference((*rounded, *case[2:]), "all"), 0.05)


# ---- the same however it is called -------------------------------------------------------------------------


def test_chunks_change_nothing_and_twice_is_the_same(version, monkeypatch):
    case, results = head.random_case(17, 16, 90), []
    for chunk_bytes in (1, 7 * 90 * 4, 10**6):  # 1 row, 6 rows, all rows
        monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, chunk_bytes)
        results.append(run(kernels.policy_head, case, "all"))
        assert all(x.equal(results[-1][name]) for name, x in run(kernels.policy_head, case, "all").items())
    for result in results[1:]:
        assert_near(result, results[0], 3e-6)


def test_strided_inputs(version):
    hidden, weight, *vectors = head.random_case(12, 6, 20)
    wide = torch.empty(24, 13)
    wide[::2, 1::2] = hidden
    strided = [wide[::2, 1::2], weight.T.contiguous().T, *(torch.stack([x, x], 1)[:, 0] for x in vectors)]
    assert not any(x.is_contiguous() for x in strided)
    assert_near(run(kernels.policy_head, strided, "all"), reference((hidden, weight, *vectors), "all"), 5e-6)


def test_the_loss_may_be_scaled_and_added_to_others(version):
    case = head.random_case(9, 6, 20)
    assert_near(run(kernels.policy_head, case, "all", scale=-0.7), reference(case, "all", scale=-0.7), 1e-5)


def test_gradients_accumulate_and_one_backward_each():
    hidden, weight, *rest = head.random_case(9, 6, 20)
    weight = weight.to(DEVICE).requires_grad_()
    rest = [x.to(DEVICE) for x in rest]
    for _ in range(2):
        out = kernels.policy_head(hidden.to(DEVICE), weight, *rest, kl=0.1)
        out.loss.backward(retain_graph=True)
    once = run(kernels.policy_head, (hidden, *(x.cpu() for x in (weight, *rest))), ((1, 1), dict(kl=0.1)))
    torch.testing.assert_close(weight.grad, 2 * 3 * once["dweight"], rtol=0, atol=1e-5)
    assert not any(x.requires_grad for x in out[1:])
    with pytest.raises(RuntimeError, match="one backward"):
        out.loss.backward()


@pytest.mark.parametrize("given, products", [("both", 3), ("hidden", 2), ("weight", 2), ("no_grad", 1)])
def test_three_products_fewer_for_a_frozen_input(given, products):
    hidden, weight, *rest = (x.to(DEVICE) for x in head.random_case(6, 4, 9))
    hidden.requires_grad_(given != "weight"), weight.requires_grad_(given != "hidden")
    with torch.profiler.profile() as profile, torch.set_grad_enabled(given != "no_grad"):
        loss = kernels.policy_head(hidden, weight, *rest, kl=0.1).loss
        if loss.requires_grad:
            loss.backward()
    assert tiny.matrix_products(profile) == products
    assert (hidden.grad is None) == (given in ("weight", "no_grad"))
    assert (weight.grad is None) == (given in ("hidden", "no_grad"))


def test_memory(monkeypatch):
    """N x V is 32 MB here, a chunk 2 MB (CUDA: 1 MB). Handing the gradients over must not copy them."""
    N, d, V = 2000, 16, 4000
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 10**6)
    monkeypatch.setitem(logprob.SLAB_BYTES, DEVICE, 10**5)
    hidden, weight, *rest = (x.to(DEVICE) for x in head.random_case(N, d, V))
    hidden.requires_grad_(), weight.requires_grad_()
    gradients, chunk = 4 * d * (N + V), 4 * V * logprob.chunk_rows(N, V, 4, DEVICE)
    assert chunk <= (10**6 if DEVICE == "cuda" else 2.1e6)
    full = lambda: kernels.policy_head(hidden, weight, *rest, kl=0.1).loss.backward()
    assert peak_extra_bytes(full, DEVICE) < gradients + chunk + 0.5e6
    plain = lambda: head.plain_policy_head(hidden, weight, *rest, kl=0.1).loss.backward()
    assert peak_extra_bytes(plain, DEVICE) > 2 * 4 * N * V


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_nan_is_not_hidden(version):
    """A broken row must reach the gradient, where the trainer counts and skips it."""
    hidden, *rest = head.random_case(6, 4, 70)
    hidden[2, 1] = math.nan
    got = run(kernels.policy_head, (hidden, *rest), "all")
    assert got["loss"].isnan() and got["dweight"].isnan().any()
    assert got["dhidden"].isnan().all(1).tolist() == [row == 2 for row in range(6)]


@needs_triton
def test_an_id_out_of_range_gives_nan_in_triton():
    z, ids = torch.zeros(3, 9, device=DEVICE), torch.tensor([-100, 0, 9], device=DEVICE)
    loss, logp, entropy, k3, advantages = torch.ones(5, 3, device=DEVICE)
    clipped = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    head.triton_row_loss_(z, ids, advantages, None, None, loss, logp, entropy, k3, clipped, 1.0,
                          (0.2, 0.28, 3.0, 0.0, 0.0))
    assert logp.isnan().tolist() == loss.isnan().tolist() == [True, False, True]
    assert z.isnan().any(1).tolist() == [True, False, True]


def test_wrong_input_is_named():
    hidden, weight, ids, advantages, old, _ = head.random_case(4, 4, 9)
    with pytest.raises(AssertionError, match="ref_logp"):
        kernels.policy_head(hidden, weight, ids, advantages, old, kl=0.1)
    with pytest.raises(AssertionError):
        kernels.policy_head(hidden, weight, ids, advantages[:3])
    with pytest.raises(IndexError, match="9 entries"):
        kernels.policy_head(hidden, weight, ids.clone().fill_(9), advantages)


def test_the_programs_own_check():
    check(DEVICE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_real_head_on_a_gpu():
    """Memory, and errors near plain PyTorch's, at Qwen2.5's vocabulary; float32 masters too."""
    N, d, V = 4096, 256, 151936
    case = head.random_case(N, d, 1000)
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(V, d, generator=generator, device=DEVICE).bfloat16()
    case = (case[0].bfloat16() / 2, weight, *case[2:])
    full = lambda: run(kernels.policy_head, case, "kl")
    full()
    assert peak_extra_bytes(full, DEVICE) < 0.65e9 + 2 * (N + V) * d
    got, plain = full(), run(head.plain_policy_head, case, "kl")
    want = [reference([x[rows] if i != 1 else x for i, x in enumerate(case)], "kl")
            for rows in torch.arange(N).split(512)]
    exact = {name: torch.cat([part[name] for part in want]) for name in ("logp", "entropy", "dhidden")}
    exact["dweight"] = sum(part["dweight"] for part in want)
    got, plain = rms_errors(got, exact), rms_errors(plain, exact)
    for name in plain:
        assert got[name] <= (1.4 if name == "dweight" else 1.1) * plain[name] + 1e-6, (name, got, plain)
    masters = run(kernels.policy_head, (case[0], weight.float(), *case[2:]), "kl")
    assert masters["dweight"].dtype == torch.float32
    assert rms_errors(masters, exact)["dweight"] <= 1.1 * plain["dweight"]
