"""A study on the real stack: SliceGPT's model is made, recovered through verl's SFT trainer, and evaluated in vLLM."""

import json
import subprocess
import sys

import pytest
import torch

from ptl_rl.studies.command import demo_recipes

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(torch.cuda.is_available(), reason="these runs are sized for CPUs"),
]


def test_a_row_is_made_and_reported(tmp_path):
    settings = ["recovery.0.cpt.steps=4", "data.train.rows=256", "data.test.rows=40", "calibration.sequences=16"]
    command = [sys.executable, "-m", "ptl_rl.cli", "study", "table1", str(demo_recipes("table1")[1])]
    command += ["--only", "slicegpt", "--seeds", "1", "--out", str(tmp_path / "study")]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + (tmp_path / "study/logs/slicegpt-seed0.log").read_text()[-3000:]
    found = json.loads((tmp_path / "study/results.json").read_text())
    (row,) = found["rows"]
    assert row["steps"] == 12 and row["name"] == "slicegpt"
    assert 1_800_000 < row["parameters"] < 1_950_000
    assert row["mean"] == pytest.approx(row["accuracies"][0])
    assert "SliceGPT (96 of 192 units)" in done.stdout
    entries = [json.loads(line) for line in (tmp_path / "study/runs/slicegpt-seed0/journal.jsonl").open()]
    assert [entry["stage"] for entry in entries] == ["evaluate", "recover", "evaluate", "gate"]
