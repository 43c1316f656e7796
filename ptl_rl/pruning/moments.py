"""Streaming second moments ``C = sum of w h h^T`` of every block's FFN channels, for compensation and ``obs``.

One matrix is (C, C) for C channels, 1.4 GB in float32 at 18944 channels, so no rank keeps them all: block l belongs to
rank l modulo ranks, every rank adds its tokens' share to it in each forward pass, and the solve for a block runs where
its matrix is. What a rank holds beside its own is one matrix, while it is being reduced.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from ptl_rl.families import Family


class SecondMoments:
    """Holds this rank's matrices and the hooks that fill them; use :meth:`attached` around the forward passes."""

    def __init__(self, model: nn.Module, family: Family, channels: int, device: torch.device) -> None:
        self.blocks = list(model.get_submodule(family.layers).children())
        self.family = family
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.own_CC = {layer: torch.zeros(channels, channels, device=device) for layer in self.own_layers}
        """Block to its float32 sum over all tokens of all ranks, for the blocks that this rank owns."""
        self._root_N1 = torch.zeros(0, 1, device=device)

    @property
    def own_layers(self) -> range:
        return range(self.rank, len(self.blocks), self.ranks)

    def start_batch(self, weight_BT: torch.Tensor) -> None:
        """Announce how much each position of the batch counts that the next forward pass reads."""
        self._root_N1 = weight_BT.reshape(-1, 1).sqrt()

    def _on_channels(self, layer: int, inputs: tuple) -> None:
        hidden_NC = inputs[0].flatten(0, -2).float() * self._root_N1
        if self.ranks == 1:
            self.own_CC[layer].addmm_(hidden_NC.T, hidden_NC)
            return
        share_CC = hidden_NC.T @ hidden_NC
        dist.reduce(share_CC, dst=layer % self.ranks)
        if layer in self.own_CC:
            self.own_CC[layer] += share_CC

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on the model within this context only."""
        handles = []
        for layer, block in enumerate(self.blocks):
            down_proj = block.get_submodule(f"{self.family.mlp}.{self.family.down_proj}")
            handles.append(
                down_proj.register_forward_pre_hook(lambda _m, inputs, layer=layer: self._on_channels(layer, inputs))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
