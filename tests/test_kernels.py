"""Both versions of the kernels, PyTorch and Triton, against float64: values, gradients, edges, memory. 30 s.
policy_head has a file of its own, test_policy_head.py.

Without a CUDA device the Triton versions run in Triton's interpreter (see conftest.py), on small inputs; with
one they are compiled, and the tests marked gpu add real sizes. Every torch.empty is filled with NaN, so that
a number left unwritten fails a test.
"""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from experiments.bench_head import peak_extra_bytes

# `kernels.token_logprob` is the function; its module is needed too, for the parts that the tests replace
logprob = importlib.import_module("kernels.token_logprob")
advantages = importlib.import_module("kernels.token_advantages")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(logprob.triton is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
VERSIONS = ["torch", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def nan_in_empty_tensors():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=VERSIONS)
def version(request, monkeypatch):
    """Runs a token_logprob test with each version's row functions, Triton's in blocks of 64 columns."""
    names = (f"{request.param}_row_stats", f"{request.param}_row_grads_")
    functions = tuple(getattr(logprob, name) for name in names)
    monkeypatch.setattr(logprob, "row_functions", lambda hidden: functions)
    monkeypatch.setattr(logprob, "block", lambda V: 64)
    monkeypatch.setitem(logprob.SLAB_BYTES, DEVICE, 4 * 4 * 130)  # PyTorch's functions: 4 rows of 130 at once
    return request.param


def case(N, d, V, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, d, generator=generator) * scale).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(V, d, generator=generator).to(DEVICE, dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator).to(DEVICE)


