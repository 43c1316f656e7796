"""The runs of ``gpu_first_light.py``: what they change of the demo's recipes, and what their journals say then."""

import json
from pathlib import Path
from typing import Any

from ptl_rl.config.recipe import read_recipe
from ptl_rl.driver.journal import Entry

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KEPT_APART = 200
"""Rows of a file of problems that the model is tested on where no other file is named."""
MEASURED = {
    "memory_allocated_gib": "perf/max_memory_allocated_gb",
    "memory_reserved_gib": "perf/max_memory_reserved_gb",
    "rollout_probs_diff_mean": "training/rollout_probs_diff_mean",
    "rollout_probs_diff_max": "training/rollout_probs_diff_max",
    "generation_seconds": "timing_s/gen",
    "update_seconds": "timing_s/update_actor",
    "weights_seconds": "timing_s/update_weights",
}
"""Our names of what verl alone measures, at its last step; its gb are GiB."""
Run = tuple[Path, dict[str, Any]]
"""A recipe and its overrides."""


def _tiny(device: str) -> dict[str, Any]:
    """Rollouts of models this small start without CUDA graphs, which would take longer to make than they save."""
    eager = {"verl.actor_rollout_ref.rollout.enforce_eager": True} if device == "cuda" else {}
    return {
        "resources.device": device,
        "model.dtype": "bfloat16" if device == "cuda" else "float32",
        "data.train.rows": 2048,
        "data.validation.rows": 64,
        "data.test.rows": 200,
        "calibration.sequences": 128,
        "gate.max_extensions": 0,
        "watchdog": {"startup_seconds": 240, "stall_seconds": 180, "attempts": 1},
        **eager,
    }


def _recovery(recipe: Path, method: str) -> dict[str, Any]:
    """The settings of ``method`` in a recipe."""
    return next(entry[method] for entry in read_recipe(recipe)["recovery"] if method in entry)


def grpo(device: str) -> Run:
    """Two cycles; vLLM's log-probabilities are held against the policy's own, not taken for them."""
    settings = {"schedule.channels_per_cycle": [160, 64], "recovery.steps": 2}
    compared = {"verl.algorithm.rollout_correction.bypass_mode": False}
    return RECIPES / "demo_restart_cpu.yaml", {**_tiny(device), **settings, **compared}


def cpt(device: str) -> Run:
    """A cycle that is recovered by the data's tokens, then by those and the parent's distribution."""
    recipe = RECIPES / "demo_cpt_llama_cpu.yaml"
    first = {**_recovery(recipe, "cpt"), "steps": 10}
    recovery = [{"cpt": first}, {"cpt": {**first, "parent_kl": 0.5}}]
    schedule = {"channels_per_cycle": [192], "alignment": 16}
    return recipe, {**_tiny(device), "schedule": schedule, "recovery": recovery}


def distill(device: str) -> Run:
    """A cycle; on GPUs one of two is the parent's."""
    recipe = RECIPES / "demo_distill_cpu.yaml"
    recovery = [{"distill": {**_recovery(recipe, "distill"), "steps": 2}}]
    workers = {"resources.workers_per_node": 2 if device == "cuda" else 1}
    schedule = {"channels_per_cycle": [256], "alignment": 16}
    return recipe, {**_tiny(device), **workers, "schedule": schedule, "recovery": recovery}


def real(model: Path, train: dict[str, Any], test: dict[str, Any], device: str, *, smoke: bool) -> dict[str, Any]:
    """A recipe: an eighth of the channels goes twice, GRPO after both cuts; in the smoke once, then GRPO and CPT.

    Args:
        train: source of problems to learn from, as in a recipe.
        test: source of those to be judged by.
    """
    width = json.loads((model / "config.json").read_text())["intermediate_size"]
    cut = width // 8
    grpo = {"prompts_per_step": 32, "rollouts_per_prompt": 8, "micro_batch_sequences": 8, "steps": 3}
    recovery: list[dict[str, Any]] = [{"grpo": grpo}]
    if smoke:
        grpo |= {"prompts_per_step": 8, "rollouts_per_prompt": 4, "micro_batch_sequences": 16, "steps": 1}
        recovery += [{"cpt": {"steps": 2, "sequences_per_step": 8, "max_tokens": 160, "parent_kl": 0.5}}]
    tokens = (104, 80) if smoke else (384, 384)
    suffix = "" if smoke else "\nPlease reason step by step, and put your final answer within \\boxed{}."
    return {
        "name": "first-light",
        "model": {"path": str(model), "dtype": "float32" if device == "cpu" else "bfloat16"},
        "data": {
            "train": train,
            "validation": {**test, "rows": min(8 if smoke else 64, test["rows"])},
            "test": test,
            "prompt_suffix": suffix,
            "max_prompt_tokens": tokens[0],
            "max_response_tokens": tokens[1],
        },
        "calibration": {"sequences": 32 if smoke else 256, "max_tokens": sum(tokens), "batch_size": 8},
        "schedule": {
            "channels_per_cycle": [cut] if smoke else [cut, cut],
            "alignment": next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if width % size == cut % size == 0),
        },
        "recovery": recovery,
        "gate": {"max_extensions": 0},
        "resources": {"device": device},
        "watchdog": {"startup_seconds": 900 if smoke else 300, "stall_seconds": 240, "attempts": 1},
    }


