"""Slice a model in training together with its optimizer, so that a smaller one goes on where it stood.

What is dropped was cut in place before: it is zero, and so are its moments. The smaller model then computes the same,
and AdamW's next step changes what stays as it would have changed it in the larger one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ptl_rl.errors import UserError
from ptl_rl.families import Family
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.in_place import not_zero
from ptl_rl.pruning.slice.slicing import Piece, piece_of


class NotCut(RuntimeError):
    """A part that is to be dropped is not zero; the message names it."""


class UnknownOptimizer(UserError, ValueError):
    """An optimizer whose state cannot be sliced; the message says why."""


@dataclass(frozen=True)
class TrainingState:
    """Of the smaller model, sharded as the larger one is; what is not sliced is not copied."""

    model: dict[str, Any]
    """As its ``state_dict`` would be."""
    optimizer: dict[str, Any]
    """As its optimizer's ``state_dict`` would be, with parameters in the model's order."""


def _whole(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All of a tensor, on every rank, whose shards may wait in host memory; collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor.to_local().to(device)
    placed = DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return placed.full_tensor()


def _shared_out(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor sharded as another one, each rank with a copy of its own part alone; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole.to(like.device)
    local = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local().clone()
    placed = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return placed.to(like.to_local().device)  # `from_local` moves to the mesh's device what waits in host memory


def _sliced(tensor: torch.Tensor, piece: Piece, plan: PruningPlan, device: torch.device) -> torch.Tensor:
    if piece.dim is None:
        return tensor.detach()
    kept = torch.tensor(plan.keep_channels[piece.layer])
    whole = _whole(tensor.detach(), device)
    return _shared_out(whole.index_select(piece.dim, kept.to(whole.device)), tensor)


def names_in_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its order, which must be the model's.

    Raises:
        UnknownOptimizer: it has others, or keeps them otherwise.
    """
    groups, remedy = optimizer.param_groups, "set schedule.rematerialise to never"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if len(groups) != 1:
        raise UnknownOptimizer(
            f"the optimizer has {len(groups)} groups of parameters, and only one can be sliced; {remedy}"
        )
    found = [names.get(id(parameter)) for parameter in groups[0]["params"]]
    if found != list(names.values()):
        raise UnknownOptimizer(f"the optimizer's parameters are not all of the model's, in the model's order; {remedy}")
    return list(names.values())


@torch.no_grad()
def sliced_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, family: Family, plan: PruningPlan, device: torch.device
) -> TrainingState:
    """What a model that was sliced by ``plan`` has to load to go on from here; collective.

    A rank holds one projection whole at a time, and its own shards of the sliced ones.

    Args:
        model: whose channels and blocks that go were zeroed by :func:`ptl_rl.pruning.slice.in_place.cut_in_place`;
            sharded by FSDP2 or whole.
        plan: of the shapes that the model has.
        device: where shards are put together.

    Raises:
        NotCut: something that goes is not zero.
        UnknownOptimizer: it keeps its parameters otherwise than in one group of all of them.
    """
    if wrong := not_zero(model, family, plan):
        raise NotCut(f"{wrong[0]} is to lose what is not zero; this is a bug of this project, do not go on from here")
    new_index = {old: new for new, old in enumerate(plan.keep_layers)}
    weights, moments = dict[str, Any](), dict[int, Any]()
    for name, tensor in model.state_dict().items():
        if (piece := piece_of(name, family, new_index)) is not None:
            weights[piece.name] = _sliced(tensor, piece, plan, device)
    saved, parameters = optimizer.state_dict(), dict(model.named_parameters())
    for place, name in enumerate(names_in_order(model, optimizer)):
        if (piece := piece_of(name, family, new_index)) is None:
            continue
        found = moments[len(moments)] = dict(saved["state"].get(place, {}))
        for key, value in found.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[name].shape:
                found[key] = _sliced(value, piece, plan, device)
    (group,) = saved["param_groups"]
    return TrainingState(weights, {"state": moments, "param_groups": [{**group, "params": list(moments)}]})