def run(function, hidden, weight, ids, temperature=1.0, use=(1, 1)):
    """logp, entropy, dhidden, dweight for random g and e; use = which of the two outputs the loss holds."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    outputs = function(hidden, weight, ids, temperature)
    g = torch.randn(2, len(ids), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sum((x * y).sum() for x, y, used in zip(outputs, g, use) if used).backward()
    return [x.detach() for x in (*outputs, hidden.grad, weight.grad)]


def reference(hidden, weight, ids, temperature=1.0, use=(1, 1)):
    return run(logprob.plain_token_logprob, hidden.double(), weight.double(), ids, temperature, use)


def assert_near(got, want, tolerance):
    for x, y in zip(got, want):
        atol = tolerance * (float(y.abs().max()) if y.numel() else 1) + 1e-6
        torch.testing.assert_close(x.double(), y, rtol=0, atol=atol)


# ---- token_logprob -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [(1, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("shape, temperature", [((1, 8, 5), 1.0), ((17, 16, 130), 0.6), ((5, 12, 1003), 1.7)])
def test_values_and_gradients(version, monkeypatch, shape, temperature, use):
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 7 * shape[2] * 4)  # at most 7 rows a chunk: 6 + 6 + 5
    inputs = case(*shape)
    got = run(logprob.token_logprob, *inputs, temperature, use)
    assert all(x.dtype == torch.float32 for x in got)
    assert_near(got, reference(*inputs, temperature, use), 1e-5)


def test_a_worked_example(version):
    # logits 0, ln 2, ln 5: p = 1/8, 2/8, 5/8
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]], device=DEVICE)
    ids = torch.tensor([0, 1, 2], device=DEVICE)
    logp, entropy = kernels.token_logprob(torch.ones(3, 1, device=DEVICE), weight, ids)
    torch.testing.assert_close(logp.cpu().exp(), torch.tensor([0.125, 0.25, 0.625]))
    want = (math.log(8) + 2 * math.log(4) + 5 * math.log(1.6)) / 8
    torch.testing.assert_close(entropy.cpu(), torch.full((3,), want))


def test_large_logits(version):
    hidden, weight, ids = case(40, 4, 200)
    weight = torch.nn.functional.normalize(weight.detach()) * 100  # logits up to 1e4
    hidden = torch.nn.functional.normalize(hidden.detach()) * 100
    hidden[0], ids[1] = 0, (weight @ hidden[1]).argmax()  # a uniform row and a certain one
    got = run(logprob.token_logprob, hidden, weight, ids)
    assert all(x.isfinite().all() for x in got)
    assert (got[0] <= 0).all() and (got[1] >= 0).all()
    assert got[0][0].item() == pytest.approx(-math.log(200))
    assert got[1][0].item() == pytest.approx(math.log(200))
    assert got[0][1].item() > -1e-3
    want = reference(hidden, weight, ids)
    assert_near(got[:2], want[:2], 1e-6)
    assert_near(got[2:], want[2:], 2e-3)  # float32 logits of 1e4 are off by up to 1e-3 themselves


def test_no_rows(version):
    hidden, weight, ids = case(0, 8, 11)
    logp, entropy, dhidden, dweight = run(logprob.token_logprob, hidden, weight, ids)
    assert logp.shape == entropy.shape == (0,) and dhidden.shape == (0, 8)
    assert (dweight == 0).all() and dweight.shape == (11, 8)


def test_chunks_change_nothing(version, monkeypatch):
    inputs, results = case(17, 16, 90), []
    for chunk_bytes in (1, 7 * 90 * 4, 10**6):  # 1 row, 6 rows, all rows
        monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, chunk_bytes)
        results.append(run(logprob.token_logprob, *inputs))
        assert all(x.equal(y) for x, y in zip(results[-1], run(logprob.token_logprob, *inputs)))  # same bits
    for result in results[1:]:
        assert_near(result, [x.double() for x in results[0]], 3e-6)


def test_strided_inputs(version):
    hidden, weight, ids = case(12, 6, 20)
    wide = torch.empty(24, 13, device=DEVICE)
    wide[::2, 1::2] = hidden.detach()
    strided = (wide[::2, 1::2], weight.detach().T.contiguous().T, torch.stack([ids, ids], 1)[:, 0])
    assert not any(x.is_contiguous() for x in strided)
    assert_near(run(logprob.token_logprob, *strided), reference(hidden, weight, ids), 2e-6)
    strided[0].requires_grad_()
    logprob.token_logprob(*strided)[0].sum().backward()  # sum's gradient is one number, expanded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errs_hardly_more_than_plain_pytorch(version, monkeypatch, dtype):
    # 16-bit logits and products, as on CUDA, whatever this CPU has.
    # Temperature 0.5 scales by a power of two: both versions round the same logits, no luck is involved.
    monkeypatch.setattr(logprob, "product_dtype", lambda hidden: hidden.dtype)
    inputs = case(48, 32, 300, dtype, scale=0.5)
    want, plain = reference(*inputs, 0.5), run(logprob.plain_token_logprob, *inputs, 0.5)
    got = run(logprob.token_logprob, *inputs, 0.5)
    for x, y, exact in zip(got, plain, want):
        error, plain_error = ((v.double() - exact).square().mean().sqrt() for v in (x, y))
        slack = 1.3 if version == "triton" and DEVICE == "cpu" else 1.1  # the interpreter cuts bfloat16 off
        assert error <= slack * plain_error + 1e-6


def test_16_bit_inputs_are_multiplied_in_float32_on_a_cpu_without_instructions_for_them(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    hidden, weight, ids = (x.cpu() for x in case(50, 32, 300, torch.bfloat16))
    got = run(logprob.token_logprob, hidden, weight, ids)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    want = reference(hidden, weight, ids)
    assert_near(got[:2], want[:2], 2e-6)
    assert_near(got[2:], want[2:], 2**-8)


def test_master_weights_and_autocast():
    hidden, weight, ids = case(20, 16, 50)
    half = hidden.detach().to(torch.bfloat16)
    want = run(logprob.token_logprob, half, weight, ids)
    assert want[3].dtype == torch.float32  # the gradient of a float32 weight is never rounded to 16 bits
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(logprob.token_logprob, hidden, weight, ids)
    assert all(x.equal(y) for x, y in zip(got[:2], want[:2])) and got[3].equal(want[3])


def test_gradcheck():
    hidden, weight, ids = case(7, 3, 11, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: logprob.token_logprob(h, w, ids, 0.7), (hidden, weight))


@pytest.mark.parametrize("frozen, products", [("hidden", 3), ("weight", 3), ("neither", 4), ("both", 1)])
def test_no_product_for_a_frozen_input(frozen, products):
    hidden, weight, ids = case(6, 4, 9)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.profiler.profile() as profile:
        logp, _ = logprob.token_logprob(hidden, weight, ids)
        if logp.requires_grad:
            logp.sum().backward()
    assert tiny.matrix_products(profile) == products
    assert (hidden.grad is None) == (frozen in ("hidden", "both"))
    assert (weight.grad is None) == (frozen in ("weight", "both"))


def test_memory(monkeypatch):
    """N x V is 32 MB here and a chunk 2 MB (CUDA: 1 MB); row functions and products take little more."""
    N, d, V = 2000, 16, 4000
    monkeypatch.setitem(logprob.CHUNK_BYTES, DEVICE, 10**6)
    monkeypatch.setitem(logprob.SLAB_BYTES, DEVICE, 10**5)
    hidden, weight, ids = case(N, d, V)

    def forward():
        with torch.no_grad():
            assert logprob.token_logprob(hidden, weight, ids)[0].grad_fn is None

    def full():
        logp, entropy = logprob.token_logprob(hidden, weight, ids)
        (logp.sum() + entropy.sum()).backward()

    gradients, chunk = 4 * d * (N + V), 4 * V * logprob.chunk_rows(N, V, 4, DEVICE)
    assert chunk <= (10**6 if DEVICE == "cuda" else 2.1e6)
    assert 0.9 * chunk < peak_extra_bytes(forward, DEVICE) < chunk + 0.32e6
    assert peak_extra_bytes(full, DEVICE) < gradients + chunk + 0.5e6
    plain = lambda: logprob.plain_token_logprob(hidden, weight, ids)
    assert peak_extra_bytes(plain, DEVICE) > 4 * N * V  # the measure sees what there is to see


def test_ids_out_of_range():
    hidden, weight, _ = (x.detach().cpu() for x in case(2, 4, 9))
    for bad in (-100, -1, 9):
        with pytest.raises(IndexError, match="9 entries"):
            logprob.token_logprob(hidden, weight, torch.tensor([0, bad]))


@needs_triton
def test_ids_out_of_range_give_nan_in_triton():
    ids = torch.tensor([-100, 0, 9], device=DEVICE)
    logp, entropy, lse = torch.zeros(3, 3, device=DEVICE)
    logprob.triton_row_stats(torch.zeros(3, 9, device=DEVICE), ids, logp, entropy, lse)
    assert logp.isnan().tolist() == [True, False, True]


def run_python(code):
    """In a process of its own at the repository's root, with Triton's compiler, not its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(kernels.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)


