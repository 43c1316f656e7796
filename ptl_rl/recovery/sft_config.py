"""Render one CPT recovery into the configuration of verl's SFT trainer."""

from pathlib import Path
from typing import Any

from ptl_rl.attention import FLASH
from ptl_rl.config import CptConfig, RunConfig
from ptl_rl.cpu.checks import ENGINE_LIBRARY, float32_engine
from ptl_rl.recovery.verl_config import checkpoint_settings, composed, micro_batch
from ptl_rl.stage import StageSpec


def render_sft(
    config: RunConfig, recovery: CptConfig, spec: StageSpec, sequences: Path, sequences_per_step: int
) -> dict[str, Any]:
    """verl settings, dotted key to value; ``recovery.verl`` wins over everything else."""
    resources = config.resources
    # By their tokens only where they are not padded, else one long row makes all of a micro-batch's as long.
    rows = max(1, recovery.micro_batch_tokens // recovery.max_tokens)
    settings: dict[str, Any] = {
        "data.train_files": str(sequences),
        "data.val_files": None,
        "data.train_batch_size": sequences_per_step,
        "data.max_length": recovery.max_tokens,
        "data.pad_mode": "no_padding",
        "data.use_dynamic_bsz": spec.attention == FLASH,
        "data.micro_batch_size_per_gpu": micro_batch(sequences_per_step // resources.workers, rows),
        "data.max_token_len_per_gpu": recovery.micro_batch_tokens,
        "data.custom_cls.path": "pkg://ptl_rl.recovery.sequences",
        "data.custom_cls.name": "SequenceFile",
        "model.path": str(spec.source),
        "model.trust_remote_code": config.model.trust_remote_code,
        "model.external_lib": ENGINE_LIBRARY,
        "model.enable_gradient_checkpointing": recovery.gradient_checkpointing,
        "model.override_config.attn_implementation": spec.attention,
        "model.use_remove_padding": spec.attention == FLASH,
        "engine.strategy": "fsdp2",
        "engine.reshard_after_forward": recovery.reshard_after_forward,
        "engine.param_offload": recovery.offload,
        "engine.optimizer_offload": recovery.offload,
        "engine.dtype": config.model.dtype,
        **(float32_engine("engine") if config.model.dtype == "float32" else {}),
        "engine.seed": config.seed,
        "optim.lr": recovery.learning_rate,
        "optim.lr_scheduler_type": recovery.learning_rate_schedule,
        "optim.lr_warmup_steps": -1 if recovery.warmup_ratio is not None else recovery.warmup_steps,
        "optim.lr_warmup_steps_ratio": recovery.warmup_ratio or 0.0,
        "optim.weight_decay": recovery.weight_decay,
        **checkpoint_settings(recovery, spec),
        "trainer.device": spec.device,
        "trainer.nnodes": resources.nodes,
        "trainer.n_gpus_per_node": resources.workers_per_node,
        "trainer.project_name": "ptl-rl",
        "trainer.experiment_name": config.name,
        "trainer.logger": ["console", "file"],
        "trainer.seed": config.seed,
        "trainer.total_training_steps": spec.steps,
        "trainer.total_epochs": spec.steps,  # an epoch has at least one step
        "trainer.save_freq": recovery.save_every_steps or spec.steps,
        "trainer.test_freq": -1,
        "trainer.default_local_dir": str(spec.work / "checkpoints"),
        "trainer.resume_mode": "auto" if recovery.save_every_steps else "disable",
        "trainer.max_ckpt_to_keep": 2,
    }
    if spec.device == "cpu":
        from ptl_rl.cpu.checks import verl_sft_cpu_overrides

        settings |= {
            **verl_sft_cpu_overrides(resources.workers),
            "trainer.nnodes": resources.nodes,
            "trainer.n_gpus_per_node": resources.workers_per_node,
        }
    return {**settings, **recovery.verl}


def compose_sft(settings: dict[str, Any]):
    """The SFT trainer's full configuration with ``settings`` applied."""
    return composed("sft_trainer_engine", settings)
