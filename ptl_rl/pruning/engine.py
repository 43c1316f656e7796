"""Scoring and compensation of one model: on every rank of the pruning worker, or in one process."""

import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from ptl_rl.config import CriterionConfig
from ptl_rl.data.encoding import Sequence
from ptl_rl.pruning import blocks
from ptl_rl.pruning.absorption import FINALISTS, LeaveOneOut, absorb, groups
from ptl_rl.pruning.choice import Scores
from ptl_rl.pruning.compensation import least_squares, obs_importance
from ptl_rl.pruning.criteria import (
    LAYER_CRITERIA,
    REFERENCE_LINES,
    REFERENCE_PROMPTS,
    channel_importance,
    load_criterion,
    needs_of,
    rms_contribution,
)
from ptl_rl.pruning.masking import masked, skipped
from ptl_rl.pruning.moments import SecondMoments
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.policy import Policy, barrier
from ptl_rl.pruning.slicing import load_new_weight, save_new_weight
from ptl_rl.pruning.statistics import Collector, Needs, Statistics
from ptl_rl.pruning.streaming import Listener

__all__ = ["Losses", "Policy", "Removal", "batches_to_compensate", "batches_to_read", "compensate", "score"]


@dataclass(frozen=True)
class Removal:
    """What is to go now, and what went before."""

    channels: int
    layers: int
    layers_before: int = 0


def batches_to_read(
    policy: Policy, criterion: CriterionConfig, cut: Removal, sequences: list[Sequence], general: list[Sequence]
) -> int:
    """How many batches :func:`score` reads on every rank."""
    every, for_layers, passes, on_all = sequences, sequences[: criterion.layer_sequences], 0, 0
    if criterion.is_ptl_reference:
        sequences, general = sequences[:REFERENCE_PROMPTS], general[:REFERENCE_LINES]
    if criterion.layers == "leave_one_out":
        left = [policy.layers - gone for gone in range(cut.layers)]
        passes = sum(left)
        on_all = sum(len(groups(policy, count - 1)) for count in left) if criterion.compensate != "none" else 0
        on_all += sum(min(FINALISTS, count) for count in left) if for_layers != every else 0
    elif criterion.layers in LAYER_CRITERIA:
        passes = max(0, cut.layers - (for_layers == sequences))
    for_channels = len(policy.moment_groups()) if criterion.is_obs and cut.channels else 1
    of_blocks = passes * policy.rounds(for_layers) + on_all * policy.rounds(every)
    return for_channels * policy.rounds(sequences) + policy.rounds(general) + of_blocks


def batches_to_compensate(policy: Policy, cut_channels: bool, layers: int, sequences: list[Sequence]) -> int:
    """How many batches :func:`compensate` reads on every rank, at most, where ``layers`` blocks go."""
    return policy.rounds(sequences) * (layers + (len(policy.moment_groups()) if cut_channels else 0))


def score(
    policy: Policy,
    criterion: CriterionConfig,
    cut: Removal,
    sequences: list[Sequence],
    *,
    general: list[Sequence],
    sensitivity: bool = False,
    seed: int = 0,
) -> Scores:
    """Importance of channels and blocks; collective over all ranks.

    Args:
        general: general text for ``criterion.contrast``; may be empty.
        sensitivity: weigh positions by the gradient that reaches them.
        seed: of the criterion ``random``.
    """
    every = sequences
    if criterion.is_ptl_reference:
        sequences, general = sequences[:REFERENCE_PROMPTS], general[:REFERENCE_LINES]
    function = rms_contribution if criterion.is_obs else load_criterion(criterion.channels, criterion.path)
    moment_groups = policy.moment_groups() if criterion.is_obs and cut.channels else []
    needs = replace(Needs(sums=()) if moment_groups else needs_of(function), cosine=criterion.layers == "cosine")
    collector = Collector(policy.model, policy.family, policy.channels, policy.device, needs)
    listeners: list[Listener] = [collector]
    if moment_groups:
        listeners.append(_moments(policy, moment_groups[0]))
    policy.read(sequences, listeners, sensitivity)
    statistics = collector.reduce(remove_channels=cut.channels, seed=seed)
    if general:
        of_general = Collector(policy.model, policy.family, policy.channels, policy.device, needs)
        policy.read(general, [of_general], sensitivity)
        statistics.general = of_general.reduce(remove_channels=cut.channels, seed=seed)
    if moment_groups:
        first = listeners.pop()
        assert isinstance(first, SecondMoments)
        importance_LC = torch.zeros(policy.layers, policy.channels, device=policy.device)
        _obs(policy, first, importance_LC, cut.channels, criterion.ridge)
        for group in moment_groups[1:]:
            moments = _moments(policy, group)
            policy.read(sequences, [moments], sensitivity)
            _obs(policy, moments, importance_LC, cut.channels, criterion.ridge)
        if dist.is_initialized():
            dist.all_reduce(importance_LC)
        importance_LC = importance_LC.cpu()
    else:
        importance_LC = channel_importance(function, statistics, criterion.contrast.weight if criterion.contrast else 0)
    known = statistics if every[: criterion.layer_sequences] == sequences else None
    order = _layer_order(policy, criterion, cut, every, known)
    influence_L = LAYER_CRITERIA.get(criterion.layers, LAYER_CRITERIA["block_influence"])(statistics)
    return Scores(importance_LC, influence_L, order)


