"""What a run is: the sections of a recipe, put together and checked against one another."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ptl_rl.config.data import TESTBED, DataConfig, EvaluationSet, SourceConfig
from ptl_rl.config.pruning import CalibrationConfig, CriterionConfig, ScheduleConfig, check_gradients
from ptl_rl.config.recovery import AFTER_CUTS, AnyRecovery, DistillConfig, GrpoConfig, recovery_entry
from ptl_rl.config.reward import RewardConfig
from ptl_rl.config.section import FILTER, TRAINER_MODE, Section, VerlKeys

BOX_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


class ModelConfig(Section):
    path: str = Field(
        "testbed", description="Hugging Face folder, hub id, or a shipped model: 'testbed', 'testbed:llama'."
    )
    parent: str | None = Field(
        None,
        description="The unpruned model, where path is one that is cut already: what distillation and parent_kl learn "
        "from. Default: path.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Type of forward passes and rollouts.")
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto",
        description="Attention of scoring and training. auto: flash_attention_2 where it can be had, else sdpa (eager "
        "where the model caps its attention logits) on padded rows.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")


class EvaluationConfig(Section):
    judge: Literal["boxed", "reward"] = Field(
        "boxed", description="Right is a boxed answer that equals the known one, or what reward.path says ('acc')."
    )
    max_response_tokens: int | None = Field(
        None, ge=1, description="Longest response in an evaluation, in tokens; default: data.max_response_tokens."
    )
    batch_size: int = Field(128, ge=1, description="Concurrent sequences in vLLM.")
    after_cut: bool = Field(
        False,
        description="Answer the test problems with the cut model, too, before it was recovered: what the cut cost and "
        "recovery won back, on the same problems. In place it is the model right after its last cut.",
    )


class GateConfig(Section):
    """What happens when a cycle's accuracy falls below ``min_accuracy_ratio`` of the starting model's."""

    min_accuracy_ratio: float = Field(
        0.95,
        ge=0,
        le=1,
        description="Least accuracy of a cycle, as a share of the starting model's, which ends the run if 0; with "
        "0 here nothing is judged.",
    )
    max_extensions: int = Field(1, ge=0, description="Further rounds of recovery per cycle, before a retry.")
    max_retries: int = Field(0, ge=0, description="Cycles taken back and tried again with half the cut, per run.")
    on_failure: Literal["continue", "stop"] = Field(
        "continue", description="What follows when all of these are used up."
    )


class ResourcesConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there are usable GPUs.")
    nodes: int = Field(1, ge=1, description="Machines of the Ray cluster that train.")
    workers_per_node: int = Field(1, ge=1, description="GPUs per node; on CPU, worker processes.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one vLLM engine.")
    gpu_memory_utilization: float = Field(0.6, gt=0, lt=1, description="vLLM's share of a GPU during rollouts.")
    gpu: str | None = Field(
        None, description="What ptl plan counts with: h200, h100, a100-80, ...; changes nothing else."
    )
    ray_cpus: int = Field(
        64, ge=16, description="Logical CPUs of a Ray that the run starts; more are taken where verl reserves more."
    )

    @model_validator(mode="after")
    def _check(self) -> "ResourcesConfig":
        if self.workers % self.tensor_parallel_size:
            raise ValueError(
                f"{self.nodes} nodes x {self.workers_per_node} workers_per_node is not a multiple of "
                f"tensor_parallel_size {self.tensor_parallel_size}"
            )
        return self

    @property
    def workers(self) -> int:
        return self.nodes * self.workers_per_node


class WatchdogConfig(Section):
    startup_seconds: int = Field(1800, ge=10, description="A stage without first progress for so many seconds ends.")
    stall_seconds: int = Field(3600, ge=5, description="A stage without further progress for so many seconds ends.")
    attempts: int = Field(2, ge=1, description="Starts of a stage that stalls; one that fails is not started again.")


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="Names the run's folder, picture and reports.")
    seed: int = Field(0, ge=0, description="Seed of everything that is random in a run.")
    model: ModelConfig = Field(ModelConfig(), description="What is compacted.")
    data: DataConfig = Field(DataConfig(), description="What scoring, recovery and evaluation read.")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="What importance is measured on.")
    criterion: CriterionConfig = Field(
        CriterionConfig(), description="How what goes is chosen, and what stays is refit."
    )
    schedule: ScheduleConfig = Field(description="How much goes in each cycle.")
    recovery: list[AnyRecovery] = Field(
        [GrpoConfig()], min_length=1, description="Made one after the other; a single one needs no list."
    )
    recovery_of_cycle: dict[int, list[AnyRecovery]] = Field(
        {}, description="Takes the place of recovery in these planned cycles, from 1."
    )
    recovery_if_unlearnable: list[AnyRecovery] = Field(
        [],
        description="Made once in a cycle whose recovery ended as rewards taught nothing (min_learnable_fraction), "
        "where the gate finds too little accuracy; it comes before further rounds and retries.",
    )
    reward: RewardConfig = Field(RewardConfig(), description="What RL is paid for.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="How a cycle's accuracy is measured.")
    gate: GateConfig = Field(GateConfig(), description="What follows when a cycle loses too much accuracy.")
    resources: ResourcesConfig = Field(ResourcesConfig(), description="Machines, GPUs and their memory.")
    watchdog: WatchdogConfig = Field(WatchdogConfig(), description="When a stage counts as hanging.")
    verl: VerlKeys = Field({}, description="verl keys, dotted, verbatim, for all its RL trainers (not cpt).")

    @field_validator("recovery", "recovery_if_unlearnable", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [] if value is None else [value]
        return [recovery_entry(entry) for entry in entries]

    @field_validator("recovery_of_cycle", mode="before")
    @classmethod
    def _as_lists(cls, value: Any) -> Any:
        return {cycle: cls._as_list(entry) for cycle, entry in value.items()} if isinstance(value, dict) else value

    def recoveries(self, planned: int, unlearnable: bool = False) -> list[AnyRecovery]:
        """What follows the ``planned``-th cut, from 0; ``unlearnable``: once rewards have taught nothing there."""
        if unlearnable:
            return self.recovery_if_unlearnable
        return self.recovery_of_cycle.get(planned + 1, self.recovery)

    @property
    def planned_recoveries(self) -> list[AnyRecovery]:
        """Every recovery that follows a cut in any case."""
        return [*self.recovery, *(entry for entries in self.recovery_of_cycle.values() for entry in entries)]

    @property
    def all_recoveries(self) -> list[AnyRecovery]:
        """Every recovery that the recipe names."""
        return [*self.planned_recoveries, *self.recovery_if_unlearnable]

    @property
    def needs_answers(self) -> bool:
        """Whether training prompts are answered and judged, as in every kind of RL."""
        return any(recovery.needs_answers for recovery in self.all_recoveries)

    @property
    def is_of_the_test_bed(self) -> bool:
        """Whether the model is one that is shipped."""
        return self.model.path.partition(":")[0] == TESTBED.removesuffix(":")

    def evaluation_set(self, name: EvaluationSet) -> SourceConfig | None:
        """The source of an evaluation set; None: its rows are held out of what the run learns from."""
        return self.data.evaluation_set(name, self.needs_answers)

    @property
    def prompt_suffix(self) -> str:
        """What follows every question: ``data.prompt_suffix``, or what judging by boxes needs where it is not set."""
        if self.data.prompt_suffix is not None:
            return self.data.prompt_suffix
        test = self.evaluation_set("test")
        return "" if (test is not None and test.is_made) or self.evaluation.judge != "boxed" else BOX_SUFFIX

    def _verl_keys(self) -> dict[str, Any]:
        """Of verl, that the recipe sets itself."""
        return {**self.verl, **{key: value for entry in self.all_recoveries for key, value in entry.verl.items()}}

    def _settle_mode(self) -> None:
        """Put a mode in the place of ``auto``."""
        found = self.schedule.model_dump()
        asked = "rematerialise" in self.schedule.model_fields_set
        when = self.schedule.rematerialise if asked else "when_it_pays"
        try:
            object.__setattr__(
                self, "schedule", ScheduleConfig(**(found | {"mode": "in_place", "rematerialise": when}))
            )
            self._check_in_place()
            possible = not self.gate.max_retries
        except ValueError:
            possible = False
        if not possible and found["pace"] != "governed":  # whose own error says what is in its way
            object.__setattr__(
                self, "schedule", ScheduleConfig(**(found | {"mode": "restart", "rematerialise": "never"}))
            )

    def _check_in_place(self) -> None:
        what, keys = None, {**self.verl, **self.recovery[0].verl}
        if self.recovery_of_cycle:
            what = "has one training, but recovery_of_cycle names several"
        elif len(self.recovery) != 1:
            methods = ", ".join(recovery.method for recovery in self.recovery)
            what = f"cuts within one recovery, but recovery is {methods}"
        elif self.schedule.pace == "governed" and not isinstance(self.recovery[0], GrpoConfig):
            what = f"with pace governed judges by the policy's own answers, but recovery is {self.recovery[0].method}"
        elif self.schedule.pace == "governed" and self.recovery[0].learning_rate_schedule == AFTER_CUTS:
            what = "with pace governed does not know its last cut; set recovery.learning_rate_schedule to constant"
        elif self.schedule.pace == "governed" and isinstance(self.recovery[0].steps, list):
            what = "with pace governed has one number of steps, all that it may make, but recovery.steps is a list"
        elif self.schedule.pace == "governed" and self.calibration.source == "rollouts" and self.recovery[0].steps == 1:
            what = "with pace governed makes its first cut by rollouts, after a step; set recovery.steps to 2 or more"
        elif self.schedule.pace == "governed" and self.criterion.threshold is not None:
            what = "with pace governed has max_damage for what may go; set criterion.threshold to null"
        elif parallel := [k for k, v in keys.items() if "ulysses_sequence_parallel" in k and v != 1]:
            what = f"scores whole sequences on every rank; leave {parallel[0]} at 1"
        elif TRAINER_MODE in keys:
            what = f"has a trainer of its own; leave verl's {TRAINER_MODE} alone"
        elif self.criterion.is_ptl_reference:
            what = "cannot cut by ptl_reference, which ranks channels among all, also those that are gone"
        elif self.recovery[0].learning_rate_schedule == AFTER_CUTS and (
            own := [k for k in keys if k.endswith(("optim.lr_scheduler_type", "optim.min_lr_ratio"))]
        ):
            what = f"lets the learning rate fall itself with {AFTER_CUTS}; leave verl's {own[0]} alone"
        if what:
            raise ValueError(f"schedule.mode in_place {what}")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        for recovery in self.all_recoveries:
            workers = self.resources.workers
            if isinstance(recovery, DistillConfig) and self.resources.device != "cpu":
                per_node = self.resources.workers_per_node - recovery.teacher_workers_per_node
                if per_node < 1 and self.resources.device == "cuda":
                    raise ValueError(
                        f"recovery.teacher_workers_per_node {recovery.teacher_workers_per_node} leaves none of "
                        f"{self.resources.workers_per_node} workers_per_node to train"
                    )
                workers = self.resources.nodes * max(1, per_node)
            if isinstance(recovery, GrpoConfig):
                batch, what = (
                    recovery.prompts_per_step * recovery.rollouts_per_prompt,
                    "prompts_per_step x rollouts_per_prompt",
                )
            else:
                batch, what = recovery.sequences_per_step, "sequences_per_step"
            if batch % workers:
                raise ValueError(f"recovery.{what} = {batch} sequences cannot be shared equally by {workers} workers")
        check_gradients(self.criterion, self.calibration)
        if self.calibration.source != "corpus" and not any(entry.needs_answers for entry in self.planned_recoveries):
            raise ValueError(
                f"calibration.source is {self.calibration.source}, but no recovery is grpo, which alone has rollouts"
            )
        if self.schedule.mode == "auto":
            self._settle_mode()
        if self.schedule.mode == "in_place":
            self._check_in_place()
        elif any(recovery.learning_rate_schedule == AFTER_CUTS for recovery in self.planned_recoveries):
            raise ValueError(
                f"recovery.learning_rate_schedule {AFTER_CUTS} is of a training with several cuts; set schedule.mode "
                "to in_place (auto takes it where gate.max_retries is 0), or use cosine"
            )
        if any(recovery.learning_rate_schedule == AFTER_CUTS for recovery in self.recovery_if_unlearnable):
            raise ValueError(
                f"recovery_if_unlearnable: learning_rate_schedule {AFTER_CUTS} is of a training with several cuts; use "
                "cosine"
            )
        watched = [entry for entry in self.all_recoveries if isinstance(entry, GrpoConfig) and entry.is_watched]
        filtered = any({**self.verl, **entry.verl}.get(FILTER) for entry in watched)
        if self.recovery_if_unlearnable and not any(entry in watched for entry in self.planned_recoveries):
            raise ValueError(
                "recovery_if_unlearnable waits for a recovery that ends as rewards teach nothing; set its "
                "min_learnable_fraction"
            )
        if self.recovery_if_unlearnable and not self.gate.min_accuracy_ratio:
            raise ValueError(
                "recovery_if_unlearnable follows where the gate finds too little accuracy, but gate.min_accuracy_ratio "
                "is 0; raise it"
            )
        if watched and TRAINER_MODE in self._verl_keys():
            raise ValueError(
                f"recovery.min_learnable_fraction needs this project's own trainer, but verl's {TRAINER_MODE} names "
                "another; leave one of them out"
            )
        if TRAINER_MODE in self._verl_keys() and any(
            isinstance(entry, GrpoConfig) and entry.kl_to == "parent" for entry in self.all_recoveries
        ):
            raise ValueError(
                f"recovery.kl_to parent needs this project's own trainer, but verl's {TRAINER_MODE} names another; "
                "leave one of them out"
            )
        if filtered:
            raise ValueError(
                f"recovery.min_learnable_fraction would see only prompts that verl's {FILTER} has left; leave one of "
                "them out"
            )
        ids, total = self.criterion.layer_ids, self.schedule.layers_total
        if ids and len(ids) != total and not self.schedule.recover_only:
            raise ValueError(f"criterion.layer_ids names {len(ids)} blocks, but schedule.layers_total is {total}")
        self.data.check_prompts(train=self.needs_answers)
        return self
