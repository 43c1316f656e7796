"""What a recipe may say of scoring, choosing and cutting."""

import difflib
import itertools
import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ptl_rl.config.data import SourceConfig
from ptl_rl.config.section import Section
from ptl_rl.errors import expanded


class CalibrationConfig(Section):
    source: Literal["corpus", "rollouts", "both"] = Field(
        "corpus",
        description="corpus: worked solutions of the cycle's subset; rollouts: those of the last recovery that were "
        "rewarded; both: half each.",
    )
    sequences: int = Field(512, ge=1, description="Reasoning sequences (question and solution) scored per cycle.")
    max_tokens: int = Field(2048, ge=8, description="Longest sequence, in tokens; longer ones are cut.")
    batch_size: int = Field(4, ge=1, description="Sequences per forward pass on each rank.")
    token_weights: Literal["uniform", "sensitivity"] = Field(
        "uniform",
        description="How tokens are weighed; sensitivity: by the gradient that reaches one, for a backward pass more.",
    )
    moments_gib: float | None = Field(
        None,
        gt=0,
        description="Most memory of each worker, in GiB, for the matrices of obs and leave_one_out; little costs more "
        "passes.",
    )
    prompt_weight: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Weight of a question's token, where the solution's have 1: 0 the solution only, 1 all alike. Of "
        "channels, where token_weights is uniform.",
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


REFERENCE_PROMPTS, REFERENCE_LINES = 10, 1000
"""How many reasoning sequences and lines of general text the released code of the paper reads."""


class ContrastConfig(Section):
    """General text whose importance is taken off that for reasoning."""

    data: SourceConfig = Field(description="Plain text: set fields.text to its column.")
    weight: float = Field(
        0.5,
        ge=0,
        description="Weight of this importance; it is taken relative to its block's mean, as that for reasoning is.",
    )
    sequences: int = Field(256, ge=1, description="Texts read per cycle.")


