"""Scoring and compensation of one model: on every rank of the pruning worker, or in one process."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ptl_rl.config import CriterionConfig
from ptl_rl.config.pruning import REFERENCE_LINES, REFERENCE_PROMPTS
from ptl_rl.data.encoding import Sequence
from ptl_rl.pruning.choose import blocks
from ptl_rl.pruning.choose.absorption import FINALISTS, LeaveOneOut, groups
from ptl_rl.pruning.choose.choice import Scores
from ptl_rl.pruning.compensate.algebra import obs_importance
from ptl_rl.pruning.compensate.refit import Losses, most_passes, refit
from ptl_rl.pruning.masking import skipped
from ptl_rl.pruning.model import PrunableModel, barrier
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.criteria import (
    LAYER_CRITERIA,
    channel_importance,
    load_criterion,
    needs_of,
    rms_contribution,
)
from ptl_rl.pruning.score.moments import SecondMoments
from ptl_rl.pruning.score.statistics import Collector, Needs, Statistics
from ptl_rl.pruning.score.streaming import Listener
from ptl_rl.pruning.slice.slicing import save_new_weight

__all__ = ["Losses", "PrunableModel", "Removal", "batches_to_compensate", "batches_to_read", "compensate", "score"]


@dataclass(frozen=True)
class Removal:
    """What is to go now, and what went before."""

    channels: int
    layers: int
    layers_before: int = 0


def batches_to_read(
    prunable: PrunableModel,
    criterion: CriterionConfig,
    cut: Removal,
    sequences: list[Sequence],
    general: list[Sequence],
) -> int:
    """How many batches :func:`score` reads on every rank."""
    every, for_layers, passes, on_all = sequences, sequences[: criterion.layer_sequences], 0, 0
    if criterion.is_ptl_reference:
        sequences, general = sequences[:REFERENCE_PROMPTS], general[:REFERENCE_LINES]
    if criterion.layers == "leave_one_out":
        left = [prunable.layers - gone for gone in range(cut.layers)]
        passes = sum(left)
        on_all = sum(len(groups(prunable, count - 1)) for count in left) if criterion.compensate != "none" else 0
        on_all += sum(min(FINALISTS, count) for count in left) if for_layers != every else 0
    elif criterion.layers in LAYER_CRITERIA:
        passes = max(0, cut.layers - (for_layers == sequences))
    for_channels = len(prunable.moment_groups()) if criterion.is_obs and cut.channels else 1
    of_blocks = passes * prunable.rounds(for_layers) + on_all * prunable.rounds(every)
    return for_channels * prunable.rounds(sequences) + prunable.rounds(general) + of_blocks


def batches_to_compensate(
    prunable: PrunableModel, layers: int, sequences: list[Sequence], *, sensitivity: bool = False
) -> int:
    """How often :func:`compensate` has a block read a batch, at most, where ``layers`` blocks go."""
    return prunable.rounds(sequences) * most_passes(prunable.layers, layers, sensitivity=sensitivity)


def score(
    prunable: PrunableModel,
    criterion: CriterionConfig,
    cut: Removal,
    sequences: list[Sequence],
    *,
    general: list[Sequence],
    sensitivity: bool = False,
    seed: int = 0,
) -> Scores:
    """Importance of channels and blocks; collective over all ranks.

    Of a model that was cut in place, only the channels that stand have scores.

    Args:
        general: general text for ``criterion.contrast``; may be empty.
        sensitivity: weigh positions by the gradient that reaches them.
        seed: of the criterion ``random``.
    """
    every = sequences
    if criterion.is_ptl_reference:
        sequences, general = sequences[:REFERENCE_PROMPTS], general[:REFERENCE_LINES]
    function = rms_contribution if criterion.is_obs else load_criterion(criterion.channels, criterion.path)
    moment_groups = prunable.moment_groups() if criterion.is_obs and cut.channels else []
    needs = replace(Needs(sums=()) if moment_groups else needs_of(function), cosine=criterion.layers == "cosine")
    collector = Collector(prunable.model, prunable.family, prunable.channels, prunable.device, needs)
    listeners: list[Listener] = [collector]
    if moment_groups:
        listeners.append(_moments(prunable, moment_groups[0]))
    prunable.read(sequences, listeners, sensitivity)
    statistics = collector.reduce(remove_channels=cut.channels, seed=seed)
    if general:
        of_general = Collector(prunable.model, prunable.family, prunable.channels, prunable.device, needs)
        prunable.read(general, [of_general], sensitivity)
        statistics.general = of_general.reduce(remove_channels=cut.channels, seed=seed)
    if prunable.standing_LK is not None:
        statistics = statistics.at(prunable.standing_LK)
    if moment_groups:
        first = listeners.pop()
        assert isinstance(first, SecondMoments)
        importance_LC = torch.zeros(prunable.layers, prunable.width, device=prunable.device)
        _obs(prunable, first, importance_LC, cut.channels, criterion.ridge)
        for group in moment_groups[1:]:
            moments = _moments(prunable, group)
            prunable.read(sequences, [moments], sensitivity)
            _obs(prunable, moments, importance_LC, cut.channels, criterion.ridge)
        if dist.is_initialized():
            dist.all_reduce(importance_LC)
        importance_LC = importance_LC.cpu()
    else:
        importance_LC = channel_importance(function, statistics, criterion.contrast.weight if criterion.contrast else 0)
    known = statistics if every[: criterion.layer_sequences] == sequences else None
    order = _layer_order(prunable, criterion, cut, every, known)
    influence_L = LAYER_CRITERIA.get(criterion.layers, LAYER_CRITERIA["block_influence"])(statistics)
    return Scores(importance_LC, influence_L, order)


def _moments(prunable: PrunableModel, layers: Collection[int]) -> SecondMoments:
    return SecondMoments(prunable.layers, prunable.channels, prunable.device, layers)


def _obs(
    prunable: PrunableModel, moments: SecondMoments, importance_LC: torch.Tensor, remove: int, ridge: float
) -> None:
    """Fill in this rank's blocks: the place in the order of removal for the channels that go, above it for the others.

    Each matrix is let go when it was used, as what follows needs the memory.
    """
    for layer in sorted(moments.wanted):
        prunable.fetch(layer)
        if layer in moments.layers:
            standing, moment_CC = prunable.standing(layer), moments.take(layer)
            weight_HC = prunable.weight(layer, "down_proj")[:, standing]
            importance_LC[layer] = obs_importance(weight_HC, moment_CC[standing][:, standing], remove, ridge)


def _layer_order(
    prunable: PrunableModel,
    criterion: CriterionConfig,
    cut: Removal,
    sequences: list[Sequence],
    statistics: Statistics | None,
) -> list[int]:
    """Which blocks go; ``statistics`` are those of the judged sequences and the whole model, if they are known."""
    judged = sequences[: criterion.layer_sequences]
    if criterion.layers == "explicit":
        return blocks.explicit(criterion.layer_ids, cut.layers_before, cut.layers)
    if criterion.layers == "leave_one_out":
        ridge = None if criterion.compensate == "none" else criterion.stream_ridge
        return blocks.greedy(LeaveOneOut(prunable, judged, sequences, ridge), cut.layers)

    def measured(gone: list[int]) -> torch.Tensor:
        found = None if gone else statistics
        if found is None:
            needs = Needs(sums=(), cosine=criterion.layers == "cosine")
            collector = Collector(prunable.model, prunable.family, prunable.channels, prunable.device, needs)
            with skipped(prunable.model, prunable.family, gone):
                prunable.read(judged, [collector])
            found = collector.reduce()
        return LAYER_CRITERIA[criterion.layers](found)

    return blocks.greedy(measured, cut.layers)


def _keep_nothing(layer: int, name: str, weight: torch.Tensor) -> None:
    """Another rank writes it."""


def compensate(
    prunable: PrunableModel, plan: PruningPlan, sequences: list[Sequence], folder: Path, *, sensitivity: bool = False
) -> Losses:
    """Write the weights that let what stays take over what goes into ``folder``; collective over all ranks.

    Args:
        sensitivity: weigh positions by the gradient that reaches them.
    """
    if prunable.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # an earlier plan's weights are not this one's
        folder.mkdir(parents=True)
    save = partial(save_new_weight, folder) if prunable.rank == 0 else _keep_nothing
    losses = refit(prunable, plan, sequences, save, sensitivity=sensitivity)
    barrier()  # the weights are there for every rank
    return losses
