"""Prefill's attention: PyTorch and Triton (interpreter without a GPU) against float64."""

import importlib

import pytest
import torch

prefill = importlib.import_module("kernels.prefill_attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(prefill.triton is None, reason="Triton is not installed")
VERSIONS = ["torch", pytest.param("triton", marks=needs_triton)]


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
    case = prefill.random_case(prefill.SPANS, H, KVH, D, unused=torch.nan)
    want = prefill.plain_prefill_attention(*case, D**-0.5)
    assert torch.allclose(attend(version, case, D**-0.5).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("T", [1, 31, 32, 33, 64, 65, 129])
def test_lengths_around_pages_and_tiles(version, T):
    """As a prompt, behind as many tokens, and as a stem behind a token of its own piece."""
    stem = [(0, range(5), 5), (3, range(5, 5 + T), T)]
    case = prefill.random_case([[(0, range(T), T)], [(T, range(2), 2)], stem], H=4, KVH=2, D=16)
    want = prefill.plain_prefill_attention(*case, 0.3)
    assert torch.allclose(attend(version, case, 0.3).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_large_scores_stay_finite(version):
    case = prefill.random_case([[(40, range(30), 30)]], D=16, unused=0.0)
    case[0].mul_(1e4)
    want = prefill.plain_prefill_attention(*case, 1.0)
    assert torch.allclose(attend(version, case, 1.0).double(), want, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's dot reads bfloat16 as integers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_little_more_than_its_rounding(dtype):
    case = prefill.random_case(prefill.SPANS, H=12, KVH=2, D=128, dtype=dtype)
    want = prefill.plain_prefill_attention(*case, 128**-0.5)
    assert (attend("triton", case, 128**-0.5).double() - want).abs().max() < 0.03


@needs_triton
def test_tiles_hold_every_query_once():
    pieces = [(spans, []) for spans in prefill.SPANS]
    tiles = prefill.plan_tiles(pieces, 3, 64, torch.bfloat16)
    queries = [q for first, count, *_ in tiles.tiles.tolist() for q in range(first, first + count)]
    assert sorted(queries) == list(range(sum(count for spans in prefill.SPANS for _, _, count in spans)))
    assert max(count for _, count, *_ in tiles.tiles.tolist()) <= 128 // 3
