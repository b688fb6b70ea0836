"""README.md as a lesson that stays true: its loop, its map of formulas, its glossary, its ablations."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
import torch

import exprl

README = (tiny.ROOT / "README.md").read_text()
CORE = [file for folder in (".", "data", "kernels") for file in sorted((tiny.ROOT / folder).glob("*.py"))]
ABLATIONS = tiny.ROOT / "experiments" / "ablations"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.training_world(tmp_path_factory.mktemp("world"))


def test_the_loop_of_the_readme_is_the_program(world, monkeypatch, capsys):
    """The weights after a step. Adam's first step has one size: a sum rounded otherwise may turn a sign."""
    _, flags = world
    flags = [*flags, "--kl", "0", "--steps", "1", "--max-new-tokens", "40"]
    settings, _ = exprl.parse(flags)
    state = exprl.build_state(settings)
    before = [p.detach().clone() for p in state.policy.model.parameters()]
    metrics, _ = exprl.train_step(state, settings, 1)
    code, = re.findall(r"```python\n(import torch.*?)```", README, re.S)
    loop = [line for line in code[code.index("for step in ") :].split("\n") if line]
    assert len(loop) <= 25, "no longer 20 lines"
    monkeypatch.setattr(sys, "argv", ["lesson.py", *flags])
    lesson = {}
    exec(compile(code, "README.md", "exec"), lesson)
    assert f"score {metrics['score']:.3f}  entropy" in capsys.readouterr().out
    after = zip(state.policy.model.parameters(), lesson["policy"].model.parameters())
    for start, (ours, theirs) in zip(before, after):
        assert (ours - theirs).abs().mean() < 0.01 * settings.lr < (ours - start).abs().mean()


