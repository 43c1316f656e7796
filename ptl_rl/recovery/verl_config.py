"""Render a run's configuration into that of verl's RL trainer; ``sft_config.py`` does so for its SFT trainer.

What one field of the recipe decides comes from the table ``config/verl_keys.py``. Here stands what is computed from
several, and what is the same for every recipe.
"""

from pathlib import Path
from typing import Any

from ptl_rl.attention import FLASH
from ptl_rl.config import ConfigError, DistillConfig, GrpoConfig, RecoveryConfig, RunConfig
from ptl_rl.config.recovery import AFTER_CUTS, micro_batch
from ptl_rl.config.section import TRAINER_MODE
from ptl_rl.config.verl_keys import (
    ACTOR,
    DYNAMIC,
    MICRO_SEQUENCES,
    MICRO_TOKENS,
    MODEL,
    PARENT,
    REF,
    REWARD,
    ROLLOUT,
    SAVE_ALL,
    SEED,
    TEACHER,
    settings_of,
)
from ptl_rl.cpu.checks import ONE_PROCESS, float32_engine
from ptl_rl.families import ModelShape
from ptl_rl.recovery.rl import FIXED, GOVERNED, SPEC, WATCHED
from ptl_rl.stage import PART_SEED, StageSpec, is_in_place
from ptl_rl.verl_patches import ENGINE_LIBRARY

ROLLOUTS = "rollouts"
"""Folder, within a recovery's work folder, that verl writes the policy's responses into."""
SMALLEST_BUCKET_MIB = {"cpu": 64, "cuda": 2048}
"""On GPUs verl's own."""


def common_settings(recovery: RecoveryConfig, spec: StageSpec, checkpoint: str) -> dict[str, Any]:
    """What both of verl's trainers take alike; ``checkpoint`` is the key of the section on checkpoints."""
    return {
        f"{checkpoint}._target_": f"{ENGINE_LIBRARY}.StepwiseCheckpointConfig",
        f"{checkpoint}.last_step": spec.steps,  # it is written otherwise than those before it
        "trainer.device": spec.device,
        "trainer.logger": ["console", "file"],
        "trainer.project_name": "ptl-rl",
        "trainer.total_training_steps": spec.steps,
        "trainer.total_epochs": spec.steps,  # an epoch has at least one step
        "trainer.test_freq": -1,
        "trainer.save_freq": recovery.save_every_steps or spec.steps,
        "trainer.default_local_dir": str(spec.work / "checkpoints"),
    }


def _data(spec: StageSpec) -> dict[str, Any]:
    return {
        "data.train_files": str(spec.work / "train.parquet"),
        "data.val_files": str(spec.work / "validation.parquet"),
        "data.filter_overlong_prompts": True,
        "data.shuffle": True,
    }


