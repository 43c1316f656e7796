"""One GRPO training on the real stack with two cuts in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_runs import entries, processes_of
from safetensors.torch import load_file
from test_demo_run import check_that_trained_weights_reach_vllm

from ptl_rl.driver.journal import Journal
from ptl_rl.pruning.plan import PruningPlan

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(torch.cuda.is_available(), reason="these runs are sized for CPUs"),
]
SETTINGS = {
    "data.train.rows": 96,
    "data.validation.rows": 8,
    "data.test.rows": 40,
    "calibration.sequences": 32,
    "calibration.source": "rollouts",
    "recovery": [
        {
            "grpo": {
                "steps": [1, 1],
                "prompts_per_step": 8,
                "rollouts_per_prompt": 4,
                "micro_batch_sequences": 32,
                "gradient_checkpointing": False,
                "kl_loss": 0.0,
                "validate_before": False,
                # So that verl computes the policy's own log-probabilities, to be held against vLLM's.
                "verl": {"algorithm.rollout_correction.bypass_mode": False},
            }
        }
    ],
    "watchdog.startup_seconds": 900,
}


@pytest.mark.timeout(1500)
def test_a_training_with_two_cuts(repository, tmp_path):
    run_dir = tmp_path / "run"
    options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    recipe = str(repository / "recipes/demo_in_place_cpu.yaml")
    command = [sys.executable, "-m", "ptl_rl.cli", "run", recipe, "--run-dir", str(run_dir), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert processes_of(run_dir) == []

    assert entries(run_dir) == ["0.evaluate", "1.cut", "1.cut", "1.recover", "1.evaluate", "1.gate"]
    journal = Journal(run_dir / "journal.jsonl").entries()
    cuts = [entry.metrics for entry in journal if entry.stage == "cut"]
    assert [(cut["after_step"], cut["intermediate_size"]) for cut in cuts] == [(0, 384), (1, 256)]
    assert [cut["calibration_rollouts"] > 0 for cut in cuts] == [False, True]  # there are none before the first step
    assert all(0 < cut["output_error"] < cut["output_error_plain"] < 0.5 for cut in cuts)

    recover = next(entry.metrics for entry in journal if entry.stage == "recover")
    assert [(row["step"], row["intermediate_size"]) for row in recover["curve"]] == [(1, 384), (2, 256)]
    assert recover["cuts"] == [{"after_step": cut["after_step"], **cut} for cut in cuts] and recover["notes"] == []
    assert recover["logit_difference"] < 1e-4  # of the sliced model, from the policy with its zeros
    check_that_trained_weights_reach_vllm(run_dir / "cycles/001/recovered/verl_metrics.jsonl", steps=2)
    check_plans(run_dir)
    evaluated = [entry.metrics for entry in journal if entry.stage == "evaluate"]
    assert [metrics["intermediate_size"] for metrics in evaluated] == [640, 256] and evaluated[1]["accuracy"] > 0.3
    assert list(run_dir.glob("cycles/*/.*")) == []


def check_plans(run_dir: Path) -> None:
    """The cuts' plans, one on the other, are what the finished model was sliced by."""
    first, second = (PruningPlan.load(run_dir / f"cycles/001/cuts/{number}/plan.json") for number in ("001", "002"))
    whole = PruningPlan.load(run_dir / "cycles/001/recovered/plan.json")
    for block, kept in enumerate(whole.keep_channels):
        assert kept == [first.keep_channels[block][channel] for channel in second.keep_channels[block]]
    weights = load_file(run_dir / "cycles/001/recovered/model.safetensors")
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (192, 256)
