"""Paged attention and the token choice: PyTorch and Triton (interpreter without a GPU) against float64."""

import importlib

import numpy as np
import pytest
import torch

paged = importlib.import_module("kernels.paged_attention")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(paged.triton is None, reason="no Triton"))]
RAGGED = [1, 31, 32, 33, 130]  # around the ends of pages, one token, several blocks


def attend(version, case, scaling, splits=1):
    query, keys, values, table, lengths = (x.to(DEVICE) for x in case)
    if version == "triton":
        return paged.triton_paged_attention(query, keys, values, table, lengths, scaling, splits).cpu()
    plan = paged.plan_pages(table.cpu().numpy(), lengths.cpu().numpy(), keys.shape[2], query.device)
    return paged.torch_paged_attention(query, keys, values, plan, scaling).cpu()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("group", [1, 2, 6, 7])
@pytest.mark.parametrize("D", [64, 128])
def test_ragged_rows_and_groups(version, group, D):
    """In Triton everything outside the rows is NaN; PyTorch reads it with weight 0, so there it is 1e4."""
    unused = torch.nan if version == "triton" else 1e4
    case = paged.random_case(RAGGED, H=2 * group, KVH=2, D=D, unused=unused)
    want = paged.plain_paged_attention(*case, D**-0.5)
    assert torch.allclose(attend(version, case, D**-0.5).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("splits, lengths", [(2, RAGGED), (4, [300]), (8, [1])])
def test_splits_of_the_sequence(splits, lengths):
    if paged.triton is None:
        pytest.skip("no Triton")
    case = paged.random_case(lengths, H=6, KVH=3)
    want = paged.plain_paged_attention(*case, 0.125)
    assert torch.allclose(attend("triton", case, 0.125, splits).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("P", [16, 32])
def test_shared_pages(version, P):
    """11 rows share 3 pages: more than one group of sharers; a row that ends inside a shared page too."""
    lengths = [3 * P + i for i in range(10)] + [3 * P]
    case = paged.random_case(lengths, shared=3, H=6, KVH=2, P=P, unused=0.0)
    case[4][7] = 2 * P + 5
    want = paged.plain_paged_attention(*case, 0.125)
    assert torch.allclose(attend(version, case, 0.125).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_loses_little_more_than_its_rounding(version):
    if version == "triton" and DEVICE == "cpu":
        pytest.skip("the interpreter's dot reads bfloat16 as integers")
    case = paged.random_case(RAGGED, H=6, KVH=2, dtype=torch.bfloat16, unused=0.0)
    want = paged.plain_paged_attention(*case, 0.125)
    assert (attend(version, case, 0.125).double() - want).abs().max() < 0.03


def test_large_scores_stay_finite():
    for version in ("torch", "triton") if paged.triton is not None else ("torch",):
        case = paged.random_case([40, 80], unused=0.0)
        case[0].mul_(1e4)
        want = paged.plain_paged_attention(*case, 1.0)
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
        plan = paged.plan_pages(table, lengths, P)
        named = torch.cat([plan.place[plan.target < R], plan.shared_place[plan.shared_target < R]]).sort().values
        want = [r * plan.width + i for r in range(R) for i in range(-(-int(lengths[r]) // P))]
        assert named.tolist() == want


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_gpu_sizes(rows):
    generator = np.random.default_rng(rows)
    lengths = generator.integers(1, 2048, rows).tolist()
    case = paged.random_case(lengths, H=12, KVH=2, D=128, dtype=torch.bfloat16)
    want = paged.plain_paged_attention(*case, 128**-0.5)
    query, keys, values, table, lengths = (x.cuda() for x in case)
    got = paged.paged_attention(query, keys, values, table, lengths, 128**-0.5)
    assert (got.cpu().double() - want).abs().max() < 0.03
