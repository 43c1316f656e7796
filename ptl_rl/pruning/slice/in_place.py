"""Cut a model that is being trained, without changing a shape: what goes is zeroed, and so are its optimizer moments.

The model then computes what the sliced one computes, and goes on doing so. A channel whose ``gate_proj`` and
``up_proj`` rows and ``down_proj`` column are zero puts out zero, and each of the three gets a gradient of zero, as it
is multiplied by another one of them. A block goes with all its channels, ``v_proj`` and ``o_proj``: it adds nothing to
the residual stream, and nothing in it gets a gradient. AdamW leaves a weight at zero that has neither gradient nor
moments, whatever its weight decay; clipping and terms of the loss change no gradient of zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

# There is no public way to ask a DTensor which part of the whole it holds.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ptl_rl.errors import UserError
from ptl_rl.families import Family
from ptl_rl.pruning.plan import PruningPlan


class CannotCutInPlace(UserError, ValueError):
    """A model whose removed parts would not stay at zero; the message says why."""


@dataclass(frozen=True)
class _Gone:
    """What of one parameter is zeroed."""

    name: str
    dim: int = 0
    ids: torch.Tensor | None = None
    """Ascending, along ``dim``; None: everything."""


def _gone(family: Family, plan: PruningPlan, parameters: set[str]) -> Iterator[_Gone]:
    every = torch.arange(plan.source_intermediate_size)
    for layer, kept in enumerate(plan.keep_channels):
        prefix, stays = family.layer_prefix(layer), layer in plan.keep_layers
        ids = every[~torch.isin(every, torch.tensor(kept))] if stays else None
        mlp, attention = prefix + family.mlp, prefix + family.attention
        parts = [_Gone(f"{mlp}.{name}.{kind}", 0, ids) for name in (family.gate_proj, family.up_proj) for kind in KINDS]
        parts.append(_Gone(f"{mlp}.{family.down_proj}.weight", 1, ids))
        if not stays:
            parts += [_Gone(f"{attention}.v_proj.{kind}") for kind in KINDS]
            parts.append(_Gone(f"{attention}.{family.o_proj}.weight"))
            for bias in (f"{attention}.{family.o_proj}.bias", f"{mlp}.{family.down_proj}.bias"):
                if bias in parameters:
                    raise CannotCutInPlace(
                        f"{bias}: a removed block would go on learning its bias; remove channels only, or slice"
                    )
        missing = [part.name for part in parts if part.name.endswith(".weight") and part.name not in parameters]
        if missing:
            raise CannotCutInPlace(f"the model has no parameter {missing[0]}: is it wrapped, and its names with it?")
        yield from (part for part in parts if part.name in parameters)


KINDS = ("weight", "bias")


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's part of a tensor, which shares its memory, and where in the whole it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def _own(tensor: torch.Tensor, gone: _Gone) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a tensor, and which of it goes, as places along ``gone.dim``."""
    local, offset = _local(tensor)
    if gone.ids is None:
        return local, torch.arange(local.shape[gone.dim], device=local.device)
    ids = gone.ids - offset[gone.dim]
    return local, ids[(ids >= 0) & (ids < local.shape[gone.dim])].to(local.device)


def _zero(tensor: torch.Tensor, gone: _Gone) -> None:
    local, places = _own(tensor, gone)
    local.index_fill_(gone.dim, places, 0)


@torch.no_grad()
def cut_in_place(
    model: nn.Module, family: Family, plan: PruningPlan, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Zero what ``plan`` leaves out, in the weights, their gradients and every moment of ``optimizer``.

    Every rank changes its own shard, and nothing is sent. Doing it twice changes nothing; a later plan that keeps
    less cuts further.

    Args:
        model: of the plan's source shapes, sharded by FSDP2 or whole.
        plan: of the shapes that the model has, whatever was cut of it before.

    Raises:
        CannotCutInPlace: blocks go, and their projections have biases, or the model's parameters have other names;
            nothing was changed.
    """
    parameters = dict(model.named_parameters())
    for gone in list(_gone(family, plan, set(parameters))):
        parameter = parameters[gone.name]
        _zero(parameter, gone)
        if parameter.grad is not None:
            _zero(parameter.grad, gone)
        for moment in (optimizer.state.get(parameter, {}) if optimizer else {}).values():
            if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
                _zero(moment, gone)


@torch.no_grad()
def not_zero(model: nn.Module, family: Family, plan: PruningPlan) -> list[str]:
    """Names of parameters of which this rank holds something that ``plan`` leaves out and that is not zero."""
    parameters = dict(model.named_parameters())
    found = []
    for gone in _gone(family, plan, set(parameters)):
        local, places = _own(parameters[gone.name], gone)
        if bool(local.index_select(gone.dim, places).any()):
            found.append(gone.name)
    return found


@torch.no_grad()
def own_rows(parameter: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A copy of the rows of a whole weight that this rank holds of ``parameter``."""
    local, offset = _local(parameter)
    return weight[offset[0] : offset[0] + local.shape[0]].to(local, copy=True)


@torch.no_grad()
def shard_of(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of this rank's part of a parameter, for :func:`put_rows`."""
    return _local(parameter)[0].clone()


@torch.no_grad()
def put_rows(parameter: torch.Tensor, rows: torch.Tensor, columns: list[int] | None = None) -> None:
    """Write what :func:`own_rows` gave into a parameter, each rank its own part.

    Args:
        columns: ascending ids that the rows' columns stand at, where there are fewer than the parameter has; the
            others keep their values.
    """
    local, offset = _local(parameter)
    if columns is None:
        local.copy_(rows)
        return
    local.index_copy_(1, torch.tensor(columns, device=local.device) - offset[1], rows)
