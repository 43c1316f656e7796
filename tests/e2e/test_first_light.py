"""First light on two cores: the whole script. `test_light_stages.py` has stages that fail, and what is resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from ptl_rl.driver.journal import Journal

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke is sized for CPUs"),
]
CRITERION = """
def mine(statistics):
    return statistics.abs_sum_LC
"""


def first_light(repository: Path, folder: Path) -> subprocess.CompletedProcess:
    settings = {"criterion.path": str(folder / "mine.py"), "criterion.channels": "mine"}
    command = [sys.executable, repository / "benchmarks/gpu_first_light.py", "--device", "cpu", "--smoke"]
    command += ["--minutes", "25"]  # far more than it takes: a busy machine is no fault of the script's
    command += ["--model", repository / "ptl_rl/testbed/checkpoints/llama", "--data", "testbed:rl"]
    command += ["--out", folder / "lines.jsonl", *(f"--set={key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "PTL_TEST_LIGHT": str(folder)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=1600)


def left_processes(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PTL_TEST_LIGHT") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:120])
        except psutil.Error:
            continue
    return found


@pytest.mark.timeout(2000)
def test_every_stage_is_run_and_seen_in_its_line(repository, tmp_path):
    (tmp_path / "mine.py").write_text(CRITERION)
    done = first_light(repository, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["stage"]: line for line in map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())}
    expected = {"imports": True, "vllm": True, "grpo": True, "cpt": True, "real": True, "distill": None}
    assert {name: line["ok"] for name, line in lines.items()} == expected
    (run_dir,) = (tmp_path / "work/smoke").iterdir()
    entries = [f"{entry.cycle}.{entry.stage}" for entry in Journal(run_dir / "journal.jsonl").entries()]
    assert entries == ["0.evaluate", *(f"1.{stage}" for stage in STAGES)]  # one run, which three of the lines are of
    assert left_processes(tmp_path) == []

    packages = lines["imports"]["report"]["packages"]
    assert all("value" in packages[name] for name in ("torch", "ray", "verl", "vllm"))
    check_speeds(lines["vllm"], json.loads((tmp_path / "work/vllm/speed.json").read_text()))
    assert "of what is promised" in done.stdout and "leaked" not in done.stdout
    (grpo,), (cpt,) = lines["grpo"]["recoveries"], lines["cpt"]["recoveries"]
    assert grpo["reward"][0] > 0.1 and grpo["tokens_per_second"] > 0 and grpo["generation_seconds"] > 0
    assert grpo["rollout_probs_diff_max"] < 1e-4  # the weights that vLLM was sent are the policy's
    assert cpt["steps"] == 2 and cpt["loss"][1] > 0 and cpt["parent_kl"][0] > 0
    real = lines["real"]
    assert real["recoveries"] == [grpo, cpt]
    assert real["parameters"] == [3_418_560, 3_086_784]  # 672 of 768 channels
    assert real["accuracy"][0] > 0.7 and max(real["logit_difference"]) < 1e-4
    assert set(real["worker_memory_peak_gib"]) == {"1.score", "1.slice"}
    assert lines["vllm"]["memory_peak_gib"] > 0


STAGES = ("score", "slice", "recover", "recover", "evaluate", "gate")


def check_speeds(line: dict, figures: list[dict]) -> None:
    """``ptl speed`` of two models, the second of them sliced by ``ptl slice``, timed in turns."""
    first, second = figures
    assert first["promised"] == 1.0 and first["speedup"]["saturated"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["promised"] > 1.1 and set(second["tokens_per_second"]) == {"batch 1", "saturated"}
    assert all(spread["low"] > 0 for model in figures for spread in model["tokens_per_second"].values())
    assert line["parameters"] == [2_018_496, 1_723_584] and line["logits"].startswith("logits differ")
