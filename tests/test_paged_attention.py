"""Paged attention and the token choice: PyTorch and Triton (interpreter without a GPU) against float64."""

import importlib

import numpy as np
import pytest
import tiny
import torch

paged = importlib.import_module("kernels.paged_attention")
choose = importlib.import_module("kernels.choose_token")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(paged.triton is None, reason="Triton is not installed")
VERSIONS = ["torch", pytest.param("triton", marks=needs_triton)]
RAGGED = [1, 31, 32, 33, 130]  # around the ends of pages, one token, several blocks


def plain_paged_attention(query, keys, values, table, lengths, scaling):
    """Row by row in float64."""
    out, group = torch.zeros(query.shape, dtype=torch.float64), query.shape[1] // keys.shape[1]
    for r, length in enumerate(lengths.tolist()):
        pages = table[r, : -(-length // keys.shape[2])].long()
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(group, 0)
                for x in (keys, values))
        weights = (torch.einsum("hd,htd->ht", query[r].double(), k) * scaling).softmax(-1)
        out[r] = torch.einsum("ht,htd->hd", weights, v)
    return out


def random_case(lengths, shared=0, H=4, KVH=2, D=64, P=32, seed=0, dtype=torch.float32, unused=torch.nan):
    """Rows of the given lengths, whose first `shared` pages, if they are full in all, are the same; pages in
    random order; `unused` fills everything that belongs to no row."""
    generator = torch.Generator().manual_seed(seed)
    R, M = len(lengths), -(-max(lengths) // P)
    query, keys, values = (torch.randn(*shape, generator=generator).to(dtype)
                           for shape in ((R, H, D), (R * M, KVH, P, D), (R * M, KVH, P, D)))
    table = torch.randperm(R * M, generator=generator).view(R, M)
    common = min(shared, min(lengths) // P)
    table[:, :common] = table[0, :common].clone()
    used = torch.zeros(R * M, P, dtype=torch.bool)
    for row, length in zip(table, lengths):
        used[row] |= (torch.arange(M * P) < length).view(M, P)
    keys, values = (x.where(used[:, None, :, None], unused) for x in (keys, values))
    return query, keys, values, table.int(), torch.tensor(lengths, dtype=torch.int32)


def attend(version, case, scaling, splits=1):
    query, keys, values, table, lengths = (x.to(DEVICE) for x in case)
    if version == "triton":
        return paged.triton_paged_attention(query, keys, values, table, lengths, scaling, splits).cpu()
    plan = paged.plan_pages(table.cpu().numpy(), lengths.cpu().numpy(), *keys.shape[1:3], query.device)
    return paged.torch_paged_attention(query, keys, values, plan, scaling).cpu()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("group", [1, 2, 6, 7])
@pytest.mark.parametrize("D", [64, 128])
def test_ragged_rows_and_groups(version, group, D):
    """In Triton everything outside the rows is NaN; PyTorch reads it with weight 0, so there it is 1e4."""
    unused = torch.nan if version == "triton" else 1e4
    case = random_case(RAGGED, H=2 * group, KVH=2, D=D, unused=unused)
    want = plain_paged_attention(*case, D**-0.5)
    assert torch.allclose(attend(version, case, D**-0.5).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("splits, lengths", [(2, RAGGED), (4, [300]), (8, [1])])
def test_splits_of_the_sequence(splits, lengths):
    if paged.triton is None:
        pytest.skip("no Triton")
    case = random_case(lengths, H=6, KVH=3)
    want = plain_paged_attention(*case, 0.125)
    assert torch.allclose(attend("triton", case, 0.125, splits).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("P", [16, 32])
def test_shared_pages(version, P):
    """11 rows share 3 pages: more than one group of sharers; a row that ends inside a shared page too."""
    lengths = [3 * P + i for i in range(10)] + [3 * P]
    case = random_case(lengths, shared=3, H=6, KVH=2, P=P, unused=0.0)
    case[4][7] = 2 * P + 5
    want = plain_paged_attention(*case, 0.125)
    assert torch.allclose(attend(version, case, 0.125).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_loses_little_more_than_its_rounding(version):
    if version == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter's dot reads bfloat16 as integers")
    case = random_case(RAGGED, H=6, KVH=2, dtype=torch.bfloat16, unused=0.0)
    want = plain_paged_attention(*case, 0.125)
    assert (attend(version, case, 0.125).double() - want).abs().max() < 0.03


def test_large_scores_stay_finite():
    for version in ("torch", "triton") if paged.triton is not None else ("torch",):
        case = random_case([40, 80], unused=0.0)
        case[0].mul_(1e4)
        want = plain_paged_attention(*case, 1.0)
        assert torch.allclose(attend(version, case, 1.0).double(), want, atol=1e-3)


def test_split_count_depends_on_shapes_alone():
    assert paged.split_count(2, 64, 132) == 16 and paged.split_count(2048, 64, 132) == 1
    assert paged.split_count(2, 4, 132) == 1


def test_a_plan_names_every_page_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        R, M, P = int(rng.integers(1, 9)), int(rng.integers(1, 7)), 16
        table = rng.permutation(R * M).reshape(R, M).astype(np.int32)
        table[:, : M // 2] = table[0, : M // 2]
        lengths = rng.integers(M // 2 * P + 1, M * P + 1, R).astype(np.int32)
        plan = paged.plan_pages(table, lengths, 2, P)
        named = plan.place[plan.target < 2 * R].sort().values
        want = [2 * (r * plan.width + i) + head for r in range(R) for i in range(-(-int(lengths[r]) // P))
                for head in range(2)]
        assert named.tolist() == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_gpu_sizes(rows):
    generator = np.random.default_rng(rows)
    lengths = generator.integers(1, 2048, rows).tolist()
    case = random_case(lengths, H=12, KVH=2, D=128, dtype=torch.bfloat16)
    want = plain_paged_attention(*case, 128**-0.5)
    query, keys, values, table, lengths = (x.cuda() for x in case)
    got = paged.paged_attention(query, keys, values, table, lengths, 128**-0.5)
    assert (got.cpu().double() - want).abs().max() < 0.03


# ---- the token choice --------------------------------------------------------------------------------------


def philox(seed, c0, c1):
    """Philox 4x32-10 of the counter (c0, c1, 0, 0) as tl.philox computes it: four words, as uint64."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in np.broadcast_arrays(c0, c1, 0, 0))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def numbers(seed, trace, position):
    """What the Triton version draws by, in float64."""
    return torch.from_numpy((philox(seed, position.numpy(), trace.numpy())[0] >> 8) / 2**24)


def plain_choose(logits, temperature, seed, trace, position):
    logp = (logits.double() / temperature).log_softmax(-1)
    drawn = numbers(seed, trace, position)[:, None]
    token = torch.searchsorted(logp.exp().cumsum(-1), drawn, right=True)[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0].float()


def triton_choose(logits, temperature, seed, trace, position):
    if choose.triton is None:
        pytest.skip("no Triton")
    rows = torch.stack([trace, position], 1).int().to(DEVICE)
    drawn = choose.triton_choose(logits.to(DEVICE), torch.tensor([float(temperature)], device=DEVICE),
                                 torch.tensor([seed], device=DEVICE), *rows.unbind(1))
    return drawn.cpu()[:, 0].long(), drawn.cpu()[:, 1]


def test_philox_is_the_published_one():
    """The known answer of Random123 for counter 0, key 0."""
    assert " ".join(f"{x:08x}" for x in philox(0, 0, 0)) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_triton_choice_is_its_twin(monkeypatch, block, temperature):
    monkeypatch.setattr(choose, "GPU_BLOCK", block)
    logits = 3 * torch.randn(40, 5003, generator=torch.Generator().manual_seed(1))
    logits[1, 17:4000] = -torch.inf
    logits[3] *= 300  # nearly all exponentials are 0
    trace, position = torch.arange(40) * 52_000_000, torch.arange(40) % 7
    token, logprob = triton_choose(logits, temperature, 2**40 + 3, trace, position)
    logp = (logits.double() / (temperature or 1.0)).log_softmax(-1)
    assert torch.allclose(logprob, logp.gather(1, token[:, None])[:, 0].float(), atol=1e-5)
    if temperature == 0:
        assert torch.equal(token, logits.argmax(-1))
    else:  # where the number falls, but for rounding
        u, p = numbers(2**40 + 3, trace, position), logp.exp()
        upper = p.cumsum(-1).gather(1, token[:, None])[:, 0]
        lower = upper - p.gather(1, token[:, None])[:, 0]
        assert (lower <= u + 2e-6).all() and (u <= upper + 2e-6).all()
        same = token == plain_choose(logits, temperature, 2**40 + 3, trace, position)[0]
        assert same.float().mean() > 0.9


@pytest.mark.parametrize("version", ["torch", "triton's twin"])
def test_choices_follow_the_distribution(version):
    """Chi-square over 40,000 draws from 700 entries (three blocks), bins of at least 20 expected draws."""
    draws, V = 40_000, 700
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(2))
    p = (logits[0].double() / 1.3).softmax(-1)
    counts = torch.zeros(V)
    for start in range(0, draws, 4000):
        rows = logits.expand(4000, V)
        if version == "torch":
            uniform = torch.rand(4000, generator=torch.Generator().manual_seed(start))
            token, logprob = choose.choose_token(rows, 1.3, uniform)
        else:
            trace = torch.arange(start, start + 4000)
            token, logprob = plain_choose(rows, 1.3, 11, trace, trace % 7)
        assert torch.allclose(logprob, p.log()[token].float(), atol=1e-5)
        counts += torch.bincount(token, minlength=V)
    tiny.assert_distributed(counts, p, draws)


@needs_triton
def test_weights_of_0_are_never_drawn_by_triton(monkeypatch):
    """Half of the entries, and whole blocks, have probability 0; numbers fall on the borders between them."""
    monkeypatch.setattr(choose, "GPU_BLOCK", 16)
    logits = torch.zeros(100, 70)
    logits[:, 1::2] = -torch.inf
    logits[:, 32:48] = -torch.inf
    token, logprob = triton_choose(logits, 1.0, 5, torch.arange(100), torch.zeros(100))
    assert (token % 2 == 0).all() and not ((token >= 32) & (token < 48)).any() and len(token.unique()) > 20
    assert torch.allclose(logprob, -torch.tensor(27.0).log(), atol=1e-5)
    logits[0] = torch.nan  # the sampler sees it by the log-prob; the token is one of the vocabulary
    token, logprob = triton_choose(logits[:3], 1.0, 5, torch.arange(3), torch.zeros(3))
    assert logprob[0].isnan() and 0 <= token[0] < 70 and logprob[1:].isfinite().all()


def test_choices_on_hard_rows():
    inf = float("inf")
    logits = torch.tensor([[-1e9, 0.0, -1e9, -1e9], [1e4, -1e4, 1e4, 0.0], [0.0, 0.0, 0.0, -inf]])
    wide = torch.full((3, 1000), -inf)
    wide[:, [3, 400, 700, 999]] = logits
    for u in (0.0, 0.25, 0.4999, 0.75, 1 - 2**-24):
        token, logp = choose.choose_token(logits, 1.0, torch.full((3,), u))
        assert token[0] == 1 and token[1] in (0, 2) and token[2] < 3
        assert (logp <= 0).all() and logp.isfinite().all()
        token, logp = choose.choose_token(wide, 1.0, torch.full((3,), u))
        assert token[0] == 400 and token[1] in (3, 700) and token[2] in (3, 400, 700)
        assert logp.isfinite().all()
    token, _ = choose.choose_token(logits, 0.0, torch.zeros(3))
    assert token[0] == 1 and token[1] == 0
