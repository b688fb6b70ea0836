"""Prefill's attention: PyTorch and Triton (interpreter without a GPU) against float64."""

import importlib

import pytest
import torch

prefill = importlib.import_module("kernels.prefill_attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(prefill.triton is None, reason="Triton is not installed")
VERSIONS = ["torch", pytest.param("triton", marks=needs_triton)]
SPANS = [  # a prompt from its start; one behind 40 tokens; a run with two stems that start alike
    [(0, range(70), 70)], [(40, range(33), 33)], [(1, range(1), 1)],
    [(64, range(30), 30), (80, [30, 31, 32, 33], 4), (80, [30, 31, 34, 35, 36], 3), (94, [37], 1)],
]


def plain_prefill_attention(query, key, value, keys, values, pieces, scaling):
    """Query by query in float64."""
    out, at, group = torch.zeros(query.shape, dtype=torch.float64), 0, query.shape[1] // key.shape[1]
    for spans, pages in pieces:
        first = at
        for context, own, count in spans:
            own = first + torch.tensor(list(own))
            for i in range(count):
                seen = own[: len(own) - count + i + 1]
                k, v = (torch.cat([pool[pages].transpose(0, 1).flatten(1, 2)[:, :context].transpose(0, 1),
                                   packed[seen]]).double().repeat_interleave(group, 1)  # (keys,H,D)
                        for pool, packed in ((keys, key), (values, value)))
                weights = (torch.einsum("hd,thd->ht", query[at].double(), k) * scaling).softmax(-1)
                out[at] = torch.einsum("ht,thd->hd", weights, v)
                at += 1
    return out


def random_case(pieces, H=4, KVH=2, D=64, P=32, seed=0, dtype=torch.float32, unused=torch.nan):
    """pieces: spans of each. Pages in random order; `unused` fills what no context reaches."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [max(context for context, _, _ in spans) for spans in pieces]
    T, N = sum(count for spans in pieces for _, _, count in spans), sum(-(-c // P) for c in contexts) + 1
    qkv = torch.randn(T, H + 2 * KVH, D, generator=generator).to(dtype)  # one tensor, as in the network
    query, key, value = qkv.split([H, KVH, KVH], 1)
    pool, order = torch.full((2, N, KVH, P, D), unused, dtype=dtype), torch.randperm(N, generator=generator)
    taken, at, out = 0, 0, []
    for spans, context in zip(pieces, contexts):
        start, own = spans[0][0], slice(at, at + context - spans[0][0])
        pages = order[taken : (taken := taken + -(-context // P))].tolist()
        t, before = torch.arange(context), torch.randn(start, 2, KVH, D, generator=generator).to(dtype)
        page = torch.tensor(pages, dtype=torch.long)[t // P]
        pool[:, page, :, t % P] = torch.cat([before, torch.stack([key[own], value[own]], 1)])
        at += sum(count for _, _, count in spans)
        out.append((spans, pages))
    return query, key, value, *pool, out


def attend(version, case, scaling):
    *tensors, pieces = case
    tensors = [x.to(DEVICE) for x in tensors]
    if version == "triton":
        group = tensors[0].shape[1] // tensors[1].shape[1]
        plan = prefill.plan_tiles(pieces, group, tensors[0].shape[2], tensors[0].dtype).to(DEVICE)
        return prefill.triton_prefill_attention(*tensors, plan, scaling).cpu()
    plan = prefill.plan_masks(pieces, tensors[0].dtype, DEVICE)
    return prefill.torch_prefill_attention(*tensors, plan, scaling).cpu()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("H, KVH, D", [(2, 2, 64), (12, 2, 128), (7, 1, 80), (9, 3, 16)])
def test_prompts_contexts_and_stems(version, H, KVH, D):
    """Groups that do and do not fill a tile's rows; what no context reaches is NaN and is not read."""
    case = random_case(SPANS, H, KVH, D, unused=torch.nan)
    want = plain_prefill_attention(*case, D**-0.5)
    assert torch.allclose(attend(version, case, D**-0.5).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("T", [1, 31, 32, 33, 64, 65, 129])
def test_lengths_around_pages_and_tiles(version, T):
    """As a prompt, behind as many tokens, and as a stem behind a token of its own piece."""
    stem = [(0, range(5), 5), (3, range(5, 5 + T), T)]
    case = random_case([[(0, range(T), T)], [(T, range(2), 2)], stem], H=4, KVH=2, D=16)
    want = plain_prefill_attention(*case, 0.3)
    assert torch.allclose(attend(version, case, 0.3).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_large_scores_stay_finite(version):
    case = random_case([[(40, range(30), 30)]], D=16, unused=0.0)
    case[0].mul_(1e4)
    want = plain_prefill_attention(*case, 1.0)
    assert torch.allclose(attend(version, case, 1.0).double(), want, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's dot reads bfloat16 as integers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_little_more_than_its_rounding(dtype):
    case = random_case(SPANS, H=12, KVH=2, D=128, dtype=dtype)
    want = plain_prefill_attention(*case, 128**-0.5)
    assert (attend("triton", case, 128**-0.5).double() - want).abs().max() < 0.03


@needs_triton
def test_tiles_hold_every_query_once():
    pieces = [(spans, []) for spans in SPANS]
    tiles = prefill.plan_tiles(pieces, 3, 64, torch.bfloat16)
    queries = [q for first, count, *_ in tiles.tiles.tolist() for q in range(first, first + count)]
    assert sorted(queries) == list(range(sum(count for spans in SPANS for _, _, count in spans)))
    assert max(count for _, count, *_ in tiles.tiles.tolist()) <= 128 // 3
