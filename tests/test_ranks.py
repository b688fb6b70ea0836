"""Several processes (gloo, on a CPU): the weights of one, another number of them, failures that end all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import exprl

VARIANTS = {
    "outcome": ["--updates", "2", "--checkpoint-activations", "--eval-data", "EVAL", "--eval-every", "1",
                "--eval-n", "3", "--eval-k", "1", "3"],
    "process": ["--method", "process", "--entropy-bonus", "0.01"],
    "grpo": ["--method", "grpo", "--kl", "0"],  # exact match is rare: whole processes may have no gradient
    "sft": ["--method", "sft", "--overlong", "zero", "--max-new-tokens", "60"],
    "distill": ["--method", "distill", "--overlong", "zero", "--distill-kl", "full", "--kl", "0"],
    "bfloat16": ["--dtype", "bfloat16"],
}

# Several runs in each process: starting one costs seconds. A fault is (rank, what happens there).
WORKER = """
import json, sys, time
sys.path.insert(0, "tests")
import tiny, exprl
exprl.join()
exprl.join = lambda: None  # once for all runs
exprl.fast_dtype = tiny.as_asked
states, build = [], exprl.build_state  # kept: taking a run's process groups apart was seen to abort
exprl.build_state = lambda *args: states.append(build(*args)) or states[-1]
for flags, fault in json.loads(sys.argv[1]):
    whole = exprl.grade_whole
    if fault == "unread":
        def grade_whole(*args):
            given = whole(*args)
            return {i: exprl.Verdict((float("nan"),), "?") for i in given} if exprl.rank() == 1 else given
        exprl.grade_whole = grade_whole
    if fault == "error":
        def grade_whole(*args):
            if exprl.rank() == 1:
                raise KeyError("a bug in one process")
            return whole(*args)
        exprl.grade_whole = grade_whole
    if fault == "late":
        def optimizer_step(*args):
            if exprl.rank() == 1:
                raise RuntimeError("CUDA error: out of memory")
            exprl.gather(None)  # as the others wait in an update's collectives
        exprl.optimizer_step = optimizer_step
    if fault == "slow" and exprl.rank() == 1:
        save = exprl.save_file
        def save_file(tensors, path, *more):  # as safetensors does it: under another name first
            path.with_name(".tmpX").touch()
            time.sleep(1)
            path.with_name(".tmpX").unlink()
            save(tensors, path, *more)
        exprl.save_file = save_file
    if fault == "pipe" and exprl.rank() == 0:
        def report(*args):
            raise BrokenPipeError(32, "Broken pipe")
        exprl.report = report
    exprl.main(flags)
    exprl.grade_whole = whole
exprl.leave()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home, flags = tiny.training_world(tmp_path_factory.mktemp("ranks"))
    return home, [*flags, "--questions", "8", "--overlong", "judge", "--steps", "2", "--lr", "1e-4",
                  "--save-every", "1", "--keep", "9"]


def torchrun(count: int, *command) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "--standalone",
            *map(str, command)]


