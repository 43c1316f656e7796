"""Importance criteria: pure functions from calibration statistics to scores. Large means: keep.

A criterion of one's own is such a function in one's own file; ``criterion.path`` names the file, ``criterion.channels``
the function; :func:`reads` says what it reads. ``obs`` needs more than sums and stands in
:mod:`ptl_rl.pruning.compensate.algebra`. ``leave_one_out`` and ``explicit`` need none; see
:mod:`ptl_rl.pruning.choose.blocks`.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ptl_rl.errors import UserError
from ptl_rl.pruning.score.statistics import CHANNEL_SUMS, Needs, Statistics

ChannelCriterion = Callable[[Statistics], torch.Tensor]
"""From statistics to importance (L, C)."""


class CriterionError(UserError, ValueError):
    """A criterion that cannot be had, or that returned something else than importances; names file and function."""


def reads(
    *, sums: tuple[str, ...] = tuple(CHANNEL_SUMS), gradients: bool = False, last_tokens: bool = False
) -> Callable[[ChannelCriterion], ChannelCriterion]:
    """Decorator: says which statistics a criterion reads.

    Args:
        sums: of ``sum``, ``abs_sum`` and ``square_sum``; the others are NaN.
        gradients: ``gradient_sum_LC``, None without.
        last_tokens: ``last_lowest_LC`` and ``last_highest_LC``, None without.
    """

    def mark(criterion: ChannelCriterion) -> ChannelCriterion:
        if unknown := set(sums) - set(CHANNEL_SUMS):
            raise CriterionError(
                f"criterion {getattr(criterion, '__name__', criterion)} reads {', '.join(sorted(unknown))}; "
                f"there are {', '.join(CHANNEL_SUMS)}"
            )
        criterion.needs = Needs(sums, gradients=gradients, last_tokens=last_tokens)  # type: ignore[attr-defined]
        return criterion

    return mark


def _mean(sum_LC: torch.Tensor, weight_L: torch.Tensor) -> torch.Tensor:
    return sum_LC / weight_L[:, None]


@reads(sums=("abs_sum",))
def activation(statistics: Statistics) -> torch.Tensor:
    """Paper Eq. 4: mean absolute activation ``E|h_j|`` over reasoning tokens; (L, C) float32."""
    return _mean(statistics.abs_sum_LC, statistics.channel_weight_L).float()


@reads(sums=("square_sum",))
def rms_contribution(statistics: Statistics) -> torch.Tensor:
    """Size of the change in paper Eq. 2, ``sqrt(E[h_j^2]) * ||W_down[:, j]||``; (L, C) float32."""
    mean_square_LC = _mean(statistics.square_sum_LC, statistics.channel_weight_L)
    return (mean_square_LC.sqrt() * statistics.down_norm_LC).float()


@reads(sums=("sum", "square_sum"))
def fluctuation(statistics: Statistics) -> torch.Tensor:
    """``Var[h_j] * ||W_down[:, j]||^2``, what a constant could not stand in for (An et al. 2024); (L, C) float32."""
    mean_LC = _mean(statistics.sum_LC, statistics.channel_weight_L)
    variance_LC = _mean(statistics.square_sum_LC, statistics.channel_weight_L) - mean_LC.square()
    return (variance_LC.clamp_min(0) * statistics.down_norm_LC.square()).float()


@reads(sums=("square_sum",))
def wanda(statistics: Statistics) -> torch.Tensor:
    """``sqrt(E[h_j^2]) * sum_i |W_down[i, j]|``: weight times activation (Sun et al. 2024), summed over a column."""
    mean_square_LC = _mean(statistics.square_sum_LC, statistics.channel_weight_L)
    return (mean_square_LC.sqrt() * statistics.down_abs_LC).float()


@reads(sums=(), gradients=True)
def taylor(statistics: Statistics) -> torch.Tensor:
    """``E|h_j * dL/dh_j|``, the first order of the loss's change without the channel (Molchanov et al. 2017)."""
    assert statistics.gradient_sum_LC is not None
    return _mean(statistics.gradient_sum_LC, statistics.channel_weight_L).float()


@reads(sums=())
def magnitude(statistics: Statistics) -> torch.Tensor:
    """Euclidean norm of the channel's weights in all three projections; reads no data."""
    squares_LC = statistics.gate_norm_LC.square() + statistics.up_norm_LC.square() + statistics.down_norm_LC.square()
    return squares_LC.sqrt().float()


@reads(sums=())
def random(statistics: Statistics) -> torch.Tensor:
    """Uniform numbers that follow from the run's seed and the cycle."""
    return torch.rand(statistics.sum_LC.shape, generator=torch.Generator().manual_seed(statistics.seed))


@reads(sums=(), last_tokens=True)
def ptl_reference(statistics: Statistics) -> torch.Tensor:
    """The rule of the paper's released code, for comparison.

    A channel may go if the last token's signed ``h_j`` is among its block's ``n`` lowest in every reasoning sequence,
    and not among the ``n`` highest in every line of general text; of these, the first by index go. ``n`` is the
    smallest number that gives as many as are to be removed; where none does, the one that gives most, and then those
    go that are lowest. Returns numbers below 1 for the channels that go, in their order, and 1 for the others.
    """
    general = statistics.general
    if statistics.last_lowest_LC is None or general is None or general.last_highest_LC is None:
        raise CriterionError(
            "criterion.channels: ptl_reference compares with general text; set criterion.contrast.data"
        )
    importance_LC = torch.ones(statistics.last_lowest_LC.shape)
    for layer, (lowest_C, highest_C) in enumerate(zip(statistics.last_lowest_LC, general.last_highest_LC, strict=True)):
        gone = _first_by_index(lowest_C, highest_C, statistics.remove_channels)
        importance_LC[layer, gone] = torch.arange(len(gone)) / (len(gone) + 1)
    return importance_LC


