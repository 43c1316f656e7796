"""Render a run's configuration into that of verl's RL trainer; ``sft_config.py`` does so for its SFT trainer."""

from pathlib import Path
from typing import Any

from ptl_rl.attention import FLASH
from ptl_rl.config import ConfigError, DistillConfig, GrpoConfig, RecoveryConfig, RunConfig
from ptl_rl.cpu.checks import ENGINE_LIBRARY, float32_engine
from ptl_rl.families import ModelShape
from ptl_rl.stage import StageSpec

ROLLOUTS = "rollouts"
"""Folder, within a recovery's work folder, that verl writes the policy's responses into."""
SMALLEST_BUCKET_MIB = {"cpu": 64, "cuda": 2048}
"""On GPUs verl's own."""
SAVE_ALL = ["hf_model", "model", "optimizer", "extra"]
"""The first at the last step, the others, from which training can go on, before it."""


def checkpoint_settings(recovery: RecoveryConfig, spec: StageSpec) -> dict[str, Any]:
    """verl's section ``checkpoint``: what is written and read, and the last step, which is written otherwise."""
    resumable = recovery.save_every_steps > 0
    return {
        "checkpoint._target_": f"{ENGINE_LIBRARY}.StepwiseCheckpointConfig",
        "checkpoint.last_step": spec.steps,
        "checkpoint.save_contents": SAVE_ALL if resumable else ["hf_model"],
        "checkpoint.load_contents": SAVE_ALL[1:] if resumable else [],
    }


