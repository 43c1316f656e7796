"""A pruning plan is data: which channels and blocks stay, and what that was decided from. JSON, small, diffable."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator


class PruningPlan(BaseModel):
    """Everything that slicing needs to know.

    ``keep_channels`` has one ascending list per block of the source model, blocks that go included (theirs is not
    used); all lists are equally long.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_channels: list[list[int]]
    keep_layers: list[int]
    source_intermediate_size: int
    alignment: int
    channel_criterion: str
    layer_criterion: str
    compensate: Literal["none", "least_squares"] = "none"
    ridge: float = 1e-3
    subset_hash: str
    source: str

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
        return PruningPlan.model_validate_json(path.read_text())


def choose(
    importance_LC: torch.Tensor,
    influence_L: torch.Tensor,
    *,
    remove_channels: int,
    remove_layers: int,
) -> tuple[list[list[int]], list[int]]:
    """Keep the most important channels of every block and the most influential blocks.

    Ties go to the lower index, so that equal scores give equal plans. Returns ascending ids of kept channels per
    block, and of kept blocks.
    """
    blocks, width = importance_LC.shape
    channel_order_LC = importance_LC.argsort(dim=1, descending=True, stable=True)
    keep_channels = channel_order_LC[:, : width - remove_channels].sort(dim=1).values.tolist()
    layer_order_L = influence_L.argsort(descending=True, stable=True)
    return keep_channels, layer_order_L[: blocks - remove_layers].sort().values.tolist()
