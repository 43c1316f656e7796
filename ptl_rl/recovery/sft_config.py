"""Render one CPT recovery into the configuration of verl's SFT trainer; see ``verl_config.py``."""

from pathlib import Path
from typing import Any

from ptl_rl.attention import FLASH
from ptl_rl.config import CptConfig, RunConfig
from ptl_rl.config.recovery import AFTER_CUTS, micro_batch
from ptl_rl.config.verl_keys import SAVE_ALL, settings_of
from ptl_rl.cpu.checks import float32_engine
from ptl_rl.recovery.verl_config import common_settings, composed
from ptl_rl.stage import StageSpec, is_in_place, stage_seed
from ptl_rl.verl_patches import ENGINE_LIBRARY


def render_sft(
    config: RunConfig, recovery: CptConfig, spec: StageSpec, sequences: Path, sequences_per_step: int
) -> dict[str, Any]:
    """verl settings, dotted key to value; ``recovery.verl`` wins over everything else."""
    resources = config.resources
    # By their tokens only where they are not padded, else one long row makes all of a micro-batch's as long.
    rows = max(1, recovery.micro_batch_tokens // recovery.max_tokens)
    settings: dict[str, Any] = {
        **settings_of(config, recovery),
        **common_settings(recovery, spec, "checkpoint"),
        "data.train_files": str(sequences),
        "data.val_files": None,
        "data.train_batch_size": sequences_per_step,
        "data.pad_mode": "no_padding",
        "data.use_dynamic_bsz": spec.attention == FLASH,
        "data.micro_batch_size_per_gpu": micro_batch(sequences_per_step // resources.workers, rows),
        "data.custom_cls.path": "pkg://ptl_rl.recovery.sequences",
        "data.custom_cls.name": "SequenceFile",
        "model.path": str(spec.source),
        "model.external_lib": ENGINE_LIBRARY,
        "model.override_config.attn_implementation": spec.attention,
        "model.use_remove_padding": spec.attention == FLASH,
        "engine.strategy": "fsdp2",
        **(float32_engine("engine") if config.model.dtype == "float32" else {}),
        "optim.lr_warmup_steps": -1 if recovery.warmup_ratio is not None else recovery.warmup_steps,
        "trainer.max_ckpt_to_keep": 2,
        "trainer.seed": stage_seed(config, spec) % (1 << 31),
    }
    if is_in_place(config, spec):  # saved after every cut, and goes on from there
        settings |= {"trainer.resume_mode": "auto", "checkpoint.save_contents": SAVE_ALL}
        settings |= {"checkpoint.load_contents": SAVE_ALL[1:]}
        if recovery.learning_rate_schedule == AFTER_CUTS:  # our worker lets it fall
            settings["optim.lr_scheduler_type"] = "constant"
    if spec.device == "cpu":
        from ptl_rl.cpu.checks import verl_sft_cpu_overrides

        settings |= verl_sft_cpu_overrides()
    return {**settings, **recovery.verl}


def compose_sft(settings: dict[str, Any]):
    """The SFT trainer's full configuration with ``settings`` applied."""
    return composed("sft_trainer_engine", settings)
