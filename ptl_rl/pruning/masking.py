"""Run the original model as if it were already sliced: the reference that the export contract compares with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ptl_rl.families import Family
from ptl_rl.pruning.plan import PruningPlan


@contextmanager
def masked(
    model: nn.Module,
    family: Family,
    plan: PruningPlan,
    compensated: Callable[[int], torch.Tensor] | None = None,
) -> Iterator[None]:
    """Within this context removed channels are zero and removed blocks pass their input on.

    Args:
        compensated: gives a block's new (H, K) ``down_proj`` weight over its kept channels, where slicing changes it.
            Called when the block runs, so that no more than one is held.
    """
    handles, keep_layers = [], set(plan.keep_layers)
    for layer, block in enumerate(model.get_submodule(family.layers).children()):
        down_proj = block.get_submodule(f"{family.mlp}.{family.down_proj}")
        keep_C = torch.zeros(plan.source_intermediate_size)
        keep_C[plan.keep_channels[layer]] = 1
        handles.append(
            down_proj.register_forward_pre_hook(
                lambda _m, inputs, keep_C=keep_C: (inputs[0] * keep_C.to(inputs[0]), *inputs[1:])
            )
        )
        if compensated is not None and layer in keep_layers:
            handles.append(
                down_proj.register_forward_hook(
                    lambda module, inputs, _out, layer=layer: nn.functional.linear(
                        inputs[0][..., plan.keep_channels[layer]],
                        compensated(layer).to(inputs[0]),
                        module.bias,
                    )
                )
            )
        if layer not in keep_layers:
            handles.append(block.register_forward_hook(_pass_input_on, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_input_on(_module: nn.Module, args: tuple, kwargs: dict, output):
    inputs = args[0] if args else kwargs["hidden_states"]
    return (inputs, *output[1:]) if isinstance(output, tuple) else inputs
