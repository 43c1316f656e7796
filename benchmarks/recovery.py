"""GRPO, CPT, CPT then GRPO, and distillation of the demo's model after the same cut, on equally many sequences.

A sequence is a question and its solution or response, so trained tokens are about equal too; the table has them.
``python benchmarks/recovery.py DIR`` makes ``ptl run`` for every method and seed with the settings of the demo recipes
and prints accuracies, tokens and times. Runs that DIR holds already are not made again, a broken one goes on.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from criteria import table
from rich.console import Console

from ptl_rl.config.recipe import read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
console = Console(stderr=True)
SEQUENCES_PER_STEP = {"cpt": 32, "grpo": 256, "distill": 64}


def demo(name: str, method: str) -> dict[str, Any]:
    """The settings of ``method`` in the demo recipe ``name``."""
    recovery = read_recipe(RECIPES / f"demo_{name}_cpu.yaml")["recovery"]
    return next(entry[method] for entry in recovery if method in entry)


def methods(sequences: int) -> dict[str, list[dict[str, Any]]]:
    """Recoveries that train on ``sequences`` sequences each; a question and its solution are one, in all of them."""

    def entry(name: str, method: str, share: float = 1.0) -> dict[str, Any]:
        steps = max(1, round(sequences * share / SEQUENCES_PER_STEP[method]))
        return {method: {**demo(name, method), "steps": steps}}

    return {
        "GRPO": [entry("cpt_grpo", "grpo")],
        "CPT": [entry("cpt_grpo", "cpt")],
        "CPT, then GRPO": [entry("cpt_grpo", "cpt", 0.5), entry("cpt_grpo", "grpo", 0.5)],
        "distillation": [entry("distill", "distill")],
    }


def run(folder: Path, recovery: list[dict[str, Any]], channels: int, compensate: str, seed: int) -> None:
    """``ptl run`` or ``ptl resume``, unless the run has ended."""
    if (folder / "config.json").exists():
        command = ["resume", str(folder)]
    else:
        settings = {
            "recovery": recovery,
            "model.path": "testbed",
            "calibration.sequences": 512,
            "schedule": {"channels_per_cycle": [channels], "alignment": 16},
            "criterion.compensate": compensate,
            "gate.min_accuracy_ratio": 0.01,
            "seed": seed,
        }
        if compensate == "none":
            settings["criterion.channels"] = "rms_contribution"
        command = ["run", str(RECIPES / "demo_cpt_grpo_cpu.yaml"), "--run-dir", str(folder)]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        subprocess.run([sys.executable, "-m", "ptl_rl.cli", *command], stdout=log, stderr=subprocess.STDOUT, check=True)


def result(folder: Path) -> dict[str, float]:
    """What the run's journal says."""
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    recovered = [entry for entry in entries if entry["stage"] == "recover"]
    accuracies = [entry["metrics"]["accuracy"] for entry in entries if entry["stage"] == "evaluate"]
    return {
        "accuracy": accuracies[-1],
        "tokens": sum(row.get("tokens", 0) for entry in recovered for row in entry["metrics"]["curve"]),
        "minutes": sum(entry["seconds"] for entry in recovered) / 60,
    }


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the runs.")],
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    sequences: Annotated[int, typer.Option(help="Sequences that a run trains on.")] = 3072,
    channels: Annotated[int, typer.Option(help="Of 1280, cut from every block at once.")] = 960,
    compensate: Annotated[str, typer.Option(help="least_squares, or none with rms_contribution.")] = "least_squares",
) -> None:
    """Accuracy on 500 unseen problems after recovery: mean and range over seeds."""
    out.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[tuple[str, list[str]]]:
        for name, recovery in methods(sequences).items():
            found = []
            for seed in range(seeds):
                settings = f"{channels}-{sequences}-{compensate}-{seed}"
                folder = out.absolute() / f"{name.replace(', ', '_').replace(' ', '_')}-{settings}"
                run(folder, recovery, channels, compensate, seed)
                found.append(result(folder))
                console.print(f"{name}, seed {seed}: {found[-1]}")
            accuracies = [row["accuracy"] for row in found]
            tokens, minutes = (statistics.mean(row[key] for row in found) for key in ("tokens", "minutes"))
            spread = f"{min(accuracies):.1%}-{max(accuracies):.1%}"
            yield name, [f"{statistics.mean(accuracies):.1%} ({spread})", f"{tokens:,.0f}", f"{minutes:.1f}"]

    table(["recovery", "accuracy", "trained tokens", "minutes"], rows())


if __name__ == "__main__":
    typer.run(main)