def test_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # what `import triton` finds on macOS
        import torch, kernels
        logp, _ = kernels.token_logprob(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))
        assert abs(float(logp.exp().sum()) - 0.5) < 1e-6
        one = torch.ones(2, 1)
        assert not kernels.token_advantages(one, one.long()[:, 0], one.long() - 1, 2, "std").any()
    """
    run_python(code)


@needs_triton
def test_kernels_compile_for_a_hopper_gpu():
    """Down to machine code, which takes no GPU: the interpreter runs programs that the compiler refuses."""
    code = """if True:
        import importlib, pathlib, re, subprocess, tempfile
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        dump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

        def build(kernel, signature, warps=8, stages=3, arch=90, **constants):
            names = [name for name in kernel.arg_names if name not in constants]
            types = dict(zip(names, signature.split(), strict=True), **dict.fromkeys(constants, "constexpr"))
            types = {name: types[name] for name in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types)
                       if types[name].startswith("*") or name.endswith("stride")}  # as they are at run time
            source = ASTSource(kernel, types, constants, aligned)
            program = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                                     options={"num_warps": warps, "num_stages": stages})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                pathlib.Path(file.name).write_bytes(program.asm["cubin"])
                usage = subprocess.run([dump, "--dump-resource-usage", file.name], check=True,
                                       capture_output=True, text=True).stdout
            spilled = int(re.search(r"STACK:(\\d+)", usage)[1])
            assert spilled == 0, f"{kernel.__name__} {signature}: {spilled} bytes of registers in memory"
            room = {80: 166912, 89: 101376, 90: 232448}[arch]  # shared memory of a program, CUDA's guide
            shared = program.metadata.shared
            assert shared <= room, f"{kernel.__name__} {signature}: {shared} bytes of {room}"

        logprob = importlib.import_module("kernels.token_logprob")
        advantages = importlib.import_module("kernels.token_advantages")
        head = importlib.import_module("kernels.policy_head")
        for z in ("*bf16", "*fp32"):
            build(logprob.row_stats_kernel, f"{z} *i64 *fp32 *fp32 *fp32 i32", BLOCK=4096)
            build(logprob.row_grads_kernel, f"{z} *i64 *fp32 *fp32 *fp32 *fp32 i32", BLOCK=4096)
            pointers = "*fp32 *fp32 *fp32 *fp32 *i1 i32 fp32 fp32 fp32 fp32 fp32 fp32"
            build(head.row_loss_kernel, f"{z} *i64 *fp32 *fp32 *fp32 {pointers}", BLOCK=4096)
            build(head.row_loss_kernel, f"{z} *i64 *fp32 {pointers}", BLOCK=4096, old_ptr=None, ref_ptr=None)
        for norm in advantages.NORMS:
            build(advantages.token_advantages_kernel, "*fp32 *i64 *i64 *fp32 i32 i32 fp32",
                  GROUP=12, GROUP_BLOCK=16, STEP_BLOCK=16, TOKEN_BLOCK=1024, NORM=norm)

        choose = importlib.import_module("kernels.choose_token")
        attention = importlib.import_module("kernels.paged_attention")
        prefill = importlib.import_module("kernels.prefill_attention")
        ops = importlib.import_module("kernels.layer_ops")
        for z, rows, block in (("*bf16", 128, 64), ("*fp32", 32, 16)):
            build(choose.sum_kernel, f"{z} *fp32 *fp32 i32", warps=4, BLOCK=4096)
            build(choose.draw_kernel, f"{z} *fp32 *i64 *fp32 *i32 *i32 *fp32 i32 i32 i32", warps=8,
                  BLOCK=4096, BLOCKS=64)
            for D, splits, out in ((64, 1, z), (128, 8, "*fp32")):  # heads of SmolLM2 and Qwen2.5-1.5B
                build(attention.paged_attention_kernel, f"{z} {z} {z} *i32 *i32 {out} *fp32 fp32 i32 i32 i32",
                      warps=4, P=32, D=D, GROUP=6, GROUP_BLOCK=16, TOKEN_BLOCK=block, D_BLOCK=D,
                      SPLITS=splits)
                packed = f"{z} {z} {z} {z} {z} *i32 *i32 *i32 {z}"
                for arch, keys in ((90, rows // 2), (80, rows // 4)) if z == "*bf16" else ((90, 16),):
                    build(prefill.prefill_attention_kernel, f"{packed} fp32 i32 i32 i32 i32", stages=5,
                          arch=arch, P=32, D=D, GROUP=6, ROWS=rows, KEYS=keys, D_BLOCK=D)
            build(prefill.prefill_attention_kernel, f"{packed} fp32 i32 i32 i32 i32", stages=2, arch=89, P=32,
                  D=256, GROUP=6, ROWS=min(rows, 64), KEYS=32 if rows == 128 else 16, D_BLOCK=256)
            build(attention.merge_kernel, f"*fp32 *fp32 {z}", warps=4, D=128, D_BLOCK=128, SPLITS=8)
            shape = dict(P=32, H=12, KVH=2, D=128, HEAD_BLOCK=16, HALF_BLOCK=64)
            pages, none = f"{z} {z} *i64 *i64", dict.fromkeys(("query_norm_ptr", "key_norm_ptr"))
            build(ops.rotate_kernel, f"{z} *fp32 *fp32 fp32 {pages} i32", warps=4, **shape, **none)
            build(ops.rotate_kernel, f"{z} *fp32 *fp32 {z} {z} fp32 {pages} i32", warps=4, **shape)
            none = dict.fromkeys(("keys_ptr", "values_ptr", "page_ptr", "place_ptr"))
            build(ops.rotate_kernel, f"{z} *fp32 *fp32 {z} {z} fp32 i32", warps=4, **shape, **none)
            build(ops.swiglu_kernel, f"{z} {z} i32", warps=4, BLOCK=1024)
    """
    run_python(code)


@pytest.mark.gpu
@needs_cuda
def test_a_real_head_on_a_gpu():
    N, d, V = 4096, 256, 151936  # Qwen2.5's vocabulary
    hidden, weight, ids = case(N, d, V, torch.bfloat16, scale=0.5)
    full = lambda: run(logprob.token_logprob, hidden, weight, ids)
    full()  # compiles, and cuBLAS takes its workspaces
    extra = peak_extra_bytes(full, DEVICE)
    assert extra < 0.65e9 + 2 * (N + V) * d  # a chunk and the gradients
    got, plain = full(), run(logprob.plain_token_logprob, hidden, weight, ids)
    want = [torch.zeros_like(x, dtype=torch.float64) for x in got]
    for rows in torch.arange(N, device=DEVICE).split(512):  # float64 logits of 512 rows are 0.6 GB
        h, w = (x.detach().double().requires_grad_() for x in (hidden[rows], weight))
        outputs = logprob.plain_token_logprob(h, w, ids[rows])
        g = torch.randn(2, N, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, rows]
        sum((x * y).sum() for x, y in zip(outputs, g)).backward()
        for total, part in zip(want[:3], (*outputs, h.grad)):
            total[rows] = part.detach()
        want[3] += w.grad
    for x, y, exact, slack in zip(got, plain, want, (1.1, 1.1, 1.1, 1.4)):  # dweight: a rounding per chunk
        error, plain_error = ((v.double() - exact).square().mean().sqrt() for v in (x, y))
        assert error <= slack * plain_error + 1e-6


@pytest.mark.gpu
@needs_cuda
@needs_triton
def test_offsets_beyond_2_to_the_31_on_a_gpu():
    R, V = 14500, 151936
    z = torch.zeros(R, V, device=DEVICE, dtype=torch.bfloat16)
    z[-1, -1] = 20.0
    ids = torch.full((R,), V - 1, device=DEVICE)
    logp, entropy, lse = torch.empty(3, R, device=DEVICE)
    logprob.triton_row_stats(z, ids, logp, entropy, lse)
    # A wrapped offset would give about -12. Absolute: e^-20 is added to a 1 up to 15 times, as the compiler
    # orders a thread's sums, and float32 rounds each time, all in one direction: 5e-7.
    assert logp[-1].item() == pytest.approx(-math.log1p((V - 1) * math.exp(-20)), abs=2e-6)
    assert logp[:-1].cpu().sub(-math.log(V)).abs().max() < 1e-4


# ---- token_advantages --------------------------------------------------------------------------------------

NAN = math.nan


@pytest.fixture(params=VERSIONS)
def compute(request, monkeypatch):
    """token_advantages with each version; lists in, lists out."""
    for name in ("torch_token_advantages", "triton_token_advantages"):
        monkeypatch.setattr(advantages, name, getattr(advantages, f"{request.param}_token_advantages"))
    return compute_on_device


def compute_on_device(grades, n_steps, step_ids, group, norm):
    tensors = torch.tensor(grades, dtype=torch.float32), torch.tensor(n_steps), torch.tensor(step_ids)
    return kernels.token_advantages(*(x.to(DEVICE) for x in tensors), group, norm).cpu()


def per_step(compute, traces, group, norm):
    """Advantages of ragged traces, one token per step: a list per trace."""
    S = max(map(len, traces))
    grades = [s + [NAN] * (S - len(s)) for s in traces]
    ids = [list(range(len(s))) + [-1] * (S - len(s)) for s in traces]
    out = compute(grades, [len(s) for s in traces], ids, group, norm)
    assert all((row[len(s):] == 0).all() for row, s in zip(out, traces))
    return [row[: len(s)].tolist() for row, s in zip(out, traces)]


WORKED = [  # norm, group, traces, advantages; all computed by hand
    # S = 1
    ("delta", 1, [[0.75]], [[0]]),
    ("end", 1, [[0.75]], [[0.75]]),
    ("step_mean", 2, [[0.75], [0.25]], [[0.25], [-0.25]]),
    # S = 2
    ("delta", 1, [[0.25, 1.0]], [[-0.75, 0.75]]),
    ("end", 1, [[0.25, 1.0]], [[-0.75, 1.0]]),
    # S = 3
    ("delta", 1, [[0.25, 0.75, 0.5]], [[-0.25, 0.5, -0.25]]),
    ("end", 1, [[0.25, 0.75, 0.5]], [[-0.25, 0.25, 0.5]]),
    # many, equal
    ("delta", 1, [[0.5] * 20], [[0] * 20]),
    ("end", 1, [[0.5] * 20], [[0] * 19 + [0.5]]),
    # trace means 0.5 and 0.75, so m = 0.625: each trace counts once, however many steps it has
    ("step_mean", 2, [[0.25, 0.75], [0.5, 0.75, 1.0]], [[-0.375, 0.125], [-0.125, 0.125, 0.375]]),
    # an unread grade first, in the middle, last: its trace gets 0, its neighbour goes on
    *[("delta", 2, [bad, [0.0, 1.0]], [[0, 0, 0], [-1, 1]])
      for bad in ([NAN, 0.5, 1.0], [0.5, NAN, 1.0], [0.5, 1.0, NAN])],
    *[("end", 2, [bad, [0.0, 1.0]], [[0, 0, 0], [-1, 1]])
      for bad in ([NAN, 0.5, 1.0], [0.5, NAN, 1.0], [0.5, 1.0, NAN])],
    *[("step_mean", 3, [bad, [0.0, 1.0], [1.0]], [[0, 0, 0], [-0.75, 0.25], [0.25]])
      for bad in ([NAN, 0.5, 1.0], [0.5, NAN, 1.0], [0.5, 1.0, NAN])],
    # a trace without grades; a group without one read trace
    ("step_mean", 3, [[], [0.5], [1.0]], [[], [-0.25], [0.25]]),
    ("step_mean", 2, [[NAN], [NAN, 0.5], [0.5], [1.0]], [[0], [0, 0], [-0.25], [0.25]]),
    # outcome: m = 0.5, unbiased variance (0.25 + 0 + 0.25) / 2
    ("mean", 3, [[0.0], [0.5], [1.0]], [[-0.5], [0], [0.5]]),
    ("std", 3, [[0.0], [0.5], [1.0]], [[-0.5 / 0.500001], [0], [0.5 / 0.500001]]),
    ("std", 4, [[NAN], [0.0], [0.5], [1.0]], [[0], [-0.5 / 0.500001], [0], [0.5 / 0.500001]]),
    ("mean", 4, [[0.0], [NAN], [1.0], []], [[-0.5], [0], [0.5], []]),
    # fewer than two read traces, and equal grades
    ("std", 2, [[NAN], [1.0], [NAN], [NAN]], [[0], [0], [0], [0]]),
    ("std", 3, [[1.0], [1.0], [NAN]], [[0], [0], [0]]),
]


@pytest.mark.parametrize("norm, group, traces, want", WORKED)
def test_worked_examples(compute, norm, group, traces, want):
    got = per_step(compute, traces, group, norm)
    for x, y in zip(got, want, strict=True):
        assert x == pytest.approx(y, abs=1e-6)


@pytest.mark.parametrize("grade", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("noise", [0.0, 1.2e-7])
@pytest.mark.parametrize("norm", ["std", "mean", "step_mean"])
def test_equal_grades_up_to_rounding_get_exactly_0(compute, grade, noise, norm):
    """The float32 mean of 7 times 0.7 is not 0.7: without a rule that rounding becomes advantages, which std
    enlarges; and AdamW makes updates of any."""
    traces = [[grade + noise * (i % 2)] for i in range(7)]
    assert per_step(compute, traces, 7, norm) == [[0.0]] * 7


def test_tokens_follow_their_step(compute):
    #      prompt  "step 1"  "step 2", a token that was not sampled, "step 3", padding
    ids = [[-1, -1, 0, 0, 0, 1, -1, 2, 2, -1]]
    got = compute([[0.25, 0.75, 0.5]], [3], ids, 1, "delta")
    assert got.tolist() == [[0, 0, -0.25, -0.25, -0.25, 0.5, 0, -0.25, -0.25, 0]]


@pytest.mark.parametrize("norm", advantages.NORMS)
@pytest.mark.parametrize("N, S, T", [(0, 3, 4), (4, 0, 4), (4, 1, 0)])
def test_nothing_to_do(compute, norm, N, S, T):
    zeros = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    grades, ids = torch.zeros(N, S, device=DEVICE), torch.zeros(N, T, dtype=torch.int64, device=DEVICE)
    assert kernels.token_advantages(grades, zeros, ids, 2, norm).equal(torch.zeros(N, T, device=DEVICE))


@pytest.mark.parametrize("n_steps, ids, group, norm, message", [
    ([1, 1, 1], [[0]] * 3, 2, "std", "groups of 2"),
    ([1, 1, 1], [[0]] * 3, 3, "grpo", "not one of"),
    ([1, 2, 1], [[0]] * 3, 3, "mean", "rows \\[1\\]"),
    ([1, 1, 3], [[0]] * 3, 3, "delta", "rows \\[2\\]"),
    ([1, 1, 2], [[1], [0], [1]], 3, "delta", "rows \\[0\\]"),
])  # fmt: skip
def test_wrong_input_is_named(n_steps, ids, group, norm, message):
    with pytest.raises(AssertionError, match=message):
        compute_on_device([[0.5, 0.5]] * 3, n_steps, ids, group, norm)


GRADES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 0.3, 0.61, NAN])


@st.composite
def batches(draw):
    group, problems = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    norm = draw(st.sampled_from(advantages.NORMS))
    most = 1 if norm in ("std", "mean") else 5
    traces = st.lists(GRADES, max_size=most)
    return draw(st.lists(traces, min_size=group * problems, max_size=group * problems)), group, norm


def read(trace):
    return len(trace) > 0 and not any(map(math.isnan, trace))


@settings(max_examples=150, deadline=None)
@given(batches())
def test_properties(batch):
    traces, group, norm = batch
    if not any(traces):
        return
    got = per_step(compute_on_device, traces, group, norm)
    assert all(math.isfinite(x) for row in got for x in row)
    assert all(not any(row) for row, s in zip(got, traces) if not read(s))
    for row, s in zip(got, traces):
        if norm == "delta":
            assert sum(row) == pytest.approx(0, abs=1e-5)
        if norm == "end" and read(s):
            assert row[-1] == pytest.approx(s[-1])
    for i in range(0, len(traces), group):
        rows = [row for row, s in zip(got[i : i + group], traces[i : i + group]) if read(s)]
        if norm in ("std", "mean", "step_mean") and rows:
            assert sum(sum(row) / len(row) for row in rows) == pytest.approx(0, abs=1e-4)
        if norm == "std" and any(map(any, rows)):  # unbiased std 1
            assert sum(row[0] ** 2 for row in rows) == pytest.approx(len(rows) - 1, rel=1e-4)
        # a group knows nothing of the others
        if any(traces[i : i + group]):
            assert per_step(compute_on_device, traces[i : i + group], group, norm) == got[i : i + group]


def loop_token_advantages(grades, n_steps, step_ids, group, norm):
    """The rules trace by trace in Python floats (float64)."""
    traces = [row[:n] for row, n in zip(grades.tolist(), n_steps.tolist())]
    read = [len(s) > 0 and all(x == x for x in s) for s in traces]
    out = torch.zeros(step_ids.shape)
    for i, s in enumerate(traces):
        if not read[i]:
            continue
        first = i // group * group
        others = [fmean(traces[j]) for j in range(first, first + group) if read[j]]
        if norm == "delta":
            A = [s[k] - s[k - 1] for k in range(len(s))]  # s[-1] is the last grade
        elif norm == "end":
            A = [x - s[-1] for x in s[:-1]] + [s[-1]]
        else:
            A = [x - fmean(others) for x in s]
        if norm in ("mean", "step_mean"):
            A = [0.0 if abs(x) <= advantages.EQUAL else x for x in A]
        if norm == "std":
            dead = len(others) < 2 or max(others) - min(others) <= advantages.EQUAL
            A = [0.0 if dead else x / (stdev(others) + 1e-6) for x in A]
        for t, k in enumerate(step_ids[i].tolist()):
            out[i, t] = A[k] if k >= 0 else 0.0
    return out


def random_case(N, S, T, seed):
    """Grades (N,S), NaN beyond n_steps and at step 1 of each eighth trace; ids with prompt and padding."""
    generator = torch.Generator().manual_seed(seed)
    grades = torch.randint(5, (N, S), generator=generator) / 4
    n_steps = torch.randint(0, S + 1, (N,), generator=generator)
    grades[torch.arange(S) >= n_steps[:, None]] = torch.nan
    grades[::8, 0] = torch.nan
    ids = (torch.rand(N, T, generator=generator).sort(1).values * (n_steps[:, None] + 2)).long() - 1
    ids[ids >= n_steps[:, None]] = -1
    return [x.to(DEVICE) for x in (grades, n_steps, ids)]


@pytest.mark.parametrize("norm", advantages.NORMS)
@pytest.mark.parametrize("N, S, T, group", [(6, 1, 7, 1), (12, 7, 20, 3), (15, 19, 30, 5)])
def test_against_a_loop_in_float64(compute, norm, N, S, T, group):
    S = 1 if norm in ("std", "mean") else S
    grades, n_steps, ids = random_case(N, S, T, seed=N)
    want = loop_token_advantages(grades, n_steps, ids, group, norm)
    got = kernels.token_advantages(grades, n_steps, ids, group, norm).cpu()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    filler = grades.where(~grades.isnan() | (torch.arange(S, device=DEVICE) < n_steps[:, None]), torch.inf)
    assert kernels.token_advantages(filler, n_steps, ids, group, norm).cpu().equal(got)  # no grade, not read
