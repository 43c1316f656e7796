"""Which of verl's keys each field of a recipe ends in: the one table that is rendered from and documented from.

``recovery/verl_config.py`` and ``recovery/sft_config.py`` take from it every key that one field alone decides. What is
computed from several fields, the device or the cycle is code there; the table names those keys as well, so that
``docs/configuration.md`` can say where a field goes. Imports neither torch nor ray.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ptl_rl.config.recovery import AnyRecovery, CptConfig, DistillConfig
from ptl_rl.config.run import RunConfig

Trainer = Literal["rl", "distill", "sft"]
"""verl's RL trainer, what it takes for distillation in addition, and verl's SFT trainer, which is that of ``cpt``."""


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """One key of verl's configuration."""

    name: str
    convert: Callable[[Any], Any] | None = _unchanged
    """From the field's value; None: the key is computed, in code, with something else beside the field."""
    note: str = ""
    """How the value is converted, or what else it is computed with."""


def _computed(note: str, *names: str) -> tuple[Key, ...]:
    return tuple(Key(name, None, note) for name in names)


@dataclass(frozen=True)
class Row:
    """A field of :class:`RunConfig`, dotted; ``recovery.X`` is the field X of each method that has it."""

    field: str
    rl: tuple[Key | str, ...] = ()
    distill: tuple[Key | str, ...] = ()
    sft: tuple[Key | str, ...] = ()

    def keys(self, trainer: Trainer) -> list[Key]:
        return [Key(key) if isinstance(key, str) else key for key in getattr(self, trainer)]


ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
LOSS, TEACHER = "distillation.distillation_loss", "distillation.teacher_models.teacher_model"
REWARD = "reward.custom_reward_function.reward_kwargs"
"""verl hands what stands here to the reward function."""
SAVE_ALL = ["hf_model", "model", "optimizer", "extra"]
"""The first at the last step, the others, from which training can go on, before it."""
DYNAMIC = (
    f"{ACTOR}.use_dynamic_bsz",
    f"{REF}.log_prob_use_dynamic_bsz",
    f"{ROLLOUT}.log_prob_use_dynamic_bsz",
)
MICRO_TOKENS = (
    f"{ACTOR}.ppo_max_token_len_per_gpu",
    f"{REF}.log_prob_max_token_len_per_gpu",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
)
MICRO_SEQUENCES = (
    f"{ACTOR}.ppo_micro_batch_size_per_gpu",
    f"{REF}.log_prob_micro_batch_size_per_gpu",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
)
SHARED_OUT = "largest that divides a worker's part"
LONGEST = "prompt + response"


def _saved(every: int) -> list[str]:
    return SAVE_ALL if every else SAVE_ALL[:1]


def _loaded(every: int) -> list[str]:
    return SAVE_ALL[1:] if every else []


def _checkpoint(prefix: str) -> tuple[Key, ...]:
    return (
        *_computed("0: steps", "trainer.save_freq"),
        Key("trainer.resume_mode", lambda every: "auto" if every else "disable", "0: disable, else auto"),
        Key(f"{prefix}checkpoint.save_contents", _saved, "0: the model alone"),
        Key(f"{prefix}checkpoint.load_contents", _loaded, "0: nothing"),
    )


def _float32(prefix: str) -> tuple[Key, ...]:
    return _computed("float32: fp32", f"{prefix}.model_dtype")


STEPS = _computed("of the cycle", "trainer.total_training_steps", "trainer.total_epochs", "trainer.save_freq")
SEED = (
    "data.seed",
    f"{ACTOR}.data_loader_seed",
    f"{ACTOR}.fsdp_config.seed",
    f"{ROLLOUT}.seed",
)

