"""Which of verl's keys each field of a recipe ends in: the one table that is rendered from and documented from.

``recovery/verl_config.py`` and ``recovery/sft_config.py`` take from it every key that one field alone decides. What is
computed from several fields, the device or the cycle is code there; the table names those keys as well, so that
``docs/configuration.md`` can say where a field goes. Imports neither torch nor ray.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ptl_rl.config.recovery import AFTER_CUTS, AnyRecovery, CptConfig, DistillConfig
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


def _computed(note: str, *names: str) -> list[Key]:
    return [Key(name, None, note) for name in names]


Keys = Sequence[Key | str]
"""A plain name is a key that takes the field's value as it is."""


@dataclass(frozen=True)
class Row:
    """A field of :class:`RunConfig`, dotted; ``recovery.X`` is the field X of each method that has it."""

    field: str

    def keys(self, trainer: Trainer) -> list[Key]:
        return [Key(key) if isinstance(key, str) else key for key in KEYS[trainer].get(self.field, [])]


ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
PARENT = "actor_rollout_ref.ptl_rl_parent"
"""Not verl's: our worker takes the reference policy from this folder."""
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


def _saved(every: int) -> list[str]:
    return SAVE_ALL if every else SAVE_ALL[:1]


def _loaded(every: int) -> list[str]:
    return SAVE_ALL[1:] if every else []


def _schedule(name: str) -> str:
    return "cosine" if name == AFTER_CUTS else name


SCHEDULE_NOTE = f"{AFTER_CUTS}: constant in verl, and multiplied in its worker"


def _checkpoint(prefix: str) -> Keys:
    return [
        *_computed("0: steps", "trainer.save_freq"),
        Key("trainer.resume_mode", lambda every: "auto" if every else "disable", "0: disable, else auto"),
        Key(f"{prefix}checkpoint.save_contents", _saved, "0: the model alone"),
        Key(f"{prefix}checkpoint.load_contents", _loaded, "0: nothing"),
    ]


STEPS = _computed("of the cycle", "trainer.total_training_steps", "trainer.total_epochs", "trainer.save_freq")
SEED = ("data.seed", f"{ACTOR}.data_loader_seed", f"{ACTOR}.fsdp_config.seed", f"{ROLLOUT}.seed")
_SHARED = _computed("largest that divides a worker's part", *MICRO_SEQUENCES)
_SHARED_SFT = _computed("largest that divides a worker's part", "data.micro_batch_size_per_gpu")
_FILLED_SFT = _computed("micro_batch_tokens / max_tokens", "data.micro_batch_size_per_gpu")
_LENGTHS = _computed("prompt + response", f"{ROLLOUT}.max_model_len", *MICRO_TOKENS)
_TEACHER_LENGTH = _computed("prompt + response + 1", f"{TEACHER}.inference.max_model_len")
_DEVICE = _computed("what auto comes to", "trainer.device")

