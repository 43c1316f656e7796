"""Run the original model as if it were already sliced: the reference that the export contract compares with.

Also what scoring reads with when blocks are already chosen to go.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ptl_rl.families import Family
from ptl_rl.pruning.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NewWeights = Callable[[int, str], torch.Tensor | None]
"""From a source block and the name of a projection to the weight that slicing gives it; None: its own."""


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are in place; they are removed behind this context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked(
    model: nn.Module, family: Family, plan: PruningPlan, new_weights: NewWeights | None = None
) -> Iterator[None]:
    """Within this context removed channels are zero and removed blocks pass their input on.

    Args:
        new_weights: where slicing changes what stays: (H, K) ``down_proj`` weights over kept channels, whole ``o_proj``
            weights. Called when the block runs, so that no more than one is held.
    """
    handles, keep_layers = [], set(plan.keep_layers)
    blocks = list(model.get_submodule(family.layers).children())
    for layer, block in enumerate(blocks):
        if layer not in keep_layers:
            continue
        down_proj = block.get_submodule(f"{family.mlp}.{family.down_proj}")
        keep_C = torch.zeros(plan.source_intermediate_size)
        keep_C[plan.keep_channels[layer]] = 1
        handles.append(
            down_proj.register_forward_pre_hook(
                lambda _m, inputs, keep_C=keep_C: (inputs[0] * keep_C.to(inputs[0]), *inputs[1:])
            )
        )
    gone = [layer for layer in range(len(blocks)) if layer not in keep_layers]
    with (
        hooked(handles),
        replaced(model, family, new_weights, plan.keep_layers, plan.keep_channels) if new_weights else nullcontext(),
        skipped(model, family, gone),
    ):
        yield


@contextmanager
def replaced(
    model: nn.Module,
    family: Family,
    new_weights: NewWeights,
    layers: Collection[int],
    keep_channels: list[list[int]] | None = None,
) -> Iterator[None]:
    """Within this context the blocks ``layers`` have their new weights.

    Args:
        keep_channels: of every block of the model, where new ``down_proj`` weights stand over these only.
    """
    handles = []
    for layer, block in enumerate(model.get_submodule(family.layers).children()):
        if layer in layers:
            channels = None if keep_channels is None else keep_channels[layer]
            handles += replaced_in(block, family, partial(new_weights, layer), channels)
    with hooked(handles):
        yield


def replaced_in(
    block: nn.Module,
    family: Family,
    new_weights: Callable[[str], torch.Tensor | None],
    channels: list[int] | None = None,
) -> list[RemovableHandle]:
    """Hooks that give one block the new weights by the projections' names; the block's own until they are removed.

    Args:
        channels: ids that the new ``down_proj`` stands over, all if None.
    """
    down_proj = block.get_submodule(f"{family.mlp}.{family.down_proj}")
    o_proj = block.get_submodule(f"{family.attention}.{family.o_proj}")
    handles = [
        _replaced(down_proj, "down_proj", new_weights, channels),
        _replaced(o_proj, "o_proj", new_weights),
    ]
    if family.output_norm is not None:
        handles.append(_replaced_norm(block.get_submodule(family.output_norm), family.norm_offset, new_weights))
    return handles


def _replaced(
    projection: nn.Module,
    name: str,
    new_weights: Callable[[str], torch.Tensor | None],
    channels: list[int] | None = None,
) -> RemovableHandle:
    def forward(module: nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        weight = new_weights(name)
        if weight is None:
            return output
        hidden = inputs[0] if channels is None else inputs[0][..., channels]
        return nn.functional.linear(hidden, weight.to(hidden), module.bias)

    return projection.register_forward_hook(forward)


def _replaced_norm(
    norm: nn.Module, offset: float, new_weights: Callable[[str], torch.Tensor | None]
) -> RemovableHandle:
    def forward(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        weight = new_weights("output_norm")
        if weight is None:
            return output
        hidden = inputs[0].float()
        root = (hidden.square().mean(-1, keepdim=True) + module.eps).rsqrt()
        return (hidden * root * (offset + weight.to(hidden))).to(output)

    return norm.register_forward_hook(forward)


@contextmanager
def skipped(model: nn.Module, family: Family, layers: Collection[int]) -> Iterator[None]:
    """Within this context the blocks ``layers`` pass their input on."""
    blocks = list(model.get_submodule(family.layers).children())
    with hooked([blocks[layer].register_forward_hook(_pass_input_on, with_kwargs=True) for layer in layers]):
        yield


def _pass_input_on(_module: nn.Module, args: tuple, kwargs: dict, output):
    inputs = args[0] if args else kwargs["hidden_states"]
    return (inputs, *output[1:]) if isinstance(output, tuple) else inputs


@contextmanager
def only_blocks(model: "PreTrainedModel", family: Family, kept: list[int]) -> Iterator[None]:
    """Within this context the model has the blocks ``kept`` and no others, and they are numbered anew from 0.

    Of a model whose other blocks were cut in place, and so add nothing, what it computes stays the same.
    """
    parent_name, _, name = family.layers.rpartition(".")
    parent = model.get_submodule(parent_name)
    whole = model.get_submodule(family.layers)
    blocks = list(whole.children())
    if kept == list(range(len(blocks))):
        yield
        return
    with torch.no_grad():  # FSDP2 learns at a model's first call which modules are its blocks
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
    lists = {
        field: values
        for field in family.per_layer_fields
        if isinstance(values := getattr(model.config, field, None), list)
    }
    try:
        setattr(parent, name, nn.ModuleList([blocks[layer] for layer in kept]))
        for field, values in lists.items():
            setattr(model.config, field, [values[layer] for layer in kept])
        yield
    finally:
        setattr(parent, name, whole)
        for field, values in lists.items():
            setattr(model.config, field, values)
