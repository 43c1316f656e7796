"""Scoring and compensation of one model: on every rank of the pruning worker, or in one process."""

import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ptl_rl.config import CriterionConfig
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import Family
from ptl_rl.pruning import blocks
from ptl_rl.pruning.calibration import Batch, batches_for_rank
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
from ptl_rl.pruning.sharded import read_tensor
from ptl_rl.pruning.slicing import load_new_weight, save_new_weight
from ptl_rl.pruning.statistics import Collector, Needs, Statistics
from ptl_rl.pruning.streaming import CalibrationError, Listener, mean_loss, stream


@dataclass
class Policy:
    """A model to be pruned, and how it reads."""

    model: PreTrainedModel
    family: Family
    source: Path
    """Folder of the checkpoint that the model was loaded from."""
    device: torch.device
    batch_size: int
    pad_token_id: int
    prompt_weight: float
    moments_gib: float | None = None
    """Most memory of a rank for second moments; None: no limit."""
    progress: Callable[[], None] = lambda: None
    """Called after every batch."""

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def layers(self) -> int:
        return len(list(self.model.get_submodule(self.family.layers).children()))

    @property
    def channels(self) -> int:
        """Per block."""
        return self.model.config.intermediate_size

    def moment_groups(self) -> list[list[int]]:
        """Blocks whose second moments are summed up together, so that no rank holds more of them than it may.

        Raises:
            CalibrationError: a rank may not hold one.
        """
        every = list(range(self.layers))
        if self.moments_gib is None:
            return [every]
        each_gib = self.channels**2 * 4 / 2**30
        at_once = int(self.moments_gib / each_gib) * self.ranks
        if not at_once:
            raise CalibrationError(
                f"calibration.moments_gib is {self.moments_gib:g}, but the matrix of one block of {self.channels} "
                f"channels takes {each_gib:.2g}; raise it, or choose a criterion that reads sums, and compensate: none"
            )
        return [every[start : start + at_once] for start in range(0, len(every), at_once)]

    def batches(self, sequences: list[Sequence]) -> Iterator[Batch]:
        for batch in batches_for_rank(
            sequences, self.batch_size, self.rank, self.ranks, self.pad_token_id, self.prompt_weight
        ):
            yield batch
            self.progress()

    def rounds(self, sequences: list[Sequence]) -> int:
        """Batches that every rank reads in one pass."""
        return -(-len(sequences) // (self.batch_size * self.ranks))

    def read(self, sequences: list[Sequence], listeners: list[Listener], sensitivity: bool = False) -> None:
        stream(self.model, self.family, self.batches(sequences), listeners, self.device, sensitivity=sensitivity)

    def weight(self, layer: int, name: str) -> torch.Tensor:
        """A projection's weight, read whole from the checkpoint."""
        return read_tensor(self.source, self.family.projection(layer, name) + ".weight").to(self.device)


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
    for_layers, passes = sequences[: criterion.layer_sequences], 0
    if criterion.is_ptl_reference:
        sequences, general = sequences[:REFERENCE_PROMPTS], general[:REFERENCE_LINES]
    if criterion.layers == "leave_one_out":
        passes = sum(policy.layers - gone for gone in range(cut.layers))
    elif criterion.layers in LAYER_CRITERIA:
        passes = max(0, cut.layers - (for_layers == sequences))
    for_channels = len(policy.moment_groups()) if criterion.is_obs and cut.channels else 1
    return for_channels * policy.rounds(sequences) + policy.rounds(general) + passes * policy.rounds(for_layers)


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
    groups = policy.moment_groups() if criterion.is_obs and cut.channels else []
    needs = replace(Needs(sums=()) if groups else needs_of(function), cosine=criterion.layers == "cosine")
    collector = Collector(policy.model, policy.family, policy.channels, policy.device, needs)
    listeners: list[Listener] = [collector]
    if groups:
        listeners.append(_moments(policy, groups[0]))
    policy.read(sequences, listeners, sensitivity)
    statistics = collector.reduce(remove_channels=cut.channels, seed=seed)
    if general:
        of_general = Collector(policy.model, policy.family, policy.channels, policy.device, needs)
        policy.read(general, [of_general], sensitivity)
        statistics.general = of_general.reduce(remove_channels=cut.channels, seed=seed)
    if groups:
        first = listeners.pop()
        assert isinstance(first, SecondMoments)
        importance_LC = torch.zeros(policy.layers, policy.channels, device=policy.device)
        _obs(policy, first, importance_LC, cut.channels, criterion.ridge)
        for group in groups[1:]:
            moments = _moments(policy, group)
            policy.read(sequences, [moments], sensitivity)
            _obs(policy, moments, importance_LC, cut.channels, criterion.ridge)
        if dist.is_initialized():
            dist.all_reduce(importance_LC)
        importance_LC = importance_LC.cpu()
    else:
        importance_LC = channel_importance(function, statistics, criterion.contrast.weight if criterion.contrast else 0)
    for_layers = every[: criterion.layer_sequences]
    order = _layer_order(policy, criterion, cut, for_layers, statistics if for_layers == sequences else None)
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
    """Which blocks go; ``statistics`` are those of ``sequences`` and the whole model, if they are known already."""
    if criterion.layers == "explicit":
        return blocks.explicit(criterion.layer_ids, cut.layers_before, cut.layers)

    def measured(gone: list[int]) -> torch.Tensor:
        if criterion.layers == "leave_one_out":
            return _losses_without(policy, gone, sequences)
        found = None if gone else statistics
        if found is None:
            needs = Needs(sums=(), cosine=criterion.layers == "cosine")
            collector = Collector(policy.model, policy.family, policy.channels, policy.device, needs)
            with skipped(policy.model, policy.family, gone):
                policy.read(sequences, [collector])
            found = collector.reduce()
        return LAYER_CRITERIA[criterion.layers](found)

    return blocks.greedy(measured, cut.layers)


def _losses_without(policy: Policy, gone: list[int], sequences: list[Sequence]) -> torch.Tensor:
    """(L,) mean loss once ``gone`` and one block more are left out, which is how much that one matters."""
    losses_L = torch.zeros(policy.layers)
    for layer in range(policy.layers):
        if layer not in gone:
            with skipped(policy.model, policy.family, [*gone, layer]):
                losses_L[layer] = mean_loss(policy.model, policy.batches(sequences), policy.device)
    return losses_L


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
    _barrier()
    lost_blocks = [_absorb_block(policy, plan, index, sequences, folder) for index in range(len(plan.layer_order))]
    known = [lost for lost in lost_blocks if lost is not None]
    blocks_lost = sum(known) / len(known) if known else None
    if plan.intermediate_size == plan.source_intermediate_size:
        return Losses(blocks=blocks_lost)
    shares = _absorb_channels(policy, plan, sequences, folder, sensitivity)
    if dist.is_initialized():
        shares = shares.to(policy.device)
        dist.all_reduce(shares)
    plain, left = (shares / plan.num_hidden_layers).tolist()
    return Losses(plain, left, blocks_lost)


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
    _barrier()  # every rank has read the whole weights that these replace
    if policy.rank == 0:
        for file in sorted(solved.glob("*")):
            file.replace(folder / file.name)
        shutil.rmtree(solved, ignore_errors=True)
    _barrier()
    return shares


def _absorb_block(
    policy: Policy, plan: PruningPlan, index: int, sequences: list[Sequence], folder: Path
) -> float | None:
    """Let the nearest kept predecessor of a removed block take over; the share that stays lost, None if none can."""
    removed = plan.layer_order[index]
    before = [layer for layer in plan.keep_layers if layer < removed]
    if not before:
        return None
    predecessor = before[-1]
    gone = set(plan.layer_order[:index])
    so_far = plan.without_channel_cut([layer for layer in range(policy.layers) if layer not in gone])

    def current(name: str) -> torch.Tensor:
        weight = load_new_weight(folder, predecessor, name)
        return (policy.weight(predecessor, name) if weight is None else weight.to(policy.device)).float()

    moments = _block_moments(policy, removed, predecessor, current)
    with masked(policy.model, policy.family, so_far, lambda layer, name: load_new_weight(folder, layer, name)):
        policy.read(sequences, [moments])
    moments.reduce()
    lost = 0.0
    if policy.rank == 0:
        if isinstance(moments, blocks.NormedBlockMoments):
            down_HC, norm_H, lost = moments.solve(current("down_proj"), plan.block_ridge)
            new = {"down_proj": down_HC, "output_norm": norm_H - policy.family.norm_offset}
        else:
            o_proj, down_proj = current("o_proj"), current("down_proj")
            gain_o, gain_down, lost = moments.solve(o_proj.shape[1], plan.block_ridge)
            new = {"o_proj": o_proj + gain_o, "down_proj": down_proj + gain_down}
        for name, weight in new.items():
            save_new_weight(folder, predecessor, name, weight)
    _barrier()
    if dist.is_initialized():
        shared = torch.tensor([lost], dtype=torch.float64, device=policy.device)
        dist.broadcast(shared, 0)
        lost = float(shared)
    return lost


def _block_moments(
    policy: Policy, removed: int, predecessor: int, current: Callable[[str], torch.Tensor]
) -> blocks.BlockMoments | blocks.NormedBlockMoments:
    family = policy.family
    if family.output_norm is None:
        return blocks.BlockMoments(removed, predecessor)
    block = list(policy.model.get_submodule(family.layers).children())[predecessor]
    eps = block.get_submodule(family.output_norm).eps
    return blocks.NormedBlockMoments(removed, predecessor, family.norm_offset + current("output_norm"), float(eps))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