_RL: dict[str, Keys] = {
    "name": ["trainer.experiment_name"],
    "seed": _computed("with cycle, round and part", *SEED),
    "model.path": _computed("the cut model's folder", f"{MODEL}.path"),
    "model.dtype": [
        *(f"{part}.dtype" for part in (f"{ACTOR}.fsdp_config", f"{REF}.fsdp_config", ROLLOUT)),
        *_computed("float32: fp32", f"{ACTOR}.fsdp_config.model_dtype", f"{REF}.fsdp_config.model_dtype"),
    ],
    "model.attention": _computed(
        "what auto comes to", f"{MODEL}.override_config.attn_implementation", f"{MODEL}.use_remove_padding"
    ),
    "model.trust_remote_code": ["data.trust_remote_code", f"{MODEL}.trust_remote_code"],
    "data.train": _computed("the cycle's subset, prepared", "data.train_files"),
    "data.validation": _computed("prepared", "data.val_files"),
    "data.max_prompt_tokens": ["data.max_prompt_length", *_LENGTHS],
    "data.max_response_tokens": ["data.max_response_length", *_LENGTHS],
    "calibration.source": _computed("a folder unless corpus", "trainer.rollout_data_dir"),
    "reward.path": _computed("absolute", f"{REWARD}.user_path"),
    "reward.name": [f"{REWARD}.user_name"],
    "reward.call_seconds": [f"{REWARD}.user_seconds"],
    "reward.accuracy_weight": _computed("without reward.path", f"{REWARD}.accuracy_weight"),
    "reward.format_weight": _computed("without reward.path", f"{REWARD}.format_weight"),
    "reward.format_style": _computed("without reward.path", f"{REWARD}.format_style"),
    "resources.device": _DEVICE,
    "resources.nodes": ["trainer.nnodes", *_SHARED],
    "resources.workers_per_node": [*_computed("less those of the parent", "trainer.n_gpus_per_node"), *_SHARED],
    "resources.tensor_parallel_size": [f"{ROLLOUT}.tensor_model_parallel_size"],
    "resources.gpu_memory_utilization": [f"{ROLLOUT}.gpu_memory_utilization"],
    "recovery.steps": STEPS,
    "recovery.learning_rate": [f"{ACTOR}.optim.lr"],
    "recovery.learning_rate_schedule": [Key(f"{ACTOR}.optim.lr_scheduler_type", _schedule, SCHEDULE_NOTE)],
    "recovery.warmup_steps": [f"{ACTOR}.optim.lr_warmup_steps"],
    "recovery.weight_decay": [f"{ACTOR}.optim.weight_decay"],
    "recovery.gradient_checkpointing": [f"{MODEL}.enable_gradient_checkpointing"],
    "recovery.offload": [
        f"{ACTOR}.fsdp_config.param_offload",
        f"{ACTOR}.fsdp_config.optimizer_offload",
        f"{REF}.fsdp_config.param_offload",
    ],
    "recovery.save_every_steps": _checkpoint(f"{ACTOR}."),
    "recovery.prompts_per_step": [
        "data.train_batch_size",
        *_computed("without mini_batch_prompts", f"{ACTOR}.ppo_mini_batch_size"),
        *_SHARED,
    ],
    "recovery.rollouts_per_prompt": [f"{ROLLOUT}.n", *_SHARED],
    "recovery.temperature": [f"{ROLLOUT}.temperature"],
    "recovery.kl_loss": [
        Key(f"{ACTOR}.use_kl_loss", lambda weight: weight > 0, "whether above 0"),
        f"{ACTOR}.kl_loss_coef",
    ],
    "recovery.kl_to": _computed("parent: its folder", PARENT),
    "recovery.clip_low": [f"{ACTOR}.clip_ratio", f"{ACTOR}.clip_ratio_low"],
    "recovery.clip_high": [f"{ACTOR}.clip_ratio_high"],
    "recovery.mini_batch_prompts": [
        *_computed("null: prompts_per_step", f"{ACTOR}.ppo_mini_batch_size"),
        *_SHARED,
    ],
    "recovery.micro_batch_sequences": [*_SHARED, *_computed("times prompt + response", *MICRO_TOKENS)],
    "recovery.dynamic_batches": _computed("null: with flash attention", *DYNAMIC),
    "recovery.validate_before": ["trainer.val_before_train"],
}
_DISTILL: dict[str, Keys] = {
    "model.parent": _computed("the original's folder", f"{TEACHER}.model_path"),
    "model.dtype": [f"{TEACHER}.inference.dtype"],
    "data.max_prompt_tokens": _TEACHER_LENGTH,
    "data.max_response_tokens": _TEACHER_LENGTH,
    "resources.nodes": ["distillation.nnodes"],
    "recovery.loss": [
        f"{LOSS}.loss_mode",
        Key(f"{LOSS}.use_policy_gradient", lambda loss: loss == "k1", "whether k1"),
    ],
    "recovery.topk": [f"{LOSS}.topk"],
    "recovery.rewards": [f"{LOSS}.use_task_rewards"],
    "recovery.distillation_weight": [f"{LOSS}.distillation_loss_coef"],
    "recovery.teacher_workers_per_node": [
        "distillation.n_gpus_per_node",
        *_computed("workers_per_node less these, on GPUs", "trainer.n_gpus_per_node"),
        *_SHARED,
    ],
    "recovery.teacher_tensor_parallel_size": [f"{TEACHER}.inference.tensor_model_parallel_size"],
}
_SFT: dict[str, Keys] = {
    "name": ["trainer.experiment_name"],
    "seed": ["engine.seed", *_computed("with cycle, round and part", "trainer.seed")],
    "model.path": _computed("the cut model's folder", "model.path"),
    "model.dtype": ["engine.dtype", *_computed("float32: fp32", "engine.model_dtype")],
    "model.attention": [
        *_computed("what auto comes to", "model.override_config.attn_implementation", "model.use_remove_padding"),
        *_computed("what auto comes to", "data.use_dynamic_bsz"),
    ],
    "model.trust_remote_code": ["model.trust_remote_code"],
    "data.corpus": _computed("the cycle's subset, prepared", "data.train_files"),
    "resources.device": _DEVICE,
    "resources.nodes": ["trainer.nnodes", *_SHARED_SFT],
    "resources.workers_per_node": ["trainer.n_gpus_per_node", *_SHARED_SFT],
    "recovery.steps": STEPS,
    "recovery.learning_rate": ["optim.lr"],
    "recovery.learning_rate_schedule": [Key("optim.lr_scheduler_type", _schedule, SCHEDULE_NOTE)],
    "recovery.warmup_steps": _computed("-1 with warmup_ratio", "optim.lr_warmup_steps"),
    "recovery.weight_decay": ["optim.weight_decay"],
    "recovery.gradient_checkpointing": ["model.enable_gradient_checkpointing"],
    "recovery.offload": ["engine.param_offload", "engine.optimizer_offload"],
    "recovery.save_every_steps": _checkpoint(""),
    "recovery.warmup_ratio": [
        Key("optim.lr_warmup_steps_ratio", lambda ratio: ratio or 0.0, "null: 0"),
        *_computed("-1 unless null", "optim.lr_warmup_steps"),
    ],
    "recovery.sequences_per_step": [*_computed("without tokens_per_step", "data.train_batch_size"), *_SHARED_SFT],
    "recovery.tokens_per_step": _computed("by mean length", "data.train_batch_size"),
    "recovery.max_tokens": ["data.max_length", *_FILLED_SFT],
    "recovery.micro_batch_tokens": ["data.max_token_len_per_gpu", *_FILLED_SFT],
    "recovery.reshard_after_forward": ["engine.reshard_after_forward"],
}
KEYS: dict[Trainer, dict[str, Keys]] = {"rl": _RL, "distill": _DISTILL, "sft": _SFT}
"""By trainer and field."""
TABLE = tuple(Row(field) for field in dict.fromkeys([*_RL, *_DISTILL, *_SFT]))


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
