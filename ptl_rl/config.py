"""What a run is: one typed, validated configuration; ``ptl_rl/recipe.py`` reads it from YAML.

Imports neither torch nor ray, so that ``ptl plan`` and ``ptl --help`` start at once and a bad recipe is refused before
anything heavy begins. verl's own keys appear nowhere here except verbatim under ``verl:``;
``ptl_rl/recovery/verl_config.py`` renders the rest.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from ptl_rl.recovery.settings import AnyRecovery, DistillConfig, GrpoConfig, recovery_entry


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the file, the setting and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    path: str = Field(
        "testbed", description="Hugging Face folder, hub id, or a shipped model: 'testbed', 'testbed:llama'."
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Type of forward passes and rollouts.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False


class FieldMap(_Section):
    """Names of the columns that hold each part of a record."""

    question: str = "question"
    solution: str = "solution"
    answer: str | None = Field("answer", description="null: there is none, for data that no reward is computed on.")
    text: str | None = Field(
        None, description="Column of plain text, for data without questions; the others are not read."
    )


class SourceConfig(_Section):
    path: str = Field(
        description="'testbed:SPLIT', a .jsonl, .parquet or .arrow file, a folder of datasets.save_to_disk, or "
        "'hub:NAME' of a hub data set."
    )
    config: str | None = Field(None, description="Configuration of a hub data set that has several.")
    split: str | None = Field(None, description="Of a hub data set or a saved folder; default: train.")
    rows: int | None = Field(None, ge=1, description="Use the first so many rows (after a seeded shuffle).")
    fields: FieldMap | None = Field(None, description="Default: those of the known corpus, or the names of FieldMap.")
    layout: str | None = Field(
        None, description="Hub name of the known corpus that this is a copy of, to be read as that is."
    )

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if self.fields is not None and self.layout is not None:
            raise ValueError("fields and layout both say how rows are read; set one of them")
        return self


def _one_or_more(value: Any, _handler: Any) -> Any:
    """Not a plain union, whose errors would name both alternatives."""
    if isinstance(value, list):
        if not value:
            raise ValueError("an empty list; name at least one source")
        return TypeAdapter(list[SourceConfig]).validate_python(value)
    return SourceConfig.model_validate(value)


Sources = Annotated[SourceConfig | list[SourceConfig], WrapValidator(_one_or_more)]


class DecontaminateConfig(_Section):
    """When a row of the training data counts as a copy of an evaluation question."""

    ngram: int = Field(13, ge=2, description="Words in a row that are compared; shorter questions are compared whole.")
    min_overlap: float = Field(
        0.1, ge=0, le=1, description="Share of a question's n-grams that a row must hold to be dropped; 0: one."
    )


class DataConfig(_Section):
    train: Sources = Field(
        SourceConfig(path="testbed:rl", rows=4096), description="Problems; one source, or a list that is merged."
    )
    corpus: Sources | None = Field(
        None, description="Worked solutions or text for scoring and continued pre-training; default: train."
    )
    validation: SourceConfig = SourceConfig(path="testbed:validation", rows=128)
    test: SourceConfig = SourceConfig(path="testbed:test", rows=500)
    prompt_suffix: str = Field("", description="Appended to every question, e.g. the instruction to box the answer.")
    max_prompt_tokens: int = Field(128, ge=1)
    max_response_tokens: int = Field(96, ge=1)
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="Share of malformed rows that is dropped.")
    deduplicate: Literal["question", "exact", "off"] = Field(
        "question",
        description="Of train and of corpus, rows with a question that came before go; exact: question and solution.",
    )
    decontaminate: DecontaminateConfig | None = Field(
        DecontaminateConfig(), description="Rows of train and corpus that overlap with validation or test go; or: off."
    )

    @field_validator("deduplicate", "decontaminate", mode="before")
    @classmethod
    def _switch(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a plain ``off`` as false."""
        if value in (False, "off"):
            return "off" if info.field_name == "deduplicate" else None
        return cls.model_fields[str(info.field_name)].default if value in (True, "on") else value

    @property
    def train_sources(self) -> list[SourceConfig]:
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def corpus_sources(self) -> list[SourceConfig]:
        """Those of ``train`` where there is no corpus of its own."""
        if self.corpus is None:
            return self.train_sources
        return self.corpus if isinstance(self.corpus, list) else [self.corpus]

    def check_prompts(self, train: bool) -> None:
        """Raise ValueError for sources of problems that cannot be answered or judged; ``train``: those of train too."""
        named = {"data.validation": self.validation, "data.test": self.test}
        if train and isinstance(self.train, list):
            named |= {f"data.train.{place}": source for place, source in enumerate(self.train)}
        elif train:
            named["data.train"] = self.train_sources[0]
        for name, source in named.items():
            if source.fields is not None and source.fields.text is not None:
                raise ValueError(f"{name}.fields.text: plain text has no questions to be answered")
            if source.fields is not None and source.fields.answer is None:
                raise ValueError(f"{name}.fields.answer: null, but responses are judged by the answer")