def launch(count: int, *command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(torchrun(count, *command), cwd=tiny.ROOT, env=os.environ | tiny.ENVIRONMENT,
                          text=True, capture_output=True, timeout=240, **options)


def worker(home: Path, count: int, *runs) -> subprocess.CompletedProcess:
    script = home / "code" / "worker.py"  # not beside home/judge, which would be imported
    script.parent.mkdir(exist_ok=True)
    script.write_text(WORKER)
    runs = [run if isinstance(run, tuple) else (run, "") for run in runs]
    return launch(count, script, json.dumps([(list(map(str, flags)), fault) for flags, fault in runs]))


def weights(folder: Path, stem: str = "model") -> dict:
    parts = [load_file(path) for path in folder.glob(f"{stem}*.safetensors")]
    return {key: value for part in parts for key, value in part.items()}


def gradients(folder: Path) -> torch.Tensor:
    """What the optimizer keeps of them: after one step, a tenth."""
    moments = weights(folder, "optimizer")
    return torch.cat([moments[key].flatten() for key in sorted(moments) if key.endswith(":exp_avg")])


def far(a: dict, b: dict) -> float:
    assert a.keys() == b.keys() and len(a) > 20
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


def metrics(run: Path) -> list[dict]:
    return exprl.read_jsonl(run / "metrics.jsonl")


def alone(flags) -> None:
    threads, fast_dtype = torch.get_num_threads(), exprl.fast_dtype
    torch.set_num_threads(1)
    exprl.fast_dtype = tiny.as_asked
    try:
        exprl.main([str(flag) for flag in flags])
    finally:
        torch.set_num_threads(threads)
        exprl.fast_dtype = fast_dtype


@pytest.fixture(scope="module")
def runs(world):
    """Each variant by two processes, and by one: folders home/NAME-2 and home/NAME-1."""
    home, flags = world
    jobs = {name: [*flags, *(home / "eval.jsonl" if flag == "EVAL" else flag for flag in more)]
            for name, more in VARIANTS.items()}
    done = worker(home, 2, *([*job, "--out", home / f"{name}-2"] for name, job in jobs.items()))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, job in jobs.items():
        alone([*job, "--out", home / f"{name}-1"])
    return home


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_end_with_the_weights_of_one(runs, name):
    one, two = runs / f"{name}-1", runs / f"{name}-2"
    ours, theirs = (exprl.read_jsonl(run / "rollouts.jsonl")[:32] for run in (one, two))
    assert [(r["problem"], r["text"]) for r in ours] == [(r["problem"], r["text"]) for r in theirs]
    if name == "bfloat16":  # autocast over float32 masters here, masters gathered in bfloat16 there
        ours, theirs = (gradients(run / "checkpoints" / "step_1") for run in (one, two))
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98
        return
    for folder in ("checkpoints/step_1", "checkpoints/step_2", "model"):
        assert far(weights(one / folder), weights(two / folder)) <= 1e-6, folder
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in a.keys() - {"seconds", "peak_gb", "tokens_per_second"}:
            if not key.endswith("tok_s"):
                assert b[key] == pytest.approx(a[key], abs=1e-5), key


def test_transformers_loads_a_checkpoint_in_parts(runs):
    folder = runs / "outcome-2" / "checkpoints" / "step_2"
    assert len(list(folder.glob("model-*"))) == len(list(folder.glob("optimizer-*"))) == 2
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    saved = weights(folder)
    assert all(torch.equal(value, saved[name]) for name, value in loaded.named_parameters())


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_processes_goes_on(world, runs, first, then):
    home, flags = world
    run = home / f"moved-{first}-{then}"
    subprocess.run(["cp", "-r", home / f"outcome-{first}", run], check=True)
    more = ["--resume", run, "--steps", "4"]
    if then == 1:
        alone(more)
    else:
        done = worker(home, then, more)
        assert done.returncode == 0, done.stderr[-3000:]
    straight = home / "outcome-straight"
    if not straight.exists():
        more = [home / "eval.jsonl" if f == "EVAL" else f for f in VARIANTS["outcome"]]
        alone([*flags, *more, "--steps", "4", "--out", straight])
    assert far(weights(run / "model"), weights(straight / "model")) < 2e-6
    assert [m["step"] for m in metrics(run) if "accuracy" in m] == [1, 2, 3, 4]


def test_devices_of_a_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    own_device = partial(exprl.own_device, "--judge-device")
    assert [own_device(d) for d in ("+4", "cpu", "cuda:1")] == ["cuda:6", "cpu", "cuda:1"]
    for absent in ("+5", "cuda:7", "gpu"):
        with pytest.raises(SystemExit, match=re.escape(f"--judge-device {absent}: torch sees 7")):
            own_device(absent)
    monkeypatch.setattr(exprl, "ranks", lambda: 8)
    assert own_device("cuda") == "cuda:2"
    assert any(wrong and "needs a number" in said for wrong, said in exprl.complaints(
        exprl.Settings(judge_device="+x")))


def test_no_hang_when_all_traces_of_a_process_are_unread(world):
    home, flags = world
    out = home / "unread"
    done = worker(home, 2, ([*flags, "--kl", "0.0", "--max-unread", "1", "--out", out], "unread"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [m["unread"] for m in metrics(out)] == [0.5, 0.5] and all(m["grad_norm"] > 0 for m in metrics(out))


def test_too_many_unread_traces_stop_all(world):
    home, flags = world
    out = home / "stopped"
    done = worker(home, 2, ([*flags, "--max-unread", "0.3", "--out", out], "unread"))
    said = "50% of the traces that the judge got have a grade that could not be read"
    assert done.returncode == 1 and done.stderr.count(said) == 1
    assert len(exprl.read_jsonl(out / "rollouts.jsonl")) == 32  # what was judged is not lost


def test_an_error_in_one_process_ends_all_with_one_message(world):
    home, flags = world
    out = home / "failing"
    done = worker(home, 2, [*flags, "--out", out], (["--resume", out, "--steps", "3"], "error"))
    assert done.returncode == 1
    assert done.stderr.count("process 1 failed while judging") == 1 and "a bug in one process" in done.stderr
    assert f"--resume {out}" in done.stderr
    assert [p.name for p in exprl.complete_checkpoints(out)] == ["step_1", "step_2"]


def test_an_error_while_others_wait_in_an_update_is_said(world):
    home, flags = world
    out = home / "late"
    done = worker(home, 2, ([*flags, "--out", out], "late"))
    assert done.returncode == 1 and "out of memory while training: lower --microbatch-tokens" in done.stderr
    assert f"--resume {out}" in done.stderr


def test_a_checkpoint_is_whole_where_a_process_writes_late_and_a_lost_terminal_costs_no_step(world):
    home, flags = world
    out = home / "slow"
    done = worker(home, 2, ([*flags, "--out", out], "slow"),
                  (["--resume", out, "--steps", "4", "--save-every", "0"], "pipe"))
    assert done.returncode == 1 and "reading or writing failed while logging" in done.stderr
    saved = exprl.complete_checkpoints(out)
    assert [p.name for p in saved] == ["step_1", "step_2", "step_3"] and all(map(exprl.intact, saved))
    assert [m["step"] for m in metrics(out)] == [1, 2, 3]


def test_bad_input_is_said_once(world):
    home, flags = world
    (home / "bad.jsonl").write_text('{"question": ""}\n')
    done = launch(2, "exprl.py", *flags, "--data", home / "bad.jsonl", "--out", home / "none")
    assert done.returncode == 1 and done.stderr.count("1 of 1 rows are bad") == 1
    assert not (home / "none").exists()
    done = launch(2, "exprl.py", *flags, "--questions", "3", "--updates", "2")
    assert done.returncode != 0 and done.stderr.count("--questions must be at least") == 1


def children(pid: int) -> list[int]:
    """Processes started by `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(") ", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return sorted(found)


@contextmanager
def running(world, out, steps: int):
    """Two processes that have logged two steps, and their torchrun; nothing goes on after a failure."""
    home, flags = world
    process = subprocess.Popen(torchrun(2, "exprl.py", *flags, "--steps", steps, "--out", out), cwd=tiny.ROOT,
                               env=os.environ | tiny.ENVIRONMENT, text=True, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while len(metrics(out)) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert len(metrics(out)) >= 2
        yield process
    finally:
        for pid in (*children(process.pid), process.pid) if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on(world, which):
    out = world[0] / f"killed-{which}"
    with running(world, out, 1000) as process:
        os.kill(children(process.pid)[which], signal.SIGKILL)
        _, said = process.communicate(timeout=240)
        assert process.returncode != 0 and children(process.pid) == []
    if which == 1:
        assert f"--resume {out}" in said
    kept = exprl.complete_checkpoints(out)
    assert kept
    step = int(kept[-1].name[5:])
    done = launch(2, "exprl.py", "--resume", out, "--steps", step + 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [m["step"] for m in metrics(out)] == list(range(1, step + 2))


def test_sigterm_saves_together(world):
    out = world[0] / "terminated"
    with running(world, out, 1000) as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=240)
    assert "stopped by SIGTERM" in said and process.returncode != 0
    last = metrics(out)[-1]["step"]
    assert exprl.complete_checkpoints(out)[-1].name == f"step_{last}"
    assert len(list((out / "checkpoints" / f"step_{last}").glob("optimizer-*"))) == 2