def test_every_formula_is_where_the_map_says():
    places = re.findall(r"`([\w/]+\.py): (\w+)`", README)
    assert len(places) > 10
    for file, name in places:
        names = {node.name for node in ast.walk(ast.parse((tiny.ROOT / file).read_text()))
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name in names, f"{file} has no {name}"


def test_paths_and_flags_of_the_readme_exist():
    for path in re.findall(r"`((?:data|experiments|kernels|tests)/[\w./]*)`", README):
        assert (tiny.ROOT / path).exists(), path
    known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(exprl.Settings)}
    for file in [*CORE, *(tiny.ROOT / "experiments").glob("*.py")]:
        known |= set(re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', file.read_text()))
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known
    others = {"--help", "--logdir", "--model_name_or_path", "--nproc_per_node", "--shutdown-timeout"}
    assert unknown <= others, unknown - others


def test_every_setting_is_used_and_explained():
    code = (tiny.ROOT / "exprl.py").read_text()
    for f in dataclasses.fields(exprl.Settings):
        assert re.search(rf"\b(settings|s)\.{f.name}\b", code), f"dead flag {f.name}"
        assert re.search(rf"^    {f.name}: .+  # \w", code, re.M), f"{f.name} has no help"


def test_every_file_says_what_it_does():
    for file in CORE:
        said = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert len(said) > 40, file


def test_the_glossary_has_the_names_that_a_run_writes(world, tmp_path):
    home, flags = world
    written = set()
    half = (home / "train.jsonl").read_text().replace('"math"', '"science"', 3)
    (home / "mixed.jsonl").write_text(half)
    flags = [*flags, "--data", str(home / "mixed.jsonl"), "--eval-data", str(home / "eval.jsonl"),
             "--eval-n", "2", "--eval-k", "1", "2"]
    for method in exprl.METHODS:
        more = ["--max-new-tokens", "60"] if method == "sft" else []
        exprl.main([*flags, "--steps", "1", "--method", method, "--out", str(tmp_path / method), *more])
        for line in exprl.read_jsonl(tmp_path / method / "metrics.jsonl"):
            written |= {re.sub("pass@.*", "pass@k", name) for name in line}
    table = README[README.index("| metric |"):].split("\n\n")[0]
    explained = {name for cell in re.findall(r"^\| ([\w@, ]+) \|", table, re.M) for name in cell.split(", ")}
    assert explained - {"metric"} == written - {"step"}


# ---- ablations ---------------------------------------------------------------------------------------------

FLAGS = {"reward": ["--method", "brief", "--norm", "mean"], "advantage": ["--norm", "rank"],
         "judge_prompt": ["--readout", "expected"], "domain": ["--readout", "expected"],
         "kernel": [], "dither": ["--dtype", "bfloat16"]}


def test_the_readme_lists_the_ablations_and_shows_the_first():
    assert {file.stem for file in ABLATIONS.glob("*")} == set(FLAGS)
    assert re.findall(r"`(\w+)\.diff`", README) == list(FLAGS)
    assert "```diff\n" + (ABLATIONS / "reward.diff").read_text() + "```" in README


def copy_code(folder, ablation):
    for file in [*CORE, tiny.ROOT / "pyproject.toml", ABLATIONS / f"{ablation}.diff"]:
        copy = folder / file.relative_to(tiny.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    alone = {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}  # in another's tree it would do nothing
    subprocess.run(["git", "apply", f"experiments/ablations/{ablation}.diff"], cwd=folder, check=True,
                   env=os.environ | alone)


def in_copy(folder, *command, **env):
    env = os.environ | tiny.ENVIRONMENT | {"PYTHONPATH": str(folder)} | env
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", FLAGS)
def test_an_ablation_applies_and_trains(name, world, tmp_path):
    home, flags = world
    copy_code(tmp_path, name)
    if name == "domain":
        (home / "history.jsonl").write_text((home / "train.jsonl").read_text().replace('"math"', '"history"'))
        flags = [*flags, "--data", str(home / "history.jsonl")]
    # traces of a random model end late or never: long ones, and a grade for those cut off
    more = ["--steps", "1", "--out", "run", "--max-new-tokens", "300", "--overlong", "judge"]
    trained = in_copy(tmp_path, "exprl.py", *flags, *FLAGS[name], *more)
    assert trained.returncode == 0, trained.stderr[-3000:]
    line, = exprl.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert line["grad_norm"] > 0


TWINS = """
import importlib, torch
head = importlib.import_module("kernels.policy_head")
results = []
for twin in head.torch_row_loss_, head.triton_row_loss_:
    head.torch_row_loss_ = twin  # what a CPU takes
    hidden, weight, ids, *rest = head.random_case(40, 16, 70)
    hidden.requires_grad_(), weight.requires_grad_()
    out = head.policy_head(hidden, weight, ids, *rest, kl=0.1)
    out.loss.backward()
    results.append([x.detach() for x in (*out, hidden.grad, weight.grad)])
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
"""


SAME_PASSES = """
import copy, torch, exprl, tiny
model = tiny.model(tie_word_embeddings=False).requires_grad_(False)
for p in model.parameters():
    p.data = p.data.bfloat16().float()
model.model.layers[0].mlp.up_proj.weight.data[0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
dithered = copy.deepcopy(model)
exprl.dither(dithered, 0)
again = copy.deepcopy(dithered)
exprl.dither(again, 1)  # a resumed run's masters
for (name, a), b, c in zip(model.named_parameters(), dithered.parameters(), again.parameters()):
    assert torch.equal(a.bfloat16(), b.bfloat16()) and torch.equal(b, c)
    assert torch.equal(a, b) != (name.endswith("proj.weight") or name == "lm_head.weight"), name
"""


def test_dithered_masters_round_to_the_same_weights(tmp_path):
    copy_code(tmp_path, "dither")
    done = in_copy(tmp_path, "-c", SAME_PASSES, PYTHONPATH=f"{tmp_path}:{tiny.ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_kernel_of_the_ablation_equals_its_twin(tmp_path):
    """As a fork would see to it before it trusts a GPU with the kernel."""
    pytest.importorskip("triton")
    copy_code(tmp_path, "kernel")
    done = in_copy(tmp_path, "-c", TWINS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
