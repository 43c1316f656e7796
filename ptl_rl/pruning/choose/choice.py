"""From scores to a plan: how many channels can go, which they are, and what had to be rounded."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ptl_rl.checkpoints.read import checkpoint_hash
from ptl_rl.config import CriterionConfig
from ptl_rl.pruning.plan import PruningPlan


@dataclass(frozen=True)
class Scores:
    """What scoring found out; on the CPU."""

    importance_LC: torch.Tensor
    """float32; large means: keep."""
    block_influence_L: torch.Tensor
    """float32, of the model as it is; by the layer criterion, or by paper Eq. 5 where that gives no numbers."""
    layer_order: list[int]
    """Ids of the blocks that go, first removed first."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a safetensors file."""
        order = torch.tensor(self.layer_order, dtype=torch.int64)
        return {"importance_LC": self.importance_LC, "block_influence_L": self.block_influence_L, "layer_order": order}

    @staticmethod
    def of(tensors: dict[str, torch.Tensor]) -> "Scores":
        """From what :meth:`tensors` gave."""
        return Scores(tensors["importance_LC"], tensors["block_influence_L"], tensors["layer_order"].tolist())


def aligned(width: int, remove: int, alignment: int) -> tuple[int, list[str]]:
    """How many of ``width`` channels can go so that the rest is a multiple of ``alignment``: at most ``remove``.

    Returns that number, 0 where no multiple can be reached, and a note where it is not ``remove``.
    """
    kept = -(-max(width - remove, 1) // alignment) * alignment
    if kept == width - remove:
        return remove, []
    reason = f"multiple of {alignment} (alignment x tensor_parallel_size)"
    if kept > width:
        return 0, [f"no channels go: between {max(width - remove, 1)} and {width}, what would stay, lies no {reason}"]
    return width - kept, [
        f"{width - kept} instead of {remove} channels per block go: {width - remove} would stay, which is no {reason}"
    ]


def below_threshold(
    importance_LC: torch.Tensor, layers: list[int], remove: int, threshold: float | None
) -> tuple[int, list[str]]:
    """How many channels can go from every block if each must lie below ``threshold`` times its block's mean importance.

    All blocks lose equally many, so of ``layers``, those that stay, the one with the fewest decides. Returns that
    number, at most ``remove``, and a note where it is smaller.
    """
    if threshold is None:
        return remove, []
    below_L = (importance_LC < threshold * importance_LC.mean(dim=1, keepdim=True))[layers].sum(1)
    fewest = int(below_L.min())
    if fewest >= remove:
        return remove, []
    return fewest, [
        f"{fewest} instead of {remove} channels per block go: block {layers[int(below_L.argmin())]} has no more below "
        f"criterion.threshold ({threshold:g} times its mean importance)"
    ]


def most_important(importance_LC: torch.Tensor, remove: int) -> list[list[int]]:
    """Ascending ids, per block, of the channels that stay; of equal scores the lower index stays."""
    order_LC = importance_LC.argsort(dim=1, descending=True, stable=True)
    return order_LC[:, : importance_LC.shape[1] - remove].sort(dim=1).values.tolist()


def make_plan(
    scores: Scores,
    criterion: CriterionConfig,
    *,
    remove_channels: int,
    alignment: int,
    subset_hash: str,
    source: Path,
) -> PruningPlan:
    """What goes, given the scores; ``notes`` say what was rounded."""
    width = scores.importance_LC.shape[1]
    keep_layers = [layer for layer in range(len(scores.importance_LC)) if layer not in scores.layer_order]
    remove, notes = below_threshold(scores.importance_LC, keep_layers, remove_channels, criterion.threshold)
    if remove:
        remove, rounded = aligned(width, remove, alignment)
        notes = notes + rounded
    return PruningPlan(
        keep_channels=most_important(scores.importance_LC, remove),
        keep_layers=keep_layers,
        layer_order=scores.layer_order,
        source_intermediate_size=width,
        alignment=alignment if remove else 1,
        channel_criterion=criterion.channels,
        layer_criterion=criterion.layers,
        compensate=criterion.compensate if remove or scores.layer_order else "none",
        ridge=criterion.ridge,
        stream_ridge=criterion.stream_ridge,
        subset_hash=subset_hash,
        source=str(source),
        source_hash=checkpoint_hash(source),
        notes=notes,
    )
