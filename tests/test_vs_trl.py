"""The comparison with TRL runs, at a tiny size; its TRL half where trl is installed."""

import csv
import importlib.util

import pytest
import tiny


@pytest.mark.parametrize("way", ["exprl", "trl"])
def test_each_way_does_the_same_job(tmp_path, way):
    if way == "trl" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    home, _ = tiny.training_world(tmp_path)
    done = tiny.run("experiments/vs_trl.py", "--model", home / "policy", "--data", home / "train.jsonl",
                    "--ways", way, "--rounds", 1, "--steps", 2, "--questions", 2, "--group", 4, "--tokens", 8,
                    "--microbatch", 4, "--device", "cpu", "--out", tmp_path / "table.csv")
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(line["way"], line["step"]) for line in lines] == [(way, "1"), (way, "2")]
    assert all(0 < float(line["tokens"]) <= 2 * 4 * 8 and float(line["cpu"]) > 0 for line in lines)
    assert "peak GB" in done.stdout
