"""A pruning plan is data: which channels and blocks stay, and what that was decided from. JSON, small, diffable."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ptl_rl.errors import UserError


class PlanError(UserError, ValueError):
    """A file that is no pruning plan."""


class PruningPlan(BaseModel):
    """Everything that slicing needs to know.

    ``keep_channels`` has one ascending list per block of the source model, blocks that go included (theirs is not
    used); all lists are equally long.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_channels: list[list[int]]
    keep_layers: list[int]
    layer_order: list[int]
    """Ids of the blocks that go, first removed first."""
    source_intermediate_size: int
    alignment: int = Field(ge=1)
    channel_criterion: str
    layer_criterion: str
    compensate: Literal["none", "least_squares"] = "none"
    ridge: float = 1e-3
    stream_ridge: float = 0.5
    subset_hash: str
    source: str
    source_hash: str = ""
    """Of :func:`ptl_rl.checkpoints.read.checkpoint_hash`."""
    notes: list[str] = []
    """What was rounded or left out, and why."""

    @model_validator(mode="after")
    def _check(self) -> "PruningPlan":
        widths = {len(kept) for kept in self.keep_channels}
        if len(widths) != 1:
            raise ValueError(f"every block must keep the same number of channels, these keep {sorted(widths)}")
        width = widths.pop()
        if width < 1 or width % self.alignment:
            raise ValueError(f"keeps {width} channels per block, which is not a multiple of {self.alignment}")
        for layer, kept in enumerate(self.keep_channels):
            if sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= self.source_intermediate_size:
                raise ValueError(
                    f"block {layer}: channels must ascend within 0..{self.source_intermediate_size - 1} without repeats"
                )
        layers = self.keep_layers
        if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= len(self.keep_channels):
            raise ValueError(f"keep_layers {layers} must ascend within 0..{len(self.keep_channels) - 1}, at least one")
        if sorted([*layers, *self.layer_order]) != list(range(len(self.keep_channels))):
            raise ValueError(
                f"layer_order {self.layer_order} must name the blocks that keep_layers {layers} leaves out"
            )
        return self

    @property
    def intermediate_size(self) -> int:
        return len(self.keep_channels[0])

    @property
    def num_hidden_layers(self) -> int:
        return len(self.keep_layers)

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "PruningPlan":
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: no such file, or not a plan; names the path and the first thing that is wrong.
        """
        try:
            return PruningPlan.model_validate_json(path.read_text())
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan: {error.strerror or error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "plan"
            raise PlanError(f"{path}: not a pruning plan: {where}: {first['msg']}") from None