def _batches(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    """How a worker's part of a batch is shared out, alike for updates and for log-probabilities."""
    workers = config.resources.nodes * _trainer_workers(config, recovery, spec.device)
    prompts = recovery.mini_batch_prompts or recovery.prompts_per_step
    sequences = micro_batch(prompts * recovery.rollouts_per_prompt // workers, recovery.micro_batch_sequences)
    # Padded, a micro-batch that is full by its tokens may hold one long row and very many short ones.
    is_dynamic = recovery.dynamic_batches
    if is_dynamic is None:
        is_dynamic = spec.attention == FLASH
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    return {
        f"{ACTOR}.ppo_mini_batch_size": prompts,
        f"{ROLLOUT}.max_model_len": longest,
        **dict.fromkeys(DYNAMIC, is_dynamic),
        **dict.fromkeys(MICRO_TOKENS, recovery.micro_batch_sequences * longest),
        **dict.fromkeys(MICRO_SEQUENCES, sequences),
    }


def _policy(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    engines = float32_engine(f"{ACTOR}.fsdp_config") | float32_engine(f"{REF}.fsdp_config")
    return {
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.kl_loss_type": "low_var_kl",
        f"{MODEL}.path": str(spec.source),
        f"{MODEL}.external_lib": ENGINE_LIBRARY,
        f"{MODEL}.override_config.attn_implementation": spec.attention,
        f"{MODEL}.use_remove_padding": spec.attention == FLASH,
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.calculate_log_probs": True,
        f"{ROLLOUT}.val_kwargs.do_sample": False,
        f"{ROLLOUT}.val_kwargs.temperature": 0,
        **({PARENT: str(spec.parent)} if recovery.kl_to == "parent" else {}),
        **dict.fromkeys(SEED, config.seed * 1009 + spec.cycle * 31 + spec.part * PART_SEED + spec.round),
        **(engines if config.model.dtype == "float32" else {}),
    }


def _reward(config: RunConfig, user_keys: dict[str, str] | None, think_opened: bool) -> dict[str, Any]:
    import reward.user

    user = config.reward.file
    settings: dict[str, Any] = {"user_path": str(Path(user).resolve()) if user else None, "user_keys": user_keys}
    settings["user_seconds"] = config.reward.call_seconds
    if user is None:
        settings |= config.reward.model_dump(include={"accuracy_weight", "format_weight", "format_style"})
        settings["think_opened"] = think_opened
    return {f"{REWARD}.{key}": value for key, value in settings.items()} | {
        "reward.custom_reward_function.path": reward.user.__file__,
        "reward.custom_reward_function.name": "compute_score",
    }


def _trainer(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    return {
        **common_settings(recovery, spec, f"{ACTOR}.checkpoint"),
        "trainer.n_gpus_per_node": _trainer_workers(config, recovery, spec.device),
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.rollout_data_dir": None if config.calibration.source == "corpus" else str(spec.work / ROLLOUTS),
        "algorithm.adv_estimator": "grpo",
        TRAINER_MODE: WATCHED,
        f"trainer.{SPEC}": str(spec.file),
        **(_in_place(config, recovery, spec) if is_in_place(config, spec) else {}),
    }


def _in_place(config: RunConfig, recovery: GrpoConfig, spec: StageSpec) -> dict[str, Any]:
    """What a training needs that is saved after every cut, and goes on from there."""
    checkpoint = f"{ACTOR}.checkpoint"
    falls_later = {f"{ACTOR}.optim.lr_scheduler_type": "constant"}  # our worker lets it fall
    return {
        **(falls_later if recovery.learning_rate_schedule == AFTER_CUTS else {}),
        TRAINER_MODE: GOVERNED if config.schedule.pace == "governed" else FIXED,
        "trainer.resume_mode": "auto",
        f"{checkpoint}.save_contents": SAVE_ALL,
        f"{checkpoint}.load_contents": SAVE_ALL[1:],
    }


def _trainer_workers(config: RunConfig, recovery: GrpoConfig, device: str) -> int:
    """GPUs per node that train; on GPUs, those of a parent that teaches are taken off."""
    teachers = recovery.teacher_workers_per_node if isinstance(recovery, DistillConfig) and device != "cpu" else 0
    return config.resources.workers_per_node - teachers


def _distillation(config: RunConfig, recovery: DistillConfig, spec: StageSpec) -> dict[str, Any]:
    teacher = {
        "model_path": str(spec.parent),
        "inference.gpu_memory_utilization": 0.8,
        "inference.max_model_len": config.data.max_prompt_tokens + config.data.max_response_tokens + 1,
        "inference.temperature": 1.0,
    }
    if spec.device == "cpu":
        if recovery.teacher_tensor_parallel_size == 1:
            teacher |= {f"inference.engine_kwargs.vllm.{key}": value for key, value in ONE_PROCESS.items()}
        teacher |= {
            "inference.enable_sleep_mode": False,
            "inference.free_cache_engine": False,
            "inference.enforce_eager": True,
        }
    return {"distillation.enabled": True} | {f"{TEACHER}.{key}": value for key, value in teacher.items()}


def _bucket(shape: ModelShape, device: str) -> dict[str, Any]:
    """verl sends weights to vLLM in buckets, which hold the largest tensor here, float32 as the trainer has it.

    On CPUs, through shared memory, verl stops at a larger one; on GPUs it would go by a way of its own, seldom used.
    """
    largest = max(shape.vocab_size, shape.intermediate_size) * shape.hidden_size * 4
    key = f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"
    return {key: max(SMALLEST_BUCKET_MIB[device], -(-largest // 2**20))}


def render(
    config: RunConfig,
    spec: StageSpec,
    user_keys: dict[str, str] | None = None,
    shape: ModelShape | None = None,
    think_opened: bool = False,
) -> dict[str, Any]:
    """verl settings of one GRPO recovery, dotted key to value; ``config.verl`` wins over everything else.

    Args:
        user_keys: what a user's reward function returns beside the score, as :func:`reward.check.reward_keys` finds.
        shape: of the model in ``spec.source``; None for one of the test bed's size.
        think_opened: whether its chat template ends prompts with ``<think>``.
    """
    recovery = config.recoveries(spec.planned, spec.unlearnable)[spec.part]
    assert isinstance(recovery, GrpoConfig)
    settings = {
        **settings_of(config, recovery),
        **_data(spec),
        **_policy(config, recovery, spec),
        **_batches(config, recovery, spec),
        **_reward(config, user_keys, think_opened),
        **_trainer(config, recovery, spec),
    }
    if spec.device == "cpu":
        from ptl_rl.cpu.checks import verl_cpu_overrides

        settings |= verl_cpu_overrides()
        if any(key.startswith("algorithm.filter_groups") for key in {**config.verl, **recovery.verl}):
            # verl hands this filter to its own buffer only.
            settings |= {f"trainer.v1.sampler.custom_sampler.{key}": None for key in ("path", "name")}
    if shape is not None:
        settings |= _bucket(shape, spec.device)
    if isinstance(recovery, DistillConfig):
        settings |= _distillation(config, recovery, spec)
    given = {**config.verl, **recovery.verl}
    if given.get(f"{ROLLOUT}.tensor_model_parallel_size", 1) != 1:  # an engine of several workers needs processes
        for key in ONE_PROCESS:
            settings.pop(f"{ROLLOUT}.engine_kwargs.vllm.{key}", None)
    return {**settings, **given}


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