def questions(data: str, test: str | None, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sources to learn from and to be judged by; without ``test`` the last rows of ``data`` are kept apart.

    Args:
        data: a .jsonl file, or the test bed's problems.
        folder: where the two parts are written then.
    """
    if data.startswith("testbed:"):
        return {"path": data, "rows": 96}, {"path": test or "testbed:test", "rows": 40}
    learnt = Path(data).expanduser().absolute()
    judged = Path(test).expanduser().absolute() if test else folder / "test.jsonl"
    lines = _rows(learnt)
    if test is None:
        kept = min(KEPT_APART, len(lines) // 5)
        learnt = folder / "train.jsonl"
        judged.write_text("".join(lines[-kept:]))
        lines = lines[:-kept]
        learnt.write_text("".join(lines))
    layout = {"layout": "openai/gsm8k"} if "####" in lines[0] else {}
    sizes = min(2048, len(lines)), min(KEPT_APART, len(_rows(judged)))
    return {"path": str(learnt), "rows": sizes[0], **layout}, {"path": str(judged), "rows": sizes[1], **layout}


def _rows(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.strip()]


def summary(folder: Path, entries: list[Entry]) -> dict[str, Any]:
    """What a run's journal and verl's metrics say: times, sizes, accuracies, memory and speed."""
    evaluations = [entry.metrics for entry in entries if entry.stage == "evaluate"]
    peaks = {f"{e.cycle}.{e.stage}": e.metrics["peak_memory_gib"] for e in entries if "peak_memory_gib" in e.metrics}
    return {
        "stage_seconds": [[f"{e.cycle}.{e.stage}", round(e.seconds, 1)] for e in entries if e.stage != "gate"],
        "accuracy": [metrics["accuracy"] for metrics in evaluations],
        "parameters": [metrics["parameters"] for metrics in evaluations],
        "answer_tokens_per_second": [round(metrics["tokens_per_second"]) for metrics in evaluations],
        "logit_difference": [e.metrics["logit_difference"] for e in entries if "logit_difference" in e.metrics],
        "worker_memory_peak_gib": peaks,
        "recoveries": [_figures(folder, entry) for entry in entries if entry.stage == "recover"],
    }


def _figures(folder: Path, entry: Entry) -> dict[str, Any]:
    """Of one recovery: where it began and ended, and what its last step cost."""
    curve = [row for row in entry.metrics["curve"] if row["step"] > 0] or [{}]
    found: dict[str, Any] = {"method": entry.metrics["method"], "steps": entry.metrics["steps"]}
    if entry.metrics.get("validation_accuracy_before") is not None:
        found["validation_accuracy_before"] = entry.metrics["validation_accuracy_before"]
    for name in ("reward", "loss", "parent_kl", "distillation_loss", "grad_norm"):
        if name in curve[-1]:
            found[name] = [curve[0].get(name), curve[-1][name]]
    found |= {name: curve[-1][name] for name in ("step_seconds", "tokens_per_second") if name in curve[-1]}
    path = folder / str(entry.artefact) / "verl_metrics.jsonl"
    rows = [json.loads(line)["data"] for line in path.read_text().splitlines()] if path.exists() else []
    logged = {key: value for row in rows for key, value in row.items()}
    return found | {ours: logged[theirs] for ours, theirs in MEASURED.items() if theirs in logged}
