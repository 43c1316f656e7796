"""What a recipe may say of its recoveries."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ptl_rl.config.section import Section, VerlKeys

AFTER_CUTS = "cosine_after_cuts"
"""Learning-rate schedule of a training in place."""


class RecoveryConfig(Section):
    """What every way of recovery has."""

    steps: int | list[int] = Field(8, description="Optimizer steps per cycle, or a list with one number per cycle.")
    learning_rate: float = Field(1e-6, gt=0, description="Learning rate of AdamW, after the warm-up.")
    learning_rate_schedule: Literal["constant", "cosine", "cosine_after_cuts"] = Field(
        "constant",
        description="How the learning rate goes on after the warm-up; cosine: to 0 in half a cosine; "
        "cosine_after_cuts, with schedule.mode in_place only: so after the last cut, and constant until then.",
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps in which the learning rate rises from 0.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    gradient_checkpointing: bool = Field(
        True, description="Compute activations again in the backward pass, which saves memory and costs time."
    )
    offload: bool = Field(False, description="Keep parameters and optimizer in host memory when not in use.")
    save_every_steps: int = Field(
        0, ge=0, description="Optimizer steps between checkpoints of verl within a recovery; 0: at its end only."
    )
    verl: VerlKeys = Field({}, description="verl keys, dotted, verbatim; they win over everything rendered.")

    @model_validator(mode="after")
    def _check_steps(self) -> "RecoveryConfig":
        steps = self.steps if isinstance(self.steps, list) else [self.steps]
        if not steps or any(step < 1 for step in steps):
            raise ValueError(f"steps {self.steps}: each cycle needs at least 1")
        return self

    @property
    def needs_answers(self) -> bool:
        """Whether the policy answers prompts and is judged by the known answers; so also whether there are rollouts."""
        return True

    def steps_of(self, cut: int) -> int:
        """Steps of the ``cut``-th planned cut (from 0); the last number of a list serves all later ones."""
        return self.steps if isinstance(self.steps, int) else self.steps[min(cut, len(self.steps) - 1)]


class GrpoConfig(RecoveryConfig):
    """RL from rewards with verl's GRPO trainer and vLLM rollouts."""

    method: Literal["grpo"] = Field("grpo", description="The name of the entry, as in `- grpo: {...}`.")
    prompts_per_step: int = Field(128, ge=1, description="Prompts of an optimizer step, on all workers together.")
    rollouts_per_prompt: int = Field(8, ge=2, description="Responses to a prompt; the group size of GRPO.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of rollouts.")
    kl_loss: float = Field(0.01, ge=0, description="Weight of the low-variance KL loss to kl_to; 0: off.")
    kl_to: Literal["start", "parent"] = Field(
        "start",
        description="What kl_loss holds the policy to: what the recovery starts from, or the unpruned parent.",
    )
    clip_low: float = Field(
        0.2, gt=0, lt=1, description="The policy's probability ratio is clipped at 1 less this, from below."
    )
    clip_high: float = Field(
        0.3, gt=0, description="The policy's probability ratio is clipped at 1 plus this, from above."
    )
    mini_batch_prompts: int | None = Field(None, ge=1, description="Prompts per policy update; default: all.")
    micro_batch_sequences: int = Field(
        4, ge=1, description="Most sequences of full length per backward pass on each worker."
    )
    dynamic_batches: bool | None = Field(
        None,
        description="Fill a backward pass with as many sequences as have together no more tokens than "
        "micro_batch_sequences of full length; default: where they are read without padding (flash attention).",
    )
    min_learnable_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="End where fewer of a step's prompts than this share have answers with different rewards, the only "
        "ones that GRPO learns from, learnable_patience steps in a row; 0: never.",
    )
    learnable_patience: int = Field(8, ge=1, description="Steps in a row below min_learnable_fraction that end it.")
    validate_before: bool = Field(True, description="Measure the sliced model on the validation split first.")

    @property
    def learns_from_groups(self) -> bool:
        """Whether rewards teach by how a prompt's answers differ in them."""
        return True

    @property
    def is_watched(self) -> bool:
        """Whether a training may end before its last step."""
        return self.min_learnable_fraction > 0

    @model_validator(mode="after")
    def _check(self) -> "GrpoConfig":
        if self.kl_to == "parent" and not self.kl_loss:
            raise ValueError("kl_to is parent, but kl_loss is 0, so nothing holds the policy to it; set kl_loss")
        mini = self.mini_batch_prompts
        if mini and self.prompts_per_step % mini:
            raise ValueError(f"prompts_per_step {self.prompts_per_step} is not a multiple of mini_batch_prompts {mini}")
        return self


