"""What the block before a removed one could take over, and which block is least missed once it has.

:mod:`ptl_rl.pruning.compensate.block_moments` has the regressions. Here they are read, solved and, for
``leave_one_out``, tried out.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ptl_rl.data.encoding import Sequence
from ptl_rl.families import Family
from ptl_rl.pruning.compensate.block_moments import BlockMoments, NormedBlockMoments
from ptl_rl.pruning.masking import NewWeights, replaced, skipped
from ptl_rl.pruning.model import PrunableModel
from ptl_rl.pruning.score.streaming import mean_loss

GIB = 4.0
"""Most memory of a rank for regressions that are read in one pass, where ``calibration.moments_gib`` does not say."""


FINALISTS = 4
"""Candidates of ``leave_one_out`` whose new weights are held, and which are judged on all sequences."""


@dataclass(frozen=True)
class Absorbed:
    """How the model changes if one block more goes."""

    removed: int
    new: dict[tuple[int, str], torch.Tensor]
    """New weights of the block before it, by block and projection, float32, whole on every rank; {} if none is left."""


def groups(prunable: PrunableModel, count: int) -> list[int]:
    """How many of ``count`` regressions are read in each pass, so that memory holds; at least one on each rank."""
    block, family = prunable.blocks[0], prunable.family
    inputs, hidden = prunable.channels, prunable.model.config.hidden_size
    if family.output_norm is None:
        inputs += _linear(block, family.attention, family.o_proj).in_features
    each_gib = inputs * (inputs + hidden) * 4 / 2**30
    at_once = max(1, int((prunable.moments_gib or GIB) / each_gib)) * prunable.ranks
    return [min(at_once, count - start) for start in range(0, count, at_once)]


@contextmanager
def without(prunable: PrunableModel, gone: list[int], new_weights: NewWeights) -> Iterator[None]:
    """Within this context the blocks ``gone`` pass their input on and the others have their new weights."""
    model, family = prunable.model, prunable.family
    kept = [layer for layer in range(prunable.layers) if layer not in gone]
    with replaced(model, family, new_weights, kept), skipped(model, family, gone):
        yield


def absorb(
    prunable: PrunableModel,
    gone: list[int],
    candidates: list[int],
    sequences: list[Sequence],
    ridge: float,
    new_weights: NewWeights,
) -> Iterator[Absorbed]:
    """For each of ``candidates``, what changes if it goes after ``gone``; collective over all ranks.

    Those that no block is left to take over for come first, the others in groups, each read in one pass. Regressions
    are dealt out to ranks, so that they are solved side by side.

    Args:
        new_weights: what ``gone`` have left to other blocks; is asked again for every group.
    """
    kept = [layer for layer in range(prunable.layers) if layer not in gone]
    for removed in candidates:
        if removed == kept[0]:
            yield Absorbed(removed, {})
    predecessors = {layer: before for before, layer in pairwise(kept) if layer in candidates}
    waiting = list(predecessors)
    for size in groups(prunable, len(waiting)):
        group, waiting = waiting[:size], waiting[size:]
        moments = []
        for place, removed in enumerate(group):
            prunable.fetch(predecessors[removed])
            moments.append(_moments(prunable, removed, predecessors[removed], place % prunable.ranks, new_weights))
        with without(prunable, gone, new_weights):
            prunable.read(sequences, list(moments))
        while moments:
            side_by_side, moments = moments[: prunable.ranks], moments[prunable.ranks :]
            new, own = None, None
            for one in side_by_side:
                one.reduce()
                prunable.fetch(one.predecessor)
                if one.owner == prunable.rank:
                    own = one, _projections(prunable, one, new_weights)
            if own is not None:
                one, current = own
                new = _solved(prunable.family, one, ridge, current)
                one.let_go()
                own = None
            for one in side_by_side:
                yield Absorbed(one.removed, _told(prunable, one, new if one.owner == prunable.rank else None))


def lookup(new: dict[tuple[int, str], torch.Tensor]) -> NewWeights:
    """New weights that are held in memory."""
    return lambda layer, name: new.get((layer, name))


def _linear(block: nn.Module, part: str, name: str) -> nn.Linear:
    module = block.get_submodule(f"{part}.{name}")
    assert isinstance(module, nn.Linear)
    return module


def _current(prunable: PrunableModel, layer: int, name: str, new_weights: NewWeights) -> torch.Tensor:
    weight = new_weights(layer, name)
    return (prunable.weight(layer, name) if weight is None else weight.to(prunable.device)).float()


def _moments(
    prunable: PrunableModel, removed: int, predecessor: int, owner: int, new_weights: NewWeights
) -> BlockMoments | NormedBlockMoments:
    family = prunable.family
    if family.output_norm is None:
        return BlockMoments(removed, predecessor, owner)
    norm_H = family.norm_offset + _current(prunable, predecessor, "output_norm", new_weights)
    eps: Any = prunable.blocks[predecessor].get_submodule(family.output_norm).eps
    return NormedBlockMoments(removed, predecessor, norm_H, float(eps), owner)


def _projections(
    prunable: PrunableModel, moments: BlockMoments | NormedBlockMoments, new_weights: NewWeights
) -> dict[str, torch.Tensor]:
    """The predecessor's weights that are to take over, as they are now."""
    names = ("down_proj",) if isinstance(moments, NormedBlockMoments) else ("o_proj", "down_proj")
    return {name: _current(prunable, moments.predecessor, name, new_weights) for name in names}