class CalibrationConfig(_Section):
    source: Literal["corpus", "rollouts", "both"] = Field(
        "corpus",
        description="Worked solutions of the cycle's subset, the last recovery's rewarded rollouts, half each.",
    )
    sequences: int = Field(256, ge=1, description="Reasoning sequences (question and solution) scored per cycle.")
    max_tokens: int = Field(512, ge=8, description="Longer sequences are cut.")
    batch_size: int = Field(16, ge=1, description="Sequences per forward pass on each rank.")
    token_weights: Literal["uniform", "sensitivity"] = Field(
        "uniform", description="sensitivity: by the gradient that reaches a token; costs a backward pass."
    )
    moments_gib: float | None = Field(
        None,
        gt=0,
        description="Most memory of each worker for the matrices of obs and leave_one_out; little costs more passes.",
    )
    prompt_weight: float = Field(
        0.2,
        ge=0,
        le=1,
        description="How much a question's token counts: 0 response only, 1 all alike; channels if uniform.",
    )


CHANNEL_CRITERIA = (
    "obs",
    "activation",
    "rms_contribution",
    "fluctuation",
    "wanda",
    "taylor",
    "magnitude",
    "random",
    "ptl_reference",
)


class ContrastConfig(_Section):
    """General text whose importance is taken off that for reasoning."""

    data: SourceConfig = Field(description="Plain text: set fields.text to its column.")
    weight: float = Field(0.5, ge=0, description="Importance is taken relative to its block's mean.")
    sequences: int = Field(256, ge=1, description="Texts read per cycle.")