_RUN = (
    Row("name", rl=("trainer.experiment_name",), sft=("trainer.experiment_name",)),
    Row(
        "seed",
        rl=_computed("with cycle, round and part", *SEED),
        sft=("engine.seed", *_computed("with cycle, round and part", "trainer.seed")),
    ),
    Row(
        "model.path",
        rl=_computed("the cut model's folder", f"{MODEL}.path"),
        sft=_computed("the cut model's folder", "model.path"),
    ),
    Row("model.parent", distill=_computed("the original's folder", f"{TEACHER}.model_path")),
    Row(
        "model.dtype",
        rl=(
            f"{ACTOR}.fsdp_config.dtype",
            f"{REF}.fsdp_config.dtype",
            f"{ROLLOUT}.dtype",
            *_float32(f"{ACTOR}.fsdp_config"),
            *_float32(f"{REF}.fsdp_config"),
        ),
        distill=(f"{TEACHER}.inference.dtype",),
        sft=("engine.dtype", *_float32("engine")),
    ),
    Row(
        "model.attention",
        rl=_computed(
            "what auto comes to", f"{MODEL}.override_config.attn_implementation", f"{MODEL}.use_remove_padding"
        ),
        sft=_computed(
            "what auto comes to",
            "model.override_config.attn_implementation",
            "model.use_remove_padding",
            "data.use_dynamic_bsz",
        ),
    ),
    Row(
        "model.trust_remote_code",
        rl=("data.trust_remote_code", f"{MODEL}.trust_remote_code"),
        sft=("model.trust_remote_code",),
    ),
    Row("data.train", rl=_computed("the cycle's subset, prepared", "data.train_files")),
    Row("data.corpus", sft=_computed("the cycle's subset, prepared", "data.train_files")),
    Row("data.validation", rl=_computed("prepared", "data.val_files")),
    Row(
        "data.max_prompt_tokens",
        rl=("data.max_prompt_length", *_computed(LONGEST, f"{ROLLOUT}.max_model_len", *MICRO_TOKENS)),
        distill=_computed(f"{LONGEST} + 1", f"{TEACHER}.inference.max_model_len"),
    ),
    Row(
        "data.max_response_tokens",
        rl=("data.max_response_length", *_computed(LONGEST, f"{ROLLOUT}.max_model_len", *MICRO_TOKENS)),
        distill=_computed(f"{LONGEST} + 1", f"{TEACHER}.inference.max_model_len"),
    ),
    Row("calibration.source", rl=_computed("a folder unless corpus", "trainer.rollout_data_dir")),
    Row("reward.path", rl=_computed("absolute", f"{REWARD}.user_path")),
    Row("reward.name", rl=(f"{REWARD}.user_name",)),
    Row("reward.accuracy_weight", rl=_computed("without reward.path", f"{REWARD}.accuracy_weight")),
    Row("reward.format_weight", rl=_computed("without reward.path", f"{REWARD}.format_weight")),
    Row("reward.format_style", rl=_computed("without reward.path", f"{REWARD}.format_style")),
    Row(
        "resources.device",
        rl=_computed("what auto comes to", "trainer.device"),
        sft=_computed("what auto comes to", "trainer.device"),
    ),
    Row(
        "resources.nodes",
        rl=("trainer.nnodes", *_computed(SHARED_OUT, *MICRO_SEQUENCES)),
        distill=("distillation.nnodes",),
        sft=("trainer.nnodes", *_computed(SHARED_OUT, "data.micro_batch_size_per_gpu")),
    ),
    Row(
        "resources.workers_per_node",
        rl=(
            *_computed("less those of the parent", "trainer.n_gpus_per_node"),
            *_computed(SHARED_OUT, *MICRO_SEQUENCES),
        ),
        sft=("trainer.n_gpus_per_node", *_computed(SHARED_OUT, "data.micro_batch_size_per_gpu")),
    ),
    Row("resources.tensor_parallel_size", rl=(f"{ROLLOUT}.tensor_model_parallel_size",)),
    Row("resources.gpu_memory_utilization", rl=(f"{ROLLOUT}.gpu_memory_utilization",)),
)

_EVERY_RECOVERY = (
    Row("recovery.steps", rl=STEPS, sft=STEPS),
    Row("recovery.learning_rate", rl=(f"{ACTOR}.optim.lr",), sft=("optim.lr",)),
    Row("recovery.learning_rate_schedule", rl=(f"{ACTOR}.optim.lr_scheduler_type",), sft=("optim.lr_scheduler_type",)),
    Row(
        "recovery.warmup_steps",
        rl=(f"{ACTOR}.optim.lr_warmup_steps",),
        sft=_computed("-1 with warmup_ratio", "optim.lr_warmup_steps"),
    ),
    Row("recovery.weight_decay", rl=(f"{ACTOR}.optim.weight_decay",), sft=("optim.weight_decay",)),
    Row(
        "recovery.gradient_checkpointing",
        rl=(f"{MODEL}.enable_gradient_checkpointing",),
        sft=("model.enable_gradient_checkpointing",),
    ),
    Row(
        "recovery.offload",
        rl=(
            f"{ACTOR}.fsdp_config.param_offload",
            f"{ACTOR}.fsdp_config.optimizer_offload",
            f"{REF}.fsdp_config.param_offload",
        ),
        sft=("engine.param_offload", "engine.optimizer_offload"),
    ),
    Row("recovery.save_every_steps", rl=_checkpoint(f"{ACTOR}."), sft=_checkpoint("")),
)

