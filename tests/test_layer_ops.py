"""Rotation, cache writes and gate of a decoder layer, against float64 and the modules of transformers."""

import importlib

import pytest
import tiny
import torch
import torch.nn.functional as F

from sample import Linear, side_by_side

ops = importlib.import_module("kernels.layer_ops")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(ops.triton is None, reason="no Triton"))]


def exact(qkv, heads, cos, sin, norms):
    """The rotated queries and keys in float64, by complex numbers."""
    x = qkv[:, : heads + (qkv.shape[1] - heads) // 2].double()
    if norms:
        scaled = x / (x.square().mean(-1, keepdim=True) + norms[2]).sqrt()
        x = torch.cat([scaled[:, :heads] * norms[0].double(), scaled[:, heads:] * norms[1].double()], 1)
    half = x.shape[2] // 2
    turn = torch.complex(cos[:, :half].double(), sin[:, :half].double())[:, None]
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([y.real, y.imag], -1)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,heads,kv_heads,D,norm,paged", [
    (5, 6, 2, 64, False, True), (1, 12, 2, 128, False, False), (7, 3, 1, 80, True, True),
    (4, 4, 4, 16, True, False)])
def test_rotate(version, dtype, T, heads, kv_heads, D, norm, paged):
    generator = torch.Generator().manual_seed(T)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    # rows of a wider tensor; what lies behind them stays
    wide = random(T, (heads + 2 * kv_heads) * D + 8).to(DEVICE, dtype)
    qkv = wide[:, :-8].view(T, heads + 2 * kv_heads, D)
    before, angles = wide.clone(), random(T, D // 2).repeat(1, 2).to(DEVICE)
    norms = (random(D).to(DEVICE, dtype), random(D).to(DEVICE, dtype), 1e-6) if norm else None
    want = exact(qkv.clone(), heads, angles.cos(), angles.sin(), norms)
    pages = None
    if paged:
        N, P = 9, 4
        keys, values = torch.full((2, N, kv_heads, P, D), torch.nan, device=DEVICE, dtype=dtype)
        slots = torch.randperm(N * P, generator=generator)[:T].to(DEVICE)
        pages = keys, values, slots // P, slots % P
    getattr(ops, f"{version}_rotate_")(qkv, heads, angles.cos(), angles.sin(), norms, pages)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.01, atol=0.01)
    torch.testing.assert_close(qkv[:, :heads].double(), want[:, :heads], **tolerance)
    own = before[:, :-8].view_as(qkv)
    if paged:
        where = slots // P, slice(None), slots % P
        torch.testing.assert_close(keys[where].double(), want[:, heads:], **tolerance)
        assert torch.equal(values[where], own[:, heads + kv_heads :])
        for pool in (keys, values):
            pool[where] = torch.nan
            assert pool.isnan().all()
    else:
        torch.testing.assert_close(qkv[:, heads : heads + kv_heads].double(), want[:, heads:], **tolerance)
    assert torch.equal(qkv[:, heads + kv_heads :], own[:, heads + kv_heads :])
    assert torch.equal(wide[:, -8:], before[:, -8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,I", [(1, 5), (3, 1024), (4, 2500)])
def test_swiglu(dtype, T, I):
    if ops.triton is None:
        pytest.skip("no Triton")
    gate_up = (4 * torch.randn(T, 2 * I, generator=torch.Generator().manual_seed(I))).to(DEVICE, dtype)
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])
    gate, up = gate_up.double().chunk(2, -1)
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.01, atol=1e-3)
    torch.testing.assert_close(ops.triton_swiglu(gate_up).double(), F.silu(gate) * up, **tolerance)


def test_weights_side_by_side_stay_the_modules_own(tmp_path):
    """Changes in place are seen both ways, training goes on, and the folder that is saved is the same."""
    net, plain = tiny.model(seed=3), tiny.model(seed=3)
    attention = net.base_model.layers[0].self_attn
    modules = attention.q_proj, attention.k_proj, attention.v_proj
    with torch.inference_mode():
        joined = side_by_side([m.weight for m in modules])
        assert side_by_side([m.weight for m in modules]).data_ptr() == joined.data_ptr()
        assert torch.equal(joined, torch.cat([m.weight for m in modules]))
    for model in (net, plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
        optimizer.step()
    assert torch.equal(joined, torch.cat([m.weight for m in modules]))
    for (name, p), q in zip(net.named_parameters(), plain.parameters()):
        assert torch.equal(p, q), name
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    for p, q in zip(again.parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_linear_of_a_gpu_gives_the_modules_sums():
    """Joined weights, bias, and the sum within the product; on a CPU by taking the path by force."""
    generator = torch.Generator().manual_seed(0)
    for bias in (True, False):
        modules = [torch.nn.Linear(6, n, bias=bias) for n in (4, 2, 2)]
        x, other = torch.randn(5, 6, generator=generator), torch.randn(5, 8, generator=generator)
        linear = Linear(torch.float16, *modules)  # a dtype that is not packed
        assert not linear.packed and not linear.joined
        with torch.no_grad():
            want = torch.cat([m(x) for m in modules], 1)
            linear.joined, linear.weight = True, side_by_side([m.weight for m in modules])
            linear.bias = side_by_side([m.bias for m in modules]) if bias else None
            assert torch.allclose(linear(x), want, atol=1e-6)
            assert torch.allclose(linear(x, "swish"), F.silu(want), atol=1e-6)
            assert torch.allclose(linear(x, "add", other.clone()), want + other, atol=1e-6)
            assert torch.allclose(linear(x, "mul", other.clone()), want * other, atol=1e-6)
