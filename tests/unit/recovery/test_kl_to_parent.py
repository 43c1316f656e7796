"""The policy that a KL term holds the trained one to: the model that it started from, or the unpruned parent."""

import os
from pathlib import Path

import pytest
import torch
from process_ranks import run_ranks
from transformers import AutoModelForCausalLM

from ptl_rl.config.recipe import parse_config
from ptl_rl.recovery.verl_config import compose, render
from ptl_rl.stage import StageSpec


def settings_of(folder: Path, source: Path, parent: Path, kl_to: str, workers: int = 1):
    sizes = {"prompts_per_step": 4, "rollouts_per_prompt": 2, "kl_loss": 0.01, "kl_to": kl_to}
    config = parse_config(
        {
            "model": {"path": str(parent), "dtype": "float32"},
            "schedule": {"channels_per_cycle": [16], "alignment": 16},
            "recovery": [{"grpo": sizes}],
            "resources": {"workers_per_node": workers},
        }
    )
    names = ("out", "work", "progress", "result", "data")
    spec = StageSpec(
        name="recover", cycle=1, round=0, device="cpu", attention="sdpa", ray_address="", stage_id="x", subset=0,
        subsets=1, remove_channels=16, remove_layers=0, removed_layers=0, steps=3, alignment=16,
        source=source, parent=parent, **{name: folder / name for name in names},
    )  # fmt: skip
    return compose(render(config, spec))


def _reference(rank: int, ranks: int, folder: Path, source: Path, parent: Path) -> None:
    from ptl_rl.recovery.rl.worker import PolicyWorker

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    for kl_to, folder_of_it in (("start", source), ("parent", parent)):
        verl = settings_of(folder, source, parent, kl_to, ranks)
        worker = PolicyWorker(verl.actor_rollout_ref, "ref")
        worker.init_model()
        found = {n: p.full_tensor() for n, p in worker.ref.engine.module.named_parameters()}
        expected = dict(AutoModelForCausalLM.from_pretrained(folder_of_it).named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_on_two_ranks_it_is_the_parent_where_it_is_asked_for(make_checkpoint, tmp_path):
    pytest.importorskip("verl")  # whose plug-in says by the environment which engine is a CPU's
    parent, source = make_checkpoint("qwen2"), make_checkpoint("qwen2", seed=1, intermediate_size=32)
    run_ranks(_reference, 2, tmp_path, source, parent)