def _moments(policy: Policy, layers: Collection[int]) -> SecondMoments:
    return SecondMoments(policy.layers, policy.channels, policy.device, layers)


def _obs(policy: Policy, moments: SecondMoments, importance_LC: torch.Tensor, remove: int, ridge: float) -> None:
    """Fill in this rank's blocks: the place in the order of removal for the channels that go, above it for the others.

    Each matrix is let go when it was used, as what follows needs the memory.
    """
    for layer in moments.layers:
        importance_LC[layer] = obs_importance(policy.weight(layer, "down_proj"), moments.take(layer), remove, ridge)


def _layer_order(
    policy: Policy, criterion: CriterionConfig, cut: Removal, sequences: list[Sequence], statistics: Statistics | None
) -> list[int]:
    """Which blocks go; ``statistics`` are those of the judged sequences and the whole model, if they are known."""
    judged = sequences[: criterion.layer_sequences]
    if criterion.layers == "explicit":
        return blocks.explicit(criterion.layer_ids, cut.layers_before, cut.layers)
    if criterion.layers == "leave_one_out":
        ridge = None if criterion.compensate == "none" else criterion.block_ridge
        return blocks.greedy(LeaveOneOut(policy, judged, sequences, ridge), cut.layers)

    def measured(gone: list[int]) -> torch.Tensor:
        found = None if gone else statistics
        if found is None:
            needs = Needs(sums=(), cosine=criterion.layers == "cosine")
            collector = Collector(policy.model, policy.family, policy.channels, policy.device, needs)
            with skipped(policy.model, policy.family, gone):
                policy.read(judged, [collector])
            found = collector.reduce()
        return LAYER_CRITERIA[criterion.layers](found)

    return blocks.greedy(measured, cut.layers)


@dataclass(frozen=True)
class Losses:
    """Shares, by mean square over the calibration tokens, of what a cut loses, averaged over blocks."""

    channels_plain: float | None = None
    """Of the FFN outputs, if the kept columns stay as they are."""
    channels: float | None = None
    """The same with compensation."""
    blocks: float | None = None
    """Of what the removed blocks contributed, with compensation; without, all of it is lost."""


def compensate(
    policy: Policy, plan: PruningPlan, sequences: list[Sequence], folder: Path, *, sensitivity: bool = False
) -> Losses:
    """Write the weights that let what stays take over what goes into ``folder``; collective over all ranks.

    Blocks first, one at a time in the order of removal, each with the earlier ones gone and absorbed; then channels.
    """
    if policy.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # an earlier plan's weights are not this one's
        folder.mkdir(parents=True)
    barrier()
    blocks_lost = _absorb_blocks(policy, plan, sequences, folder)
    if plan.intermediate_size == plan.source_intermediate_size:
        return Losses(blocks=blocks_lost)
    shares = _absorb_channels(policy, plan, sequences, folder, sensitivity)
    if dist.is_initialized():
        shares = shares.to(policy.device)
        dist.all_reduce(shares)
    plain, left = (shares / plan.num_hidden_layers).tolist()
    return Losses(plain, left, blocks_lost)


def _absorb_blocks(policy: Policy, plan: PruningPlan, sequences: list[Sequence], folder: Path) -> float | None:
    """Let what stays take over for one removed block after the other; the mean share lost, None if none can be."""
    lost = []
    for index, removed in enumerate(plan.layer_order):
        gone = plan.layer_order[:index]
        (found,) = absorb(
            policy, gone, [removed], sequences, plan.block_ridge, lambda *key: load_new_weight(folder, *key)
        )
        lost += [] if found.lost is None else [found.lost]
        if policy.rank == 0:  # a block that takes over may go itself later: slicing does not read its weights
            for (layer, name), weight in found.new.items():
                save_new_weight(folder, layer, name, weight)
        barrier()
    return sum(lost) / len(lost) if lost else None


def _absorb_channels(
    policy: Policy, plan: PruningPlan, sequences: list[Sequence], folder: Path, sensitivity: bool
) -> torch.Tensor:
    """Replace this rank's blocks' ``down_proj``; the shares lost without and with compensation, summed over blocks."""
    shares = torch.zeros(2, dtype=torch.float64)
    solved = folder / "channels"  # apart, as the next pass reads with the weights of uncut blocks
    whole = plan.without_channel_cut(plan.keep_layers)
    for group in policy.moment_groups():
        moments = _moments(policy, [layer for layer in group if layer in plan.keep_layers])
        with masked(policy.model, policy.family, whole, lambda layer, name: load_new_weight(folder, layer, name)):
            policy.read(sequences, [moments], sensitivity)
        for layer in moments.layers:
            weight_HC = load_new_weight(folder, layer, "down_proj")
            if weight_HC is None:
                weight_HC = policy.weight(layer, "down_proj")
            fit = least_squares(weight_HC, moments.take(layer), plan.keep_channels[layer], plan.ridge)
            save_new_weight(solved, layer, "down_proj", fit.weight_HK)
            shares += torch.tensor([fit.error_plain, fit.error], dtype=torch.float64)
    barrier()  # every rank has read the whole weights that these replace
    if policy.rank == 0:
        for file in sorted(solved.glob("*")):
            file.replace(folder / file.name)
        shutil.rmtree(solved, ignore_errors=True)
    barrier()
    return shares