_RL = (
    Row(
        "recovery.prompts_per_step",
        rl=(
            "data.train_batch_size",
            *_computed("without mini_batch_prompts", f"{ACTOR}.ppo_mini_batch_size"),
            *_computed(SHARED_OUT, *MICRO_SEQUENCES),
        ),
    ),
    Row("recovery.rollouts_per_prompt", rl=(f"{ROLLOUT}.n", *_computed(SHARED_OUT, *MICRO_SEQUENCES))),
    Row("recovery.temperature", rl=(f"{ROLLOUT}.temperature",)),
    Row(
        "recovery.kl_loss",
        rl=(Key(f"{ACTOR}.use_kl_loss", lambda weight: weight > 0, "whether above 0"), f"{ACTOR}.kl_loss_coef"),
    ),
    Row("recovery.clip_low", rl=(f"{ACTOR}.clip_ratio", f"{ACTOR}.clip_ratio_low")),
    Row("recovery.clip_high", rl=(f"{ACTOR}.clip_ratio_high",)),
    Row(
        "recovery.mini_batch_prompts",
        rl=(
            *_computed("null: prompts_per_step", f"{ACTOR}.ppo_mini_batch_size"),
            *_computed(SHARED_OUT, *MICRO_SEQUENCES),
        ),
    ),
    Row(
        "recovery.micro_batch_sequences",
        rl=(*_computed(SHARED_OUT, *MICRO_SEQUENCES), *_computed(f"times {LONGEST}", *MICRO_TOKENS)),
    ),
    Row("recovery.dynamic_batches", rl=_computed("null: with flash attention", *DYNAMIC)),
    Row("recovery.validate_before", rl=("trainer.val_before_train",)),
)

_CPT = (
    Row(
        "recovery.warmup_ratio",
        sft=(
            Key("optim.lr_warmup_steps_ratio", lambda ratio: ratio or 0.0, "null: 0"),
            *_computed("-1 unless null", "optim.lr_warmup_steps"),
        ),
    ),
    Row(
        "recovery.sequences_per_step",
        sft=(
            *_computed("without tokens_per_step", "data.train_batch_size"),
            *_computed(SHARED_OUT, "data.micro_batch_size_per_gpu"),
        ),
    ),
    Row("recovery.tokens_per_step", sft=_computed("by mean length", "data.train_batch_size")),
    Row(
        "recovery.max_tokens",
        sft=("data.max_length", *_computed("micro_batch_tokens / max_tokens", "data.micro_batch_size_per_gpu")),
    ),
    Row(
        "recovery.micro_batch_tokens",
        sft=(
            "data.max_token_len_per_gpu",
            *_computed("micro_batch_tokens / max_tokens", "data.micro_batch_size_per_gpu"),
        ),
    ),
    Row("recovery.reshard_after_forward", sft=("engine.reshard_after_forward",)),
)

_DISTILL = (
    Row(
        "recovery.loss",
        distill=(f"{LOSS}.loss_mode", Key(f"{LOSS}.use_policy_gradient", lambda loss: loss == "k1", "whether k1")),
    ),
    Row("recovery.topk", distill=(f"{LOSS}.topk",)),
    Row("recovery.rewards", distill=(f"{LOSS}.use_task_rewards",)),
    Row("recovery.distillation_weight", distill=(f"{LOSS}.distillation_loss_coef",)),
    Row(
        "recovery.teacher_workers_per_node",
        distill=(
            "distillation.n_gpus_per_node",
            *_computed("workers_per_node less these, on GPUs", "trainer.n_gpus_per_node"),
            *_computed(SHARED_OUT, *MICRO_SEQUENCES),
        ),
    ),
    Row(
        "recovery.teacher_tensor_parallel_size",
        distill=(f"{TEACHER}.inference.tensor_model_parallel_size",),
    ),
)

TABLE = (*_RUN, *_EVERY_RECOVERY, *_RL, *_CPT, *_DISTILL)


def trainers_of(recovery: AnyRecovery) -> tuple[Trainer, ...]:
    """The columns of the table that a recovery is rendered from."""
    if isinstance(recovery, CptConfig):
        return ("sft",)
    return ("rl", "distill") if isinstance(recovery, DistillConfig) else ("rl",)


def value_of(field: str, config: RunConfig, recovery: AnyRecovery) -> Any:
    """What the recipe says of a row's field."""
    section, *rest = field.split(".")
    value: Any = recovery if section == "recovery" else getattr(config, section)
    for name in rest:
        value = getattr(value, name)
    return value


def settings_of(config: RunConfig, recovery: AnyRecovery) -> dict[str, Any]:
    """verl's settings, dotted key to value, that each follow from one field."""
    return {
        key.name: key.convert(value_of(row.field, config, recovery))
        for row in TABLE
        for trainer in trainers_of(recovery)
        for key in row.keys(trainer)
        if key.convert is not None
    }