def _first_by_index(lowest_C: torch.Tensor, highest_C: torch.Tensor, remove: int) -> torch.Tensor:
    """Ids of the channels that :func:`ptl_reference` removes from one block."""
    # Channel j is a candidate for every n above its place among the lowest, up to its place among the highest.
    change = torch.zeros(len(lowest_C) + 2, dtype=torch.int64)
    enters_C, leaves_C = lowest_C + 1, torch.maximum(highest_C + 1, lowest_C + 1)
    change.index_add_(0, enters_C, torch.ones_like(enters_C))
    change.index_add_(0, leaves_C, -torch.ones_like(leaves_C))
    candidates_n = change.cumsum(0)
    enough = (candidates_n >= remove).nonzero()
    n = int(enough[0]) if len(enough) else int(candidates_n.argmax())
    is_candidate_C = (lowest_C < n) & (highest_C >= n)
    # Candidates come first, in the order of their ids; the others follow, lowest first.
    order_C = torch.where(is_candidate_C, torch.arange(len(lowest_C)), len(lowest_C) * (1 + lowest_C))
    return order_C.argsort(stable=True)[:remove]


def block_influence(statistics: Statistics) -> torch.Tensor:
    """Paper Eq. 5: mean norm of what a block adds to the residual stream; (L,) float32."""
    return (statistics.change_sum_L / statistics.block_weight_L).float()


def cosine(statistics: Statistics) -> torch.Tensor:
    """``1 - E[cos(input, output)]`` of a block (Men et al. 2024, ShortGPT); (L,) float32."""
    return (1 - statistics.cosine_sum_L / statistics.block_weight_L).float()


CHANNEL_CRITERIA: dict[str, ChannelCriterion] = {
    function.__name__: function
    for function in (activation, rms_contribution, fluctuation, wanda, taylor, magnitude, random, ptl_reference)
}
LAYER_CRITERIA: dict[str, Callable[[Statistics], torch.Tensor]] = {
    "block_influence": block_influence,
    "cosine": cosine,
}


def needs_of(criterion: ChannelCriterion) -> Needs:
    """What a criterion reads: its attribute ``needs``, as :func:`reads` sets it."""
    return getattr(criterion, "needs", Needs())


def load_criterion(name: str, path: str | None) -> ChannelCriterion:
    """The channel criterion ``name``, of this project or of the user's file at ``path``.

    Raises:
        CriterionError: no such file or function, or the file cannot be imported.
    """
    if path is None:
        return CHANNEL_CRITERIA[name]
    file = Path(path)
    if not file.is_file():
        raise CriterionError(f"criterion.path: {file}: no such file")
    module_name = f"ptl_user_criterion_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise CriterionError(f"criterion.path: {file}: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise CriterionError(f"criterion.path: {file}: cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise CriterionError(f"criterion.channels: {file} has no function {name}")
    return function


def try_out(criterion: ChannelCriterion) -> None:
    """Call a criterion on made-up statistics of a small model; raises :class:`CriterionError` if that fails."""
    layers, channels = 2, 8
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    places = torch.arange(channels).expand(layers, channels)
    of_channels = ("sum", "abs_sum", "square_sum", "gate_norm", "up_norm", "down_norm", "down_abs")
    of_blocks = ("channel_weight", "change_sum", "cosine_sum", "block_weight")
    values: dict[str, Any] = {f"{name}_LC": numbers(layers, channels) for name in of_channels}
    values |= {f"{name}_L": numbers(layers) for name in of_blocks}
    for name in CHANNEL_SUMS.keys() - needs_of(criterion).sums:
        values[f"{name}_LC"] = torch.full((layers, channels), torch.nan)
    if needs_of(criterion).gradients:
        values["gradient_sum_LC"] = numbers(layers, channels)
    if needs_of(criterion).last_tokens:
        values |= dict.fromkeys(("last_lowest_LC", "last_highest_LC"), places)
    made_up = Statistics(**values, remove_channels=2)
    _checked(criterion, made_up)


def channel_importance(criterion: ChannelCriterion, statistics: Statistics, contrast: float) -> torch.Tensor:
    """(L, C) float32 importance; with general text, its importance for that is taken off, ``contrast`` times.

    Both are taken relative to their block's mean, as their sizes cannot be compared.

    Raises:
        CriterionError: the criterion did not return one finite number per channel.
    """
    importance_LC = _checked(criterion, statistics)
    if statistics.general is None or criterion is ptl_reference:
        return importance_LC
    general_LC = _checked(criterion, statistics.general)
    return _relative(importance_LC) - contrast * _relative(general_LC)


def _checked(criterion: ChannelCriterion, statistics: Statistics) -> torch.Tensor:
    name = getattr(criterion, "__name__", repr(criterion))
    try:
        importance_LC = criterion(statistics)
    except CriterionError:
        raise
    except Exception as error:  # a user's criterion may raise anything
        raise CriterionError(f"criterion {name} raised {type(error).__name__}: {error}") from error
    wanted = tuple(statistics.sum_LC.shape)
    if not isinstance(importance_LC, torch.Tensor) or tuple(importance_LC.shape) != wanted:
        found = tuple(importance_LC.shape) if isinstance(importance_LC, torch.Tensor) else type(importance_LC).__name__
        raise CriterionError(f"criterion {name} must return a tensor of shape {wanted}, not {found}")
    if not importance_LC.isfinite().all():
        raise CriterionError(f"criterion {name} returned numbers that are not finite")
    return importance_LC.float().cpu()


def _relative(importance_LC: torch.Tensor) -> torch.Tensor:
    return importance_LC / importance_LC.abs().mean(dim=1, keepdim=True).clamp_min(1e-30)