class CriterionConfig(Section):
    channels: str = Field("obs", description=f"{', '.join(CHANNEL_CRITERIA)}; or a function of criterion.path.")
    path: str | None = Field(None, description="Your Python file with the function criterion.channels.")
    threshold: float | None = Field(
        None, gt=0, description="Only channels below this share of their block's mean importance go; the rest stays."
    )
    contrast: ContrastConfig | None = Field(
        None, description="General text whose importance is taken off; null: none is read."
    )
    layers: Literal["block_influence", "cosine", "leave_one_out", "explicit"] = Field(
        "leave_one_out", description="How blocks to remove are chosen; leave_one_out: by the loss without each."
    )
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
        1e-3,
        gt=0,
        description="Ridge of compensation and obs, relative to the mean square activation; it holds changes small.",
    )
    stream_ridge: float = Field(
        0.5,
        gt=0,
        description="Ridge of what follows the original's residual stream, relative to its median square; a small one "
        "overfits.",
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return None if path is None else str(expanded(path).absolute())  # workers may run elsewhere

    @property
    def is_obs(self) -> bool:
        return self.channels == "obs" and self.path is None

    @property
    def is_ptl_reference(self) -> bool:
        return self.channels == "ptl_reference" and self.path is None

    @property
    def contrast_sequences(self) -> int:
        """How many general texts are read in a cycle."""
        if self.contrast is None:
            return 0
        return REFERENCE_LINES if self.is_ptl_reference else self.contrast.sequences

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


def check_gradients(criterion: CriterionConfig, calibration: CalibrationConfig) -> None:
    if criterion.channels == "taylor" and criterion.path is None and calibration.token_weights == "sensitivity":
        raise ValueError("criterion.channels taylor has gradients of its own; set calibration.token_weights to uniform")


class TargetConfig(Section):
    """How small the model is to become by losing channels; one of these."""

    parameters: float | None = Field(
        None,
        gt=0,
        description="Parameters, tied embeddings counted once. Here, and for the next two, a number up to 1 is a share "
        "of the original's.",
    )
    intermediate_size: float | None = Field(None, gt=0, description="Channels of a layer.")
    flops: float | None = Field(None, gt=0, description="FLOPs of a token's forward pass, attention's scores apart.")
    tokens_per_second: float | None = Field(
        None,
        gt=1,
        le=100,
        description="Generated tokens a second in vLLM under full load (as ptl speed has it), as a multiple of the "
        "original's, say 1.5. ptl run measures models of random weights beside the original before all else, so it "
        "needs the run's device where it is started; ptl plan goes by FLOPs.",
    )

    @property
    def measure(self) -> tuple[str, float]:
        """What is to be reached, by name, and how much of it."""
        ((name, value),) = self.model_dump(exclude_none=True).items()
        return name, value

    @model_validator(mode="after")
    def _check(self) -> "TargetConfig":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(
                f"target has {sorted(given) or 'nothing'}; give one of {', '.join(type(self).model_fields)}"
            )
        return self


class ScheduleConfig(Section):
    """What is removed, cycle by cycle. Every layer loses the same number of channels."""

    mode: Literal["restart", "in_place", "auto"] = Field(
        "restart",
        description="restart: a cycle slices the model and starts a training of its own; in_place: one training in "
        "which what every cut takes is zeroed between two steps, and which ends with the sliced model; auto: in_place "
        "with rematerialise when_it_pays where the recipe can be made so and takes no cycle back (gate.max_retries), "
        "else restart.",
    )
    channels_per_cycle: int | list[int] = Field(
        0, description="Channels each layer loses in a cycle, or a list with one number per cycle."
    )
    channels_total: int | None = Field(None, ge=0, description="Channels each layer loses in all.")
    target: TargetConfig | None = Field(
        None, description="The size to reach, in place of channels_total; as many channels go as that takes."
    )
    cuts: int | None = Field(None, ge=1, description="geometric: how many cuts.")
    layers_per_cycle: int = Field(1, ge=1, description="Blocks removed in a cycle.")
    layers_total: int = Field(0, ge=0, description="Blocks removed in all.")
    order: Literal["channels_then_layers", "layers_then_channels", "alternating", "together"] = Field(
        "channels_then_layers",
        description="Which go first; together: a cycle removes channels and blocks in the same cut.",
    )
    alignment: int = Field(
        128,
        ge=1,
        description="Kept widths are multiples of this times tensor_parallel_size; 4-bit (Marlin) and block FP8 "
        "kernels take multiples of 128.",
    )
    recover_only: bool = Field(
        False, description="Cut nothing: one cycle recovers the model as it is, an original or one that is cut already."
    )

    pace: Literal["fixed", "geometric", "governed"] = Field(
        "fixed",
        description="fixed: the cuts of channels_per_cycle; geometric: so many cuts, each of the same share of the "
        "channels that are left; governed, in place only: the next cut once the policy has recovered, as large as "
        "max_damage allows, until channels_total are gone.",
    )
    max_damage: float | list[float] = Field(
        0.05,
        description="governed: most that a cut, compensated, may raise the loss by, in nats a token, above 0; or a "
        "list with one number per cut, whose last serves all later ones: a first cut may be large.",
    )
    recovered: float = Field(
        0.95, gt=0, description="governed: share of the start's validation accuracy that must be back before a cut."
    )
    patience: int = Field(
        16, ge=1, description="governed: steps without a better validation accuracy after which the training ends."
    )
    validate_every: int = Field(4, ge=1, description="governed: steps from one validation to the next.")
    rematerialise: Literal["never", "when_it_pays", "after_every_cut"] = Field(
        "never",
        description="in_place: slice the policy and its optimizer within the training, and start the trainer (and "
        "vLLM) anew with the smaller shapes; when_it_pays: where that saves more time in the steps that are left than "
        "a start takes.",
    )

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        steps = self.channels_per_cycle
        if self.rematerialise != "never" and self.mode == "restart":
            raise ValueError(
                f"rematerialise is {self.rematerialise}, but mode is restart, which slices before every training anyway"
            )
        if self.recover_only:
            if steps or self.channels_total or self.layers_total or self.target or self.cuts or self.pace != "fixed":
                raise ValueError("recover_only cuts nothing, but channels or layers are set; leave one of them out")
            if self.mode == "in_place":
                raise ValueError("recover_only cuts nothing, but mode is in_place; leave one of them out")
            return self
        if self.pace == "governed" and self.layers_total:
            raise ValueError(
                f"pace governed finds widths only, but layers_total is {self.layers_total}; use pace fixed or geometric"
            )
        if not self.damages or not all(0 < most < math.inf for most in self.damages):
            raise ValueError(f"max_damage {self.max_damage}: give one number or several, each above 0 and finite")
        if self.pace != "governed":
            for name in ("max_damage", "recovered", "patience", "validate_every"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is set, which pace governed alone reads, but pace is {self.pace}")
        if self.target is not None and (self.channels_total is not None or isinstance(steps, list)):
            raise ValueError(
                "target says how many channels go; leave out channels_total, and the list of channels_per_cycle"
            )
        total = self.channels_total or self.target
        if (self.pace == "geometric") != (self.cuts is not None):
            raise ValueError(f"pace is {self.pace} and cuts is {self.cuts}; geometric needs their number, and only it")
        if self.pace == "governed" and self.mode == "restart":
            raise ValueError("pace governed needs mode in_place")
        if self.pace != "fixed":
            if steps != 0 or not total:
                raise ValueError(
                    f"pace {self.pace} finds the cuts itself: set channels_total or target, and no channels_per_cycle"
                )
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
        elif steps == 0 and total:
            name, value = ("target", "set") if self.target else ("channels_total", self.channels_total)
            raise ValueError(f"{name} is {value} but channels_per_cycle is 0")
        elif steps and total is None:
            raise ValueError(f"channels_per_cycle is {steps} but neither channels_total nor target is set")
        if self.is_open:
            return self
        if not self.channels_sum and not self.layers_total:
            raise ValueError(
                "nothing to remove: set channels_per_cycle and channels_total, or layers_total (or recover_only)"
            )
        return self

    @property
    def damages(self) -> list[float]:
        """Most that each cut of a governed pace may raise the loss by; the last one's serves all later ones."""
        return self.max_damage if isinstance(self.max_damage, list) else [self.max_damage]

    @property
    def is_open(self) -> bool:
        """Whether the cuts depend on the model; :func:`ptl_rl.planning.schedule.settled` finds them."""
        return self.target is not None or self.pace == "geometric"

    @property
    def channel_steps(self) -> list[int]:
        """Channels that each layer loses, cut by cut; of a schedule that is not open."""
        assert not self.is_open
        if isinstance(self.channels_per_cycle, list):
            return list(self.channels_per_cycle)
        total, step = self.channels_sum, self.channels_per_cycle
        if self.pace == "governed":  # one or more, as it will turn out
            return [total]
        return [min(step, total - done) for done in range(0, total, step)] if step else []

    @property
    def cuts_in_order(self) -> list[tuple[int, int]]:
        """Channels and blocks that each cut takes, first one first; of a schedule that is not open."""
        total, step = self.layers_total, self.layers_per_cycle
        layer_steps = [min(step, total - done) for done in range(0, total, step)]
        channels, layers = [(step, 0) for step in self.channel_steps], [(0, step) for step in layer_steps]
        if self.order == "channels_then_layers":
            return channels + layers
        if self.order == "layers_then_channels":
            return layers + channels
        if self.order == "together":
            return list(itertools.zip_longest(self.channel_steps, layer_steps, fillvalue=0))
        shared = min(len(channels), len(layers))
        in_turns = [pair for both in zip(channels, layers, strict=False) for pair in both]
        return in_turns + channels[shared:] + layers[shared:]

    @property
    def channels_sum(self) -> int:
        """Channels that each layer loses in all; of a schedule that is not open."""
        assert self.target is None
        return sum(self.channels_per_cycle) if isinstance(self.channels_per_cycle, list) else self.channels_total or 0
