"""The table from recipe fields to verl's keys names keys that verl has, and that each field does decide."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ptl_rl.config.recipe import parse_config
from ptl_rl.config.verl_keys import PARENT, REWARD, TABLE, Row, trainers_of, value_of
from ptl_rl.recovery.sft_config import render_sft
from ptl_rl.recovery.verl_config import composed, render
from ptl_rl.stage import StageSpec

OPEN = {
    "actor_rollout_ref.model.override_config",
    "model.override_config",
    "reward.custom_reward_function.reward_kwargs",  # verl's code reads it, verl's YAML leaves it out
}
"""What verl passes on as it is, so that its YAML cannot name what stands there."""
OF_THE_STAGE = {
    "model.path", "model.parent", "model.attention", "data.train", "data.corpus", "data.validation",
    "resources.device", "recovery.steps", "recovery.tokens_per_step",
}  # fmt: skip
"""Fields that the driver and the data have made something else of, before verl's settings are rendered."""
SIZES = {"prompts_per_step": 60, "rollouts_per_prompt": 4, "micro_batch_sequences": 240}
RECOVERIES = {
    "grpo": SIZES,
    "distill": {**SIZES, "teacher_workers_per_node": 2, "kl_loss": 0.1},
    "cpt": {"sequences_per_step": 24, "max_tokens": 512, "micro_batch_tokens": 8192, "warmup_ratio": None},
}
OTHER = {
    "name": "other", "seed": 7, "model.dtype": "float32", "model.trust_remote_code": True,
    "data.max_prompt_tokens": 64, "data.max_response_tokens": 64, "calibration.source": "rollouts",
    "reward.path": __file__, "reward.name": "other", "reward.call_seconds": 5.0, "reward.accuracy_weight": 0.5,
    "reward.format_weight": 0.5, "reward.format_style": "think_boxed", "resources.nodes": 2,
    "resources.workers_per_node": 6,
    "resources.tensor_parallel_size": 2, "resources.gpu_memory_utilization": 0.5, "recovery.learning_rate": 0.5,
    "recovery.learning_rate_schedule": {"grpo": "cosine", "distill": "cosine", "cpt": "constant"},
    "recovery.warmup_steps": 3, "recovery.weight_decay": 0.5, "recovery.gradient_checkpointing": False,
    "recovery.offload": True, "recovery.save_every_steps": 3, "recovery.prompts_per_step": 36,
    "recovery.rollouts_per_prompt": 3, "recovery.temperature": 0.5,
    "recovery.kl_loss": 0.0, "recovery.kl_to": "parent", "recovery.clip_low": 0.5, "recovery.clip_high": 0.5,
    "recovery.mini_batch_prompts": 12, "recovery.micro_batch_sequences": 8, "recovery.dynamic_batches": True,
    "recovery.validate_before": False, "recovery.warmup_ratio": 0.5, "recovery.sequences_per_step": 16,
    "recovery.max_tokens": 4096, "recovery.micro_batch_tokens": 1024, "recovery.reshard_after_forward": False,
    "recovery.loss": "k1", "recovery.topk": 5, "recovery.rewards": True, "recovery.distillation_weight": 0.5,
    "recovery.teacher_workers_per_node": 3, "recovery.teacher_tensor_parallel_size": 2,
}  # fmt: skip


def configured(method: str, field: str | None = None):
    """A run with one recovery, with another value than the usual one of ``field``."""
    values: dict = {
        "schedule": {"channels_per_cycle": [64]},
        "resources": {"device": "cuda", "workers_per_node": 4},
        "recovery": {**RECOVERIES[method], "method": method},
    }
    if field is not None:
        other = OTHER[field]
        *sections, last = field.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = other[method] if isinstance(other, dict) else other
    return parse_config(values)


def rendered(config):
    folder, recovery = Path("/run"), config.recovery[0]
    spec = StageSpec(
        name="recover", cycle=1, round=0, device="cuda", attention="sdpa", ray_address="x", stage_id="x", subset=0,
        subsets=1, remove_channels=64, remove_layers=0, removed_layers=0, steps=5, alignment=64,
        **{part: folder / part for part in ("source", "parent", "out", "work", "progress", "result", "data")},
    )  # fmt: skip
    if recovery.method == "cpt":
        return render_sft(config, recovery, spec, folder / "s.arrow", recovery.sequences_per_step)
    return render(config, spec)


ROWS = [
    pytest.param(method, row, id=f"{method}-{row.field}")
    for method in RECOVERIES
    for row in TABLE
    if any(row.keys(trainer) for trainer in trainers_of(configured(method).recovery[0]))
]


@pytest.mark.parametrize(("method", "row"), ROWS)
def test_a_field_decides_the_keys_that_the_table_names(method: str, row: Row):
    usual = configured(method)
    keys = [key for trainer in trainers_of(usual.recovery[0]) for key in row.keys(trainer)]
    before = rendered(usual)
    if row.field in OF_THE_STAGE:
        assert {key.name for key in keys} <= before.keys()
        return
    changed = configured(method, row.field)
    after = rendered(changed)
    for key in keys:
        assert before.get(key.name) != after[key.name], key.name
        if key.convert is not None:
            assert after[key.name] == key.convert(value_of(row.field, changed, changed.recovery[0])), key.name
    also = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} - {k.name for k in keys}
    if row.field == "model.dtype":  # verl's YAML has no key for the parts of this one
        also = {key for key in also if ".mixed_precision." not in key}
    if row.field == "reward.path":  # which takes the place of the shipped reward and its weights
        also = {key for key in also if not key.startswith(REWARD)}
    assert not also, "the field decides more keys than the table names"


@pytest.mark.parametrize(("name", "trainers"), [("ppo_trainer", ("rl", "distill")), ("sft_trainer_engine", ("sft",))])
def test_every_key_is_one_of_verls_own(name, trainers):
    verl = composed(name, {})
    keys = {key.name for row in TABLE for trainer in trainers for key in row.keys(trainer)} - {PARENT}
    assert len(keys) > 30
    for key in keys:
        parent, _, last = key.rpartition(".")
        if parent not in OPEN:
            section = OmegaConf.select(verl, parent)
            assert section is not None and last in section, f"{key} is no key of {name}"
