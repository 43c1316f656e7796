"""Continued pre-training with cuts in it on the real stack: the stage alone. Training goes on with the sliced
model, which is a resume; kills are in `test_cpt_cuts.py`, with verl's own loop.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptl_rl.config.recipe import load_config
from ptl_rl.cpu.checks import cpu_env_vars
from ptl_rl.data.frozen import freeze
from ptl_rl.driver.ray_session import RaySession
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.stage import StageSpec

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(torch.cuda.is_available(), reason="these runs are sized for CPUs"),
]
CPT = {
    "steps": [1, 4],
    "sequences_per_step": 8,
    "max_tokens": 96,
    "micro_batch_tokens": 384,
    "learning_rate": 1e-3,
    "learning_rate_schedule": "cosine_after_cuts",
    "gradient_checkpointing": False,
    "parent_kl": 0.5,
    "save_every_steps": 1,  # the second cut comes after the step at which verl wants to save, too
}


def started(spec: StageSpec) -> subprocess.Popen:
    stage = {"PTL_RUN_ID": "run", "PTL_STAGE_ID": spec.stage_id, "RAY_ADDRESS": spec.ray_address}
    with (spec.work.parent / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ptl_rl.driver.stage_main", str(spec.file)],
            env={**os.environ, **stage, **cpu_env_vars(1)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.timeout(900)
def test_cut_twice_and_gone_on_sliced_it_ends_as_planned(repository, tmp_path):
    config = load_config(
        repository / "recipes/demo_cpt_llama_cpu.yaml",
        [
            "schedule.mode=in_place",
            "schedule.rematerialise=after_every_cut",
            "schedule.order=together",
            "data.train.rows=128",
            "calibration.sequences=16",
            f"recovery=[{{cpt: {CPT}}}]",
        ],
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    data, model = freeze(config, 1, tmp_path / "data"), repository / "ptl_rl/testbed/checkpoints/llama"
    cycle, logs = tmp_path / "cycles/001", tmp_path / "logs"
    for folder in (cycle / "out", logs):
        folder.mkdir(parents=True)
    with RaySession(config, "cpu") as session:
        spec = StageSpec(
            name="recover", cycle=1, round=0, device="cpu", attention="sdpa", ray_address=session.address,
            stage_id="cpt-in-place", source=model, parent=model, out=cycle / "out", work=cycle / "work",
            progress=logs / "1.progress.jsonl", result=logs / "result.json", data=data.folder, subset=0, subsets=1,
            remove_channels=320, remove_layers=1, removed_layers=0, steps=5, alignment=16,
        )  # fmt: skip
        spec.file.write_text(spec.model_dump_json())
        stage_process = started(spec)
        try:
            assert stage_process.wait(600) == 0, (cycle / "log").read_text()[-3000:]
        finally:
            stage_process.kill()
    check(spec)


def check(spec: StageSpec) -> None:
    found = json.loads(spec.result.read_text())
    assert [cut["after_step"] for cut in found["cuts"]] == [0, 1]
    left = [(cut["num_hidden_layers"], cut["intermediate_size"]) for cut in found["cuts"]]
    assert left == [(5, 576), (5, 448)]
    assert [row["step"] for row in found["curve"]] == list(range(1, 6))
    rates = [row["learning_rate"] for row in found["curve"]]
    # One schedule over all of it, although it was started anew; verl logs the rate of the step that follows.
    assert rates == pytest.approx([1e-3, 8.536e-4, 5e-4, 1.464e-4, 0.0], abs=1e-7)
    sliced_after = [int(note.split(" ")[2]) for note in found["notes"][1:]]
    assert sliced_after == [1]
    assert found["logit_difference"] < 1e-4
    model = AutoModelForCausalLM.from_pretrained(spec.out)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (5, 448)
    plan = PruningPlan.load(spec.out / "plan.json")
    first, second = (PruningPlan.load(spec.cuts / f"{number}/plan.json") for number in ("001", "002"))
    assert plan.keep_layers == first.keep_layers and len(second.keep_channels) == 5 and plan.source == str(spec.source)
    for place, layer in enumerate(plan.keep_layers):
        kept = [first.keep_channels[layer][channel] for channel in second.keep_channels[place]]
        assert plan.keep_channels[layer] == kept