def _data(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    data = config.data
    return {
        "data.train_files": str(spec.work / "train.parquet"),
        "data.val_files": str(spec.work / "validation.parquet"),
        "data.train_batch_size": recovery.prompts_per_step,
        "data.max_prompt_length": data.max_prompt_tokens,
        "data.max_response_length": data.max_response_tokens,
        "data.filter_overlong_prompts": True,
        "data.shuffle": True,
        "data.seed": config.seed * 1009 + spec.cycle * 31 + spec.round,
        "data.trust_remote_code": config.model.trust_remote_code,
    }


def micro_batch(of_worker: int, most: int) -> int:
    """The largest number of sequences, at most ``most``, by which a worker's part of an update can be shared out."""
    return next(size for size in range(min(of_worker, most), 0, -1) if of_worker % size == 0)


def _micro_batches(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    """How a worker's part of a batch is shared out, alike for updates and for log-probabilities."""
    workers = config.resources.nodes * _trainer_workers(config, recovery, spec.device)
    prompts = recovery.mini_batch_prompts or recovery.prompts_per_step
    sequences = micro_batch(prompts * recovery.rollouts_per_prompt // workers, recovery.micro_batch_sequences)
    # Padded, a micro-batch that is full by its tokens may hold one long row and very many short ones.
    is_dynamic = recovery.dynamic_batches
    if is_dynamic is None:
        is_dynamic = spec.attention == FLASH
    tokens = recovery.micro_batch_sequences * (config.data.max_prompt_tokens + config.data.max_response_tokens)
    return {
        "actor_rollout_ref.actor.use_dynamic_bsz": is_dynamic,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": tokens,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": sequences,
    } | {
        f"actor_rollout_ref.{part}.{key}": value
        for part in ("ref", "rollout")
        for key, value in {
            "log_prob_use_dynamic_bsz": is_dynamic,
            "log_prob_max_token_len_per_gpu": tokens,
            "log_prob_micro_batch_size_per_gpu": sequences,
        }.items()
    }


def _actor(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    seed = config.seed * 1009 + spec.cycle * 31 + spec.round
    actor = {
        "strategy": "fsdp2",
        "optim.lr": recovery.learning_rate,
        "optim.lr_scheduler_type": recovery.learning_rate_schedule,
        "optim.lr_warmup_steps": recovery.warmup_steps,
        "optim.weight_decay": recovery.weight_decay,
        "ppo_mini_batch_size": recovery.mini_batch_prompts or recovery.prompts_per_step,
        "clip_ratio": recovery.clip_low,
        "clip_ratio_low": recovery.clip_low,
        "clip_ratio_high": recovery.clip_high,
        "use_kl_loss": recovery.kl_loss > 0,
        "kl_loss_coef": recovery.kl_loss,
        "kl_loss_type": "low_var_kl",
        "data_loader_seed": seed,
        **checkpoint_settings(recovery, spec),
        "fsdp_config.seed": seed,
        "fsdp_config.param_offload": recovery.offload,
        "fsdp_config.optimizer_offload": recovery.offload,
        "fsdp_config.dtype": config.model.dtype,
    }
    return {f"actor_rollout_ref.actor.{key}": value for key, value in actor.items()} | {
        "actor_rollout_ref.ref.fsdp_config.param_offload": recovery.offload,
        "actor_rollout_ref.ref.fsdp_config.dtype": config.model.dtype,
        "actor_rollout_ref.model.path": str(spec.source),
        "actor_rollout_ref.model.trust_remote_code": config.model.trust_remote_code,
        "actor_rollout_ref.model.external_lib": ENGINE_LIBRARY,
        "actor_rollout_ref.model.enable_gradient_checkpointing": recovery.gradient_checkpointing,
        "actor_rollout_ref.model.override_config.attn_implementation": spec.attention,
        "actor_rollout_ref.model.use_remove_padding": spec.attention == FLASH,
        **(_engines_in_float32() if config.model.dtype == "float32" else {}),
    }


def _engines_in_float32() -> dict[str, Any]:
    parts = [float32_engine(f"actor_rollout_ref.{part}.fsdp_config") for part in ("actor", "ref")]
    return {key: value for part in parts for key, value in part.items()}


def _rollout(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    rollout = {
        "name": "vllm",
        "n": recovery.rollouts_per_prompt,
        "temperature": recovery.temperature,
        "dtype": config.model.dtype,
        "tensor_model_parallel_size": config.resources.tensor_parallel_size,
        "gpu_memory_utilization": config.resources.gpu_memory_utilization,
        "max_model_len": config.data.max_prompt_tokens + config.data.max_response_tokens,
        "calculate_log_probs": True,
        "seed": config.seed * 1009 + spec.cycle * 31 + spec.round,
        "val_kwargs.do_sample": False,
        "val_kwargs.temperature": 0,
    }
    return {f"actor_rollout_ref.rollout.{key}": value for key, value in rollout.items()}


def _reward(config: RunConfig, user_keys: dict[str, str] | None) -> dict[str, Any]:
    import reward.user

    user = config.reward.file
    settings: dict[str, Any] = {
        "user_path": str(Path(user).resolve()) if user else None,
        "user_name": config.reward.name,
        "user_keys": user_keys,
    }
    if user is None:
        settings |= {
            "accuracy_weight": config.reward.accuracy_weight,
            "format_weight": config.reward.format_weight,
            "format_style": config.reward.format_style,
        }
    rendered = {f"reward.custom_reward_function.reward_kwargs.{key}": value for key, value in settings.items()}
    return rendered | {
        "reward.custom_reward_function.path": reward.user.__file__,
        "reward.custom_reward_function.name": "compute_score",
    }


def _trainer(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    resources = config.resources
    return {
        "trainer.device": spec.device,
        "trainer.nnodes": resources.nodes,
        "trainer.n_gpus_per_node": _trainer_workers(config, recovery, spec.device),
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "ptl-rl",
        "trainer.experiment_name": config.name,
        "trainer.total_training_steps": spec.steps,
        "trainer.total_epochs": spec.steps,
        "trainer.val_before_train": recovery.validate_before,
        "trainer.test_freq": -1,
        "trainer.save_freq": recovery.save_every_steps or spec.steps,
        "trainer.default_local_dir": str(spec.work / "checkpoints"),
        "trainer.resume_mode": "auto" if recovery.save_every_steps else "disable",
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.rollout_data_dir": None if config.calibration.source == "corpus" else str(spec.work / ROLLOUTS),
        "algorithm.adv_estimator": "grpo",
    }


def _trainer_workers(config: RunConfig, recovery: GrpoConfig, device: str) -> int:
    """GPUs per node that train; on GPUs, those of a parent that teaches are taken off."""
    teachers = recovery.teacher_workers_per_node if isinstance(recovery, DistillConfig) and device != "cpu" else 0
    return config.resources.workers_per_node - teachers


def _distillation(config: RunConfig, recovery: DistillConfig, spec: StageSpec) -> dict[str, Any]:
    teacher, length = "teacher_models.teacher_model", config.data.max_prompt_tokens + config.data.max_response_tokens
    settings: dict[str, Any] = {
        "enabled": True,
        "n_gpus_per_node": recovery.teacher_workers_per_node,
        "nnodes": config.resources.nodes,
        f"{teacher}.model_path": str(spec.parent),
        f"{teacher}.inference.dtype": config.model.dtype,
        f"{teacher}.inference.tensor_model_parallel_size": recovery.teacher_tensor_parallel_size,
        f"{teacher}.inference.gpu_memory_utilization": 0.8,
        f"{teacher}.inference.max_model_len": length + 1,
        f"{teacher}.inference.temperature": 1.0,
        "distillation_loss.loss_mode": recovery.loss,
        "distillation_loss.topk": recovery.topk,
        "distillation_loss.use_task_rewards": recovery.rewards,
        "distillation_loss.use_policy_gradient": recovery.loss == "k1",
        "distillation_loss.distillation_loss_coef": recovery.distillation_weight,
    }
    if spec.device == "cpu":
        settings |= {
            f"{teacher}.inference.enable_sleep_mode": False,
            f"{teacher}.inference.free_cache_engine": False,
            f"{teacher}.inference.enforce_eager": True,
        }
    return {f"distillation.{key}": value for key, value in settings.items()}


def _bucket(shape: ModelShape, device: str) -> dict[str, Any]:
    """verl sends weights to vLLM in buckets, which hold the largest tensor here, float32 as the trainer has it.

    On CPUs, through shared memory, verl stops at a larger one; on GPUs it would go by a way of its own, seldom used.
    """
    largest = max(shape.vocab_size, shape.intermediate_size) * shape.hidden_size * 4
    key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    return {key: max(SMALLEST_BUCKET_MIB[device], -(-largest // 2**20))}


def render(
    config: RunConfig, spec: StageSpec, user_keys: dict[str, str] | None = None, shape: ModelShape | None = None
) -> dict[str, Any]:
    """verl settings of one GRPO recovery, dotted key to value; ``config.verl`` wins over everything else.

    Args:
        user_keys: what a user's reward function returns beside the score, as :func:`reward.check.reward_keys` finds.
        shape: of the model in ``spec.source``; None for one of the test bed's size.
    """
    recovery = config.recoveries(spec.planned)[spec.part]
    assert isinstance(recovery, GrpoConfig)
    settings = {
        **_data(config, recovery, spec),
        **_actor(config, recovery, spec),
        **_micro_batches(config, recovery, spec),
        **_rollout(config, recovery, spec),
        **_reward(config, user_keys),
        **_trainer(config, recovery, spec),
    }
    if spec.device == "cpu":
        from ptl_rl.cpu.checks import verl_cpu_overrides

        settings |= {
            **verl_cpu_overrides(config.resources.workers),
            "trainer.nnodes": config.resources.nodes,
            "trainer.n_gpus_per_node": _trainer_workers(config, recovery, spec.device),
        }
        if any(key.startswith("algorithm.filter_groups") for key in {**config.verl, **recovery.verl}):
            # verl hands this filter to its own buffer only.
            settings |= {f"trainer.v1.sampler.custom_sampler.{key}": None for key in ("path", "name")}
    if shape is not None:
        settings |= _bucket(shape, spec.device)
    if isinstance(recovery, DistillConfig):
        settings |= _distillation(config, recovery, spec)
    return {**settings, **config.verl, **recovery.verl}


def composed(name: str, settings: dict[str, Any]):
    """verl's configuration ``name`` with ``settings`` applied."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from omegaconf import OmegaConf, open_dict

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra_compose(name)
    with open_dict(config):
        for key, value in settings.items():
            OmegaConf.update(config, key, value, merge=True, force_add=True)
    return config


def compose(settings: dict[str, Any]):
    """verl's full configuration with ``settings`` applied, accepted by verl's own validation.

    Raises:
        ConfigError: verl refuses it; quotes verl's message.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = composed("ppo_trainer", settings)
    try:
        validate_config(
            config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"verl refuses the configuration: {error}") from None
    return config
