"""What goes wrong around a run: a full disk, a place that cannot be written, data gone, torn files."""

import resource
import shutil
import types

import pytest
import tiny
from safetensors.torch import load_file

import exprl


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    home, flags = tiny.training_world(tmp_path_factory.mktemp("world"))
    run = home / "whole"
    tiny.run("exprl.py", *flags, "--overlong", "judge", "--steps", 4, "--save-every", 2, "--out", run)
    return home, run


def copy(world, to, *lost):
    run = shutil.copytree(world[1], to / "run")
    for name in lost:
        shutil.rmtree(run / name)
    return run


def resume(run):
    settings, _ = exprl.parse(["--resume", str(run)])
    return exprl.resume_run(run, settings)


def same_weights(a, b) -> bool:
    one, two = (load_file(run / "checkpoints/step_4/model.safetensors") for run in (a, b))
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_ends_the_run_with_a_message_and_loses_nothing(world, tmp_path, what):
    """RLIMIT_FSIZE stands for the disk: a write beyond it fails like one on a full disk."""
    run = copy(world, tmp_path, "checkpoints/step_4", "model")
    records = (run / "rollouts.jsonl").read_text().splitlines(keepends=True)
    kept = sum(len(line.encode()) for line in records[: len(records) // 2])
    weights = run / "checkpoints/step_2/model.safetensors"
    room = 100 + (kept if what == "log" else weights.stat().st_size)
    done = tiny.run("exprl.py", "--resume", run, check=False,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert done.returncode and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "make room on the disk" in done.stderr and f"--resume {run}" in done.stderr
    assert [p.name for p in exprl.complete_checkpoints(run)] == ["step_2"]
    tiny.run("exprl.py", "--resume", run)
    assert same_weights(run, world[1]) and not list((run / "checkpoints").glob("*.tmp"))
    steps = [m["step"] for m in exprl.read_jsonl(run / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]


def test_a_place_that_cannot_be_written_is_refused_before_any_model_is_loaded(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    settings, _ = exprl.parse(["--model", "no-such/model", "--out", str(tmp_path / "file" / "run")])
    with pytest.raises(SystemExit, match="cannot be written.*another --out"):
        exprl.start_run(settings)


def test_a_read_only_folder_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(exprl.os, "access", lambda path, mode: False)  # root may write anywhere
    settings, _ = exprl.parse(["--model", "no-such/model", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="cannot be written"):
        exprl.start_run(settings)


def test_vanished_data_is_named_and_blamed_on_no_checkpoint(world, tmp_path, capsys):
    home, run = world
    moved = (home / "train.jsonl").rename(tmp_path / "elsewhere.jsonl")
    try:
        with pytest.raises(SystemExit, match="train.jsonl"):
            resume(run)
        assert "cannot use" not in capsys.readouterr().err
    finally:
        moved.rename(home / "train.jsonl")
    assert resume(run).step == 4


@pytest.mark.parametrize("damage", ["weights cut", "moments cut", "weights gone", "state empty",
                                    "tokenizer gone", "weights flipped", "moments flipped", "sums gone"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(world, tmp_path, capsys, damage):
    run = copy(world, tmp_path)
    newest = run / "checkpoints/step_4"
    name = {"weights": "model.safetensors", "moments": "optimizer.safetensors", "state": "trainer.json",
            "tokenizer": "tokenizer.json", "sums": "sha256.json"}[damage.split()[0]]
    content = bytearray((newest / name).read_bytes())
    if damage.endswith("gone"):
        (newest / name).unlink()
    elif damage.endswith("flipped"):
        content[-9] ^= 1
        (newest / name).write_bytes(content)
    else:
        (newest / name).write_bytes(content[: len(content) // 2 * ("cut" in damage)])
    assert resume(run).step == 2 and "cannot use" in capsys.readouterr().err


def test_a_tokenizer_with_a_folder_of_templates_is_saved_and_watched(world, tmp_path, capsys):
    policy = shutil.copytree(world[0] / "policy", tmp_path / "policy")
    (policy / "additional_chat_templates").mkdir()
    (policy / "additional_chat_templates" / "tools.jinja").write_text(tiny.TEMPLATE)
    run = tmp_path / "run"
    tiny.inside("--model", policy, "--data", world[0] / "train.jsonl", "--method", "sft", "--steps", 1,
                "--questions", 2, "--out", run, "--device", "cpu")
    saved = run / "checkpoints/step_1"
    assert exprl.intact(saved)
    (saved / "additional_chat_templates" / "tools.jinja").write_text("")
    assert not exprl.intact(saved) and "tools.jinja" in capsys.readouterr().err


def test_two_programs_do_not_write_one_run(world, tmp_path, monkeypatch):
    run = copy(world, tmp_path)
    held = exprl.lock(run)
    done = tiny.inside("--resume", run, check=False)
    assert done.returncode and f"{run} is being trained by another program" in done.stderr
    assert "another --out" in done.stderr
    held.close()
    assert resume(run).step == 4

    settings, _ = exprl.parse(["--out", str(tmp_path / "new"), "--method", "grpo"])
    new, others = tmp_path / "new", []
    new.mkdir()
    for begins, said in ((lambda: others.append(exprl.lock(new)), "is being trained by another program"),
                         ((new / "config.json").touch, "not empty")):
        monkeypatch.setattr(exprl, "build_state", lambda _: begins() or types.SimpleNamespace())
        with pytest.raises(SystemExit, match=said):
            exprl.start_run(settings)


def test_runs_started_in_the_same_second_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exprl.time, "strftime", lambda _: "1128-120000")
    monkeypatch.setattr(exprl, "build_state", lambda _: types.SimpleNamespace())
    settings, _ = exprl.parse(["--method", "grpo"])
    names = []
    for pid in (41, 42):
        monkeypatch.setattr(exprl.os, "getpid", lambda: pid)
        names.append(exprl.start_run(settings)[0].name)
    assert names == ["policy-grpo-1128-120000-41", "policy-grpo-1128-120000-42"]


def test_a_line_torn_within_a_letter_is_left_out(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes('{"step": 1, "text": "ü\u2028"}\n{"step": 2, "text": "ü'.encode()[:-1])
    assert exprl.read_jsonl(path) == [{"step": 1, "text": "ü\u2028"}]