def _solved(
    family: Family, moments: BlockMoments | NormedBlockMoments, ridge: float, current: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The predecessor's new weights by the names of their projections, on the rank that has the sums."""
    if isinstance(moments, NormedBlockMoments):
        down_HC, norm_H = moments.solve(current["down_proj"], ridge)
        return {"down_proj": down_HC, "output_norm": norm_H - family.norm_offset}
    o_HA, down_HC = current["o_proj"], current["down_proj"]
    gain_HA, gain_HC = moments.solve(o_HA.shape[1], ridge)
    return {"o_proj": o_HA + gain_HA, "down_proj": down_HC + gain_HC}


def _told(
    prunable: PrunableModel, moments: BlockMoments | NormedBlockMoments, new: dict[str, torch.Tensor] | None
) -> dict[tuple[int, str], torch.Tensor]:
    """The new weights by block and projection, the same numbers on every rank; ``new`` is the owner's only."""
    family, predecessor = prunable.family, moments.predecessor
    block = prunable.blocks[predecessor]
    down_proj = _linear(block, family.mlp, family.down_proj)
    o_proj = _linear(block, family.attention, family.o_proj)
    shapes: dict[str, tuple] = {"down_proj": (down_proj.out_features, down_proj.in_features)}
    if isinstance(moments, NormedBlockMoments):
        shapes["output_norm"] = shapes["down_proj"][:1]
    else:
        shapes["o_proj"] = o_proj.out_features, o_proj.in_features
    if new is None:
        new = {name: torch.empty(shape, device=prunable.device) for name, shape in shapes.items()}
    if dist.is_initialized():
        for name in sorted(new):
            dist.broadcast(new[name], moments.owner)
    return {(predecessor, name): weight for name, weight in new.items()}


class LeaveOneOut:
    """Loss once one block more is gone: as it then is, or, with ``ridge``, once the one before it has taken over.

    Importance for :func:`ptl_rl.pruning.choose.blocks.greedy`, which removes the block of smallest loss each time.
    Where ``judged`` is only a part of ``sequences``, the :data:`FINALISTS` best on it are judged on all, and the others
    are out: infinite. Until then their new weights are held, on every rank.
    """

    def __init__(
        self, prunable: PrunableModel, judged: list[Sequence], sequences: list[Sequence], ridge: float | None
    ) -> None:
        self.prunable, self.judged, self.sequences, self.ridge = prunable, judged, sequences, ridge
        self.new: dict[tuple[int, str], torch.Tensor] = {}
        self.best: Absorbed | None = None

    def __call__(self, gone: list[int]) -> torch.Tensor:
        if self.best is not None:
            self.new |= self.best.new
        left = [layer for layer in range(self.prunable.layers) if layer not in gone]
        losses_L = torch.full((self.prunable.layers,), torch.inf, dtype=torch.float64)
        finals = len(self.judged) < len(self.sequences)
        best: list[Absorbed] = []  # the others' weights are let go
        for candidate in self._candidates(gone, left):
            losses_L[candidate.removed] = self._loss(gone, candidate, self.judged)
            ranked = sorted([*best, candidate], key=lambda one: (float(losses_L[one.removed]), one.removed))
            best = ranked[: FINALISTS if finals else 1]
        if finals:
            losses_L.fill_(torch.inf)
            for candidate in best:
                losses_L[candidate.removed] = self._loss(gone, candidate, self.sequences)
            best.sort(key=lambda one: (float(losses_L[one.removed]), one.removed))
        self.best = best[0]
        return losses_L

    def _loss(self, gone: list[int], candidate: Absorbed, judged: list[Sequence]) -> float:
        with without(self.prunable, [*gone, candidate.removed], lookup({**self.new, **candidate.new})):
            loss = mean_loss(
                self.prunable.model, self.prunable.counted(self.prunable.batches(judged)), self.prunable.device
            )
        return loss if math.isfinite(loss) else math.inf  # a model that breaks without the block needs it

    def _candidates(self, gone: list[int], left: list[int]) -> Iterator[Absorbed]:
        if self.ridge is None:
            return (Absorbed(layer, {}) for layer in left)
        return absorb(self.prunable, gone, left, self.sequences, self.ridge, lookup(dict(self.new)))