class CriterionConfig(_Section):
    channels: str = Field("obs", description=f"{', '.join(CHANNEL_CRITERIA)}; or a function of criterion.path.")
    path: str | None = Field(None, description="Your Python file with the function criterion.channels.")
    threshold: float | None = Field(
        None, gt=0, description="Only channels below this share of their block's mean importance go; the rest stays."
    )
    contrast: ContrastConfig | None = None
    layers: Literal["block_influence", "cosine", "leave_one_out", "explicit"] = "leave_one_out"
    layer_ids: list[int] = Field(
        [], description="explicit: blocks of the original model, in the order in which they go."
    )
    layer_sequences: int | None = Field(
        None,
        ge=1,
        description="Sequences of a pass for blocks (default: all); leave_one_out judges the best four on all of them.",
    )
    compensate: Literal["none", "least_squares"] = Field(
        "least_squares", description="What stays takes over, in closed form, what goes; channels and blocks."
    )
    ridge: float = Field(
        1e-3, gt=0, description="Of compensation and obs, relative to the mean square activation; holds changes small."
    )
    stream_ridge: float = Field(
        0.5,
        gt=0,
        description="Of what follows the original's residual stream, relative to its median square; little overfits.",
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())  # workers may run elsewhere

    @property
    def is_obs(self) -> bool:
        return self.channels == "obs" and self.path is None

    @property
    def is_ptl_reference(self) -> bool:
        return self.channels == "ptl_reference" and self.path is None

    @model_validator(mode="after")
    def _check(self) -> "CriterionConfig":
        if self.path is None and self.channels not in CHANNEL_CRITERIA:
            close = difflib.get_close_matches(self.channels, CHANNEL_CRITERIA, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(CHANNEL_CRITERIA)}"
            raise ValueError(f"channels {self.channels!r} is no criterion; {hint} (your own: set criterion.path)")
        if self.is_obs:
            for name in ("threshold", "contrast"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs scores that stand alone, but obs gives an order; choose another")
        if self.threshold is not None and self.contrast is not None:
            raise ValueError("threshold is relative to the mean importance, which contrast moves; choose one of them")
        if self.is_ptl_reference and self.contrast is None:
            raise ValueError("channels ptl_reference compares with general text; set contrast.data")
        if (self.layers == "explicit") != bool(self.layer_ids):
            raise ValueError(f"layers is {self.layers} and layer_ids {self.layer_ids}; explicit needs ids, and only it")
        if len(set(self.layer_ids)) != len(self.layer_ids) or min(self.layer_ids, default=0) < 0:
            raise ValueError(f"layer_ids {self.layer_ids} must be different and not negative")
        return self


def _check_gradients(criterion: CriterionConfig, calibration: CalibrationConfig) -> None:
    if criterion.channels == "taylor" and criterion.path is None and calibration.token_weights == "sensitivity":
        raise ValueError("criterion.channels taylor has gradients of its own; set calibration.token_weights to uniform")


class ScheduleConfig(_Section):
    """What is removed, cycle by cycle. Every layer loses the same number of channels."""

    channels_per_cycle: int | list[int] = Field(0, description="Channels each layer loses in a cycle, or one by one.")
    channels_total: int | None = Field(None, ge=0, description="Channels each layer loses in all.")
    layers_per_cycle: int = Field(1, ge=1)
    layers_total: int = Field(0, ge=0)
    order: Literal["channels_then_layers", "layers_then_channels", "alternating", "together"] = Field(
        "channels_then_layers", description="together: a cycle removes channels and blocks in the same cut."
    )
    alignment: int = Field(64, ge=1, description="Kept widths are multiples of this times tensor_parallel_size.")
    recover_only: bool = Field(
        False, description="Cut nothing: one cycle recovers the model as it is, an original or one that is cut already."
    )

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        steps = self.channels_per_cycle
        if self.recover_only:
            if steps or self.channels_total or self.layers_total:
                raise ValueError("recover_only cuts nothing, but channels or layers are set; leave one of them out")
            return self
        if isinstance(steps, list):
            if any(step < 1 for step in steps):
                raise ValueError(f"channels_per_cycle {steps}: each step must be at least 1")
            if self.channels_total not in (None, sum(steps)):
                raise ValueError(
                    f"channels_total {self.channels_total} differs from the sum {sum(steps)} of channels_per_cycle"
                )
        elif steps < 0:
            raise ValueError(f"channels_per_cycle {steps} is negative")
        elif steps == 0 and self.channels_total:
            raise ValueError(f"channels_total is {self.channels_total} but channels_per_cycle is 0")
        elif steps and self.channels_total is None:
            raise ValueError(f"channels_per_cycle is {steps} but channels_total is not set")
        if not self.channels_sum and not self.layers_total:
            raise ValueError(
                "nothing to remove: set channels_per_cycle and channels_total, or layers_total (or recover_only)"
            )
        return self

    @property
    def channels_sum(self) -> int:
        """Channels that each layer loses in all."""
        return sum(self.channels_per_cycle) if isinstance(self.channels_per_cycle, list) else self.channels_total or 0


class RewardConfig(_Section):
    path: str | None = Field(
        None, description="Your Python file, or 'code' for unit tests; default: 0.9 accuracy + 0.1 format."
    )
    name: str = Field("compute_score", description="The function in that file, in verl's signature.")
    accuracy_weight: float = Field(0.9, ge=0, le=1)
    format_weight: float = Field(0.1, ge=0, le=1)
    format_style: Literal["boxed", "think_boxed"] = "boxed"

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path == "code":
            import reward.code

            return reward.code.__file__
        return None if path is None else str(Path(path).expanduser().absolute())  # workers may run elsewhere


class EvaluationConfig(_Section):
    judge: Literal["boxed", "reward"] = Field(
        "boxed", description="Right is a boxed answer that equals the known one, or what reward.path says ('acc')."
    )
    max_response_tokens: int | None = Field(None, ge=1, description="Default: data.max_response_tokens.")
    batch_size: int = Field(128, ge=1, description="Concurrent sequences in vLLM.")


class GateConfig(_Section):
    """What happens when a cycle's accuracy falls below ``min_accuracy_ratio`` of the starting model's."""

    min_accuracy_ratio: float = Field(0.95, ge=0, le=1)
    max_extensions: int = Field(1, ge=0, description="Further rounds of recovery per cycle, before anything else.")
    max_retries: int = Field(0, ge=0, description="Cycles taken back and tried again with half the cut, per run.")
    on_failure: Literal["continue", "stop"] = Field("continue", description="When both of these are used up.")


class ResourcesConfig(_Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    nodes: int = Field(1, ge=1)
    workers_per_node: int = Field(1, ge=1, description="GPUs per node; on CPU, worker processes.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one vLLM engine.")
    gpu_memory_utilization: float = Field(0.6, gt=0, lt=1, description="vLLM's share of a GPU during rollouts.")
    ray_cpus: int = Field(64, ge=16, description="Logical CPUs of a Ray started by the run itself.")

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


class WatchdogConfig(_Section):
    startup_seconds: int = Field(900, ge=10, description="A stage without first progress for so long is ended.")
    stall_seconds: int = Field(1800, ge=5, description="A stage without further progress for so long is ended.")
    attempts: int = Field(2, ge=1, description="Starts of a stage that stalls; one that fails is not started again.")


class RunConfig(_Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    criterion: CriterionConfig = CriterionConfig()
    schedule: ScheduleConfig
    recovery: list[AnyRecovery] = Field(
        [GrpoConfig()], min_length=1, description="Made one after the other; a single one needs no list."
    )
    recovery_of_cycle: dict[int, list[AnyRecovery]] = Field(
        {}, description="Takes the place of recovery in these planned cycles, from 1."
    )
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    resources: ResourcesConfig = ResourcesConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    verl: dict[str, Any] = Field({}, description="verl keys, dotted, verbatim, for all its RL trainers (not cpt).")

    @field_validator("recovery", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        return [recovery_entry(entry) for entry in entries]

    @field_validator("recovery_of_cycle", mode="before")
    @classmethod
    def _as_lists(cls, value: Any) -> Any:
        return {cycle: cls._as_list(entry) for cycle, entry in value.items()} if isinstance(value, dict) else value

    def recoveries(self, planned: int) -> list[AnyRecovery]:
        """What follows the ``planned``-th cut, from 0."""
        return self.recovery_of_cycle.get(planned + 1, self.recovery)

    @property
    def all_recoveries(self) -> list[AnyRecovery]:
        """Every recovery that the recipe names."""
        return [*self.recovery, *(entry for entries in self.recovery_of_cycle.values() for entry in entries)]

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
        _check_gradients(self.criterion, self.calibration)
        if self.calibration.source != "corpus" and not any(isinstance(r, GrpoConfig) for r in self.all_recoveries):
            raise ValueError(
                f"calibration.source is {self.calibration.source}, but no recovery is grpo, which alone has rollouts"
            )
        ids, total = self.criterion.layer_ids, self.schedule.layers_total
        if ids and len(ids) != total:
            raise ValueError(f"criterion.layer_ids names {len(ids)} blocks, but schedule.layers_total is {total}")
        self.data.check_prompts(train=any(isinstance(recovery, GrpoConfig) for recovery in self.all_recoveries))
        return self


class ScoreConfig(_Section):
    """What ``ptl score`` reads and how; the sections are those of a recipe."""

    data: SourceConfig
    prompt_suffix: str = ""
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="Share of malformed rows that is dropped.")
    dtype: Literal["float32", "bfloat16"] = "float32"
    calibration: CalibrationConfig = CalibrationConfig()
    criterion: CriterionConfig = CriterionConfig()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "ScoreConfig":
        _check_gradients(self.criterion, self.calibration)
        if self.calibration.source != "corpus":
            raise ValueError("calibration.source: only a run has rollouts, those of its recoveries; set it to corpus")
        return self
