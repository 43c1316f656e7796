"""First light on two cores, the whole script, and the run that most of its lines are of. SIGKILL ends the driver and
the script in the middle of a training, and both are resumed. In `test_light_stages.py` stages fail, and in
`test_loop_killed.py` drivers are killed anywhere, and Ctrl-C ends them, both with stand-ins for the stages.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from real_runs import (
    entries,
    killed_in_the_end,
    processes_of,
    processes_with,
    steps_of,
    wait_for,
    with_command,
)

from ptl_rl.config.recipe import read_saved_config
from ptl_rl.driver.journal import Journal
from ptl_rl.pruning.score.texts import calibration_texts
from ptl_rl.stage import StageSpec

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke is sized for CPUs"),
]
TAG = "PTL_TEST_LIGHT"
SAVED = 8
CPT = {
    "steps": 24,
    "sequences_per_step": 16,
    "max_tokens": 160,
    "save_every_steps": SAVED,
    "learning_rate": 1e-5,
    "parent_kl": 0.5,
}
GRPO = {"steps": 1, "prompts_per_step": 16, "rollouts_per_prompt": 4, "micro_batch_sequences": 32}
GRPO |= {"kl_loss": 0.01, "kl_to": "parent"}
ENTRIES = ["0.evaluate", *(f"1.{stage}" for stage in ("score", "slice", "recover", "recover", "evaluate", "gate"))]


class Light:
    """The script and what it leaves; every start goes on where the one before has ended."""

    def __init__(self, repository: Path, folder: Path, settings: dict) -> None:
        self.folder, self.lines_path = folder, folder / "lines.jsonl"
        self.command = [sys.executable, str(repository / "benchmarks/gpu_first_light.py"), "--device", "cpu", "--smoke"]
        # Far more than it takes: a busy machine is no fault of the script's.
        self.command += ["--minutes", "40", "--out", str(self.lines_path), "--resume", "--data", "testbed:rl"]
        self.command += ["--model", str(repository / "ptl_rl/testbed/checkpoints/llama")]
        self.command += [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        self.environment = {**os.environ, TAG: str(folder)}

    def started(self, log: str):
        return killed_in_the_end(self.command, (self.folder / log).open("w"), env=self.environment)

    def lines(self) -> dict[str, dict]:
        """The latest of each stage."""
        return {line["stage"]: line for line in map(json.loads, self.lines_path.read_text().splitlines())}

    @property
    def run_dir(self) -> Path:
        return next((self.folder / "work/smoke").glob("run-*"), self.folder / "none yet")

    def processes(self) -> list[psutil.Process]:
        return processes_with(TAG, {str(self.folder)})

    def driver(self, command: str) -> psutil.Process:
        return with_command(self.processes(), "-m", "ptl_rl.cli", command)

    def killed(self, stage: str, step: int) -> None:
        """SIGKILL for driver and script once a stage's training has made so many steps; it is left at work."""
        with self.started("first.log") as script:
            wait_for(lambda: max(steps_of(self.run_dir, stage), default=0) >= step, script)
            driver = self.driver("run")
            script.kill()
            driver.kill()
            driver.wait()
        assert processes_of(self.run_dir) != []
        assert entries(self.run_dir) == ENTRIES[:3]

    def finish(self) -> str:
        done = subprocess.run(self.command, capture_output=True, text=True, env=self.environment, timeout=1600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def light(repository, tmp_path, raising_reward):
    settings = {
        "schedule.channels_per_cycle": [],  # a block; the submitted job removes channels
        "schedule.layers_total": 1,
        "calibration.source": "both",
        "reward.path": str(raising_reward),
        "reward.name": "my_score",
        "gate.min_accuracy_ratio": 0.01,
        "recovery": [{"cpt": CPT}, {"grpo": GRPO}],
    }
    light = Light(repository, tmp_path, settings)
    yield light
    for process in light.processes():  # of a test that failed
        process.kill()


@pytest.mark.timeout(2400)
def test_killed_and_resumed_every_stage_is_seen_in_its_line(light, tmp_path):
    light.killed("001-recover", SAVED + 2)
    run_dir = light.run_dir
    assert set(light.lines()) == {"imports", "vllm"}
    said = light.finish()
    assert "imports: ok in an earlier run" in said and "leaked" not in said
    assert light.processes() == []
    check_lines(light.lines(), tmp_path)
    check_run(run_dir)


def check_lines(lines: dict[str, dict], folder: Path) -> None:
    expected = {"imports": True, "vllm": True, "grpo": True, "cpt": True, "real": True, "distill": None}
    assert {name: line["ok"] for name, line in lines.items()} == expected
    packages = lines["imports"]["report"]["packages"]
    assert all("value" in packages[name] for name in ("torch", "ray", "verl", "vllm"))
    check_speeds(lines["vllm"], json.loads((folder / "work/vllm/speed.json").read_text()))
    assert "of what is promised" in (folder / "first.log").read_text()
    (grpo,), (cpt,) = lines["grpo"]["recoveries"], lines["cpt"]["recoveries"]
    assert 0.1 < grpo["reward"][0] <= 0.25 and grpo["tokens_per_second"] > 0 and grpo["generation_seconds"] > 0
    assert grpo["rollout_probs_diff_max"] < 1e-4  # the weights that vLLM was sent are the policy's
    assert cpt["steps"] == CPT["steps"] and cpt["loss"][1] > 0 and cpt["parent_kl"][0] > 0
    real = lines["real"]
    assert real["recoveries"] == [cpt, grpo]  # one run, which three of the lines are of
    assert real["parameters"] == [3_418_560, 2_865_216]  # five of six blocks
    assert real["accuracy"][0] > 0.7 and max(real["logit_difference"]) < 1e-4
    assert set(real["worker_memory_peak_gib"]) == {"1.score", "1.slice"}
    assert lines["vllm"]["memory_peak_gib"] > 0


def check_speeds(line: dict, figures: list[dict]) -> None:
    """``ptl speed`` of two models, the second of them sliced by ``ptl slice``, timed in turns."""
    first, second = figures
    assert first["promised"] == 1.0 and first["speedup"]["saturated"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["promised"] > 1.1 and set(second["tokens_per_second"]) == {"batch 1", "saturated"}
    assert all(spread["low"] > 0 for model in figures for spread in model["tokens_per_second"].values())
    assert line["parameters"] == [2_018_496, 1_723_584] and line["logits"].startswith("logits differ")


def check_run(run_dir: Path) -> None:
    assert entries(run_dir) == ENTRIES  # each once: no finished stage ran again
    assert processes_of(run_dir) == []
    assert not [path for path in run_dir.glob("cycles/*/.*") if path.name.endswith((".tmp", ".work"))]
    assert (run_dir / "summary.png").stat().st_size > 10_000
    _, scored, sliced, cpt, grpo, *_ = (entry.metrics for entry in Journal(run_dir / "journal.jsonl").entries())
    assert 0 < grpo["reward_last"] <= 0.25
    assert "planted" in (run_dir / "logs/reward_errors.jsonl").read_text()
    # At its first step GRPO is the cut model, which is not the parent that the KL term is to.
    assert grpo["curve"][-1]["kl"] > 1e-4
    # Continued pre-training went on from its own checkpoint, and its steps are counted once.
    assert steps_of(run_dir, "001-recover")[0] == SAVED + 1
    assert [row["step"] for row in cpt["curve"]] == list(range(1, CPT["steps"] + 1))
    assert (sliced["num_hidden_layers"], sliced["intermediate_size"]) == (5, 768)
    assert 0 < sliced["stream_error"] < 1
    # A cycle that starts from this model is scored on what the policy answered, too.
    assert scored["calibration_rollouts"] == 0
    config = read_saved_config(run_dir / "config.json")
    texts = calibration_texts(config, StageSpec.model_construct(source=run_dir / "best"), [])
    assert texts.rollouts == len(texts.weights) > 0 and max(texts.weights) <= 0.25