class CptConfig(RecoveryConfig):
    """Continued pre-training on worked solutions or plain text with verl's SFT trainer."""

    method: Literal["cpt"] = Field("cpt", description="The name of the entry, as in `- cpt: {...}`.")
    learning_rate: float = Field(5e-6, gt=0, description="Learning rate of AdamW, after the warm-up.")
    learning_rate_schedule: Literal["constant", "cosine", "cosine_after_cuts"] = Field(
        "cosine",
        description="How the learning rate goes on after the warm-up; cosine: to 0; cosine_after_cuts, with "
        "schedule.mode in_place only: so after the last cut, and constant until then.",
    )
    warmup_ratio: float | None = Field(
        0.05, ge=0, lt=1, description="Warm-up as a share of the steps; null: warmup_steps."
    )
    loss: Literal["all", "response"] = Field(
        "all", description="Tokens that count: question and solution, or the latter."
    )
    sequences_per_step: int = Field(
        32, ge=1, description="Sequences of an optimizer step, on all workers together; a longer text is several."
    )
    tokens_per_step: int | None = Field(
        None, ge=1, description="Tokens of an optimizer step, on average; takes the place of sequences_per_step."
    )
    max_tokens: int = Field(
        4096, ge=8, description="Longest sequence, in tokens; a longer solution is cut, a longer text becomes several."
    )
    micro_batch_tokens: int = Field(
        16384, ge=8, description="Tokens per backward pass on each worker: as many whole sequences as fit."
    )
    parent_kl: float = Field(
        0.0, ge=0, description="Weight of KL(unpruned parent || policy) at every token; loads the parent, sharded, too."
    )
    cross_entropy: float = Field(1.0, ge=0, description="Weight of the data's own tokens beside parent_kl.")
    reshard_after_forward: bool = Field(
        True, description="Free gathered parameters between forward and backward pass (as ZeRO-3); false: as ZeRO-2."
    )

    @property
    def needs_answers(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check(self) -> "CptConfig":
        if not self.parent_kl and not self.cross_entropy:
            raise ValueError("parent_kl and cross_entropy are both 0: there is nothing to learn")
        if self.micro_batch_tokens < self.max_tokens:
            raise ValueError(
                f"micro_batch_tokens {self.micro_batch_tokens} cannot hold a sequence of max_tokens {self.max_tokens}"
            )
        return self


class DistillConfig(GrpoConfig):
    """On-policy distillation: the sliced policy answers, and learns what the unpruned parent would have said there.

    The parent is served by vLLM on GPUs of its own.
    """

    method: Literal["distill"] = Field(  # type: ignore[assignment]
        "distill", description="The name of the entry, as in `- distill: {...}`."
    )
    rollouts_per_prompt: int = Field(1, ge=1, description="Responses to a prompt.")
    kl_loss: float = Field(0.0, ge=0, description="Weight of the low-variance KL loss to kl_to; 0: off.")
    loss: Literal["forward_kl_topk", "k1"] = Field(
        "forward_kl_topk",
        description="KL over the parent's topk tokens, or (k1) the parent's log-probability as a reward of each token.",
    )
    topk: int = Field(32, ge=1, description="Tokens at each place that forward_kl_topk compares.")
    rewards: bool = Field(False, description="Also learn from the reward function, as GRPO does.")
    distillation_weight: float = Field(1.0, gt=0, description="Weight of the distillation loss beside that of rewards.")
    teacher_workers_per_node: int = Field(
        1, ge=1, description="GPUs per node for the parent, taken from resources.workers_per_node; extra on CPU."
    )
    teacher_tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one vLLM engine of the parent.")

    @property
    def learns_from_groups(self) -> bool:
        return self.rewards

    @model_validator(mode="after")
    def _check_rollouts(self) -> "DistillConfig":
        if self.min_learnable_fraction and not self.rewards:
            raise ValueError("min_learnable_fraction watches rewards, which distill learns from with rewards: true")
        if self.rewards and self.rollouts_per_prompt < 2:
            raise ValueError("rewards compares the responses to one prompt; set rollouts_per_prompt to 2 or more")
        if self.teacher_workers_per_node % self.teacher_tensor_parallel_size:
            raise ValueError(
                f"teacher_workers_per_node {self.teacher_workers_per_node} is not a multiple of "
                f"teacher_tensor_parallel_size {self.teacher_tensor_parallel_size}"
            )
        return self


AnyRecovery = Annotated[GrpoConfig | CptConfig | DistillConfig, Field(discriminator="method")]
METHODS = ("grpo", "cpt", "distill")


def recovery_entry(entry: Any) -> Any:
    """``{cpt: {...}}`` is short for ``{method: cpt, ...}``; without a method it is GRPO."""
    if not isinstance(entry, dict):
        return entry
    if len(entry) == 1 and next(iter(entry)) in METHODS:
        ((method, settings),) = entry.items()
        return {"method": method, **(settings or {})} if isinstance(settings, dict | None) else entry
    return {"method": "grpo", **entry}


def micro_batch(of_worker: int, most: int) -> int:
    """The largest number of sequences, at most ``most``, by which a worker's part of an update can be shared out."""
    return next(size for size in range(min(of_worker, most), 0, -1) if of_worker % size == 0)
