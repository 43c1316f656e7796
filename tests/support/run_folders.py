"""A finished run's folder as the driver leaves it, made without a driver: journal, plans, samples, manifest."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from ptl_rl.config import RunConfig
from ptl_rl.config.recipe import parse_config, save_config
from ptl_rl.driver.journal import Entry, Journal

WIDTH, BLOCKS = 8, 3
ORIGINAL_RIGHT = 9
"""Of ten problems, the original solves the first so many."""


def make_run(
    folder: Path,
    *,
    right: tuple[int, ...] = (8, 7),
    decisions: tuple[str, ...] = ("accept", "accept"),
    question: str = "What is {i} <b>times</b> 1?",
    config: RunConfig | None = None,
) -> Path:
    """Two cycles: two channels of every block go, then block 1; ``right`` are the problems solved after each.

    With a ``config`` that only recovers there is one, and nothing goes.
    """
    folder.mkdir(parents=True)
    schedule = {"channels_per_cycle": [2], "layers_total": 1, "alignment": 1}
    config = config or parse_config({"name": "made", "schedule": schedule})
    save_config(config, folder / "config.json")
    only = config.schedule.recover_only
    journal = Journal(folder / "journal.jsonl")

    def evaluated(cycle: int, solved: int, channels: int, layers: int) -> None:
        out = folder / f"cycles/{cycle:03d}/evaluation"
        out.mkdir(parents=True)
        rows = [
            {
                "id": f"p{i}",
                "question": question.format(i=i),
                "expected": str(i),
                "text": f"cycle {cycle}: \\boxed{{{i if i < solved else -1}}}",
                "correct": float(i < solved),
                "tokens": 5,
                "truncated": False,
            }
            for i in range(10)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out / "samples.parquet")
        metrics = {
            "accuracy": solved / 10,
            "problems": 10,
            "parameters": 100 * channels * layers,
            "flops_per_token": 200 * channels * layers,
            "tokens_per_answer": 5.0,
            "tokens_per_second": 1000.0 / layers,
            "intermediate_size": channels,
            "num_hidden_layers": layers,
        }
        journal.append(_entry(folder, cycle, "evaluate", out, metrics))

    evaluated(0, ORIGINAL_RIGHT, WIDTH, BLOCKS)
    plans = [
        {
            "source_intermediate_size": WIDTH,
            "keep_channels": [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], [0, 2, 3, 4, 6, 7]],
            "keep_layers": [0, 1, 2],
            "layer_order": [],
        },
        {
            "source_intermediate_size": 6,
            "keep_channels": [list(range(6))] * 3,
            "keep_layers": [0, 2],
            "layer_order": [1],
        },
    ]
    for cycle, (plan, solved, decision) in enumerate(zip(plans[: 1 if only else 2], right, decisions, strict=False), 1):
        sliced = folder / f"cycles/{cycle:03d}/sliced"
        if not only:
            journal.append(_entry(folder, cycle, "score", sliced, {}))
            sliced.mkdir(parents=True)
            (sliced / "plan.json").write_text(json.dumps(plan))
            journal.append(_entry(folder, cycle, "slice", sliced, {"notes": [f"rounded in {cycle}"]}))
        recovered = folder / f"cycles/{cycle:03d}/recovered"
        recovered.mkdir(parents=True)
        (recovered / "config.json").write_text("{}")
        save_file({"weight": torch.arange(8.0) / 3, "steps": torch.tensor(4)}, recovered / "model.safetensors")
        (recovered / "rollouts.jsonl").write_text("of the run alone")
        curve = [{"step": step, "reward": 0.5 + step / 100} for step in (1, 2, 3)]
        metrics = {"steps": 3, "method": "grpo", "curve": curve}
        journal.append(_entry(folder, cycle, "recover", recovered, metrics))
        evaluated(cycle, solved, WIDTH if only else 6, BLOCKS - (cycle == 2))
        journal.append(Entry(cycle=cycle, stage="gate", metrics={"decision": decision}))
        if decision.startswith("accept"):
            (folder / "best").unlink(missing_ok=True)
            (folder / "best").symlink_to(recovered.relative_to(folder))
        manifest = {"cycle": cycle, "versions": {"torch": "2.13.0"}, "stages": []}
        (folder / f"cycles/{cycle:03d}/manifest.json").write_text(json.dumps(manifest))
    return folder


def _entry(folder: Path, cycle: int, stage: str, artefact: Path, metrics: dict[str, Any]) -> Entry:
    return Entry(cycle=cycle, stage=stage, seconds=10.0, artefact=str(artefact.relative_to(folder)), metrics=metrics)
