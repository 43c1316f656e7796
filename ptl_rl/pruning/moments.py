"""Streaming second moments ``C = sum of w h h^T`` of every block's FFN channels, for compensation and ``obs``.

One matrix is (C, C) for C channels, 1.4 GB in float32 at 18944 channels, so no rank keeps them all: block l belongs to
rank l modulo ranks, every rank adds its tokens' share to it batch by batch, and the solve for a block runs where
its matrix is. What a rank holds beside its own is one matrix, while it is being reduced.
"""

from collections.abc import Collection

import torch
import torch.distributed as dist

from ptl_rl.pruning.streaming import Listener


class SecondMoments(Listener):
    """Sums up this rank's matrices."""

    def __init__(self, layers: int, channels: int, device: torch.device, wanted: Collection[int] | None = None) -> None:
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.wanted = set(range(layers) if wanted is None else wanted)
        """Blocks that are summed up."""
        own = [layer for layer in sorted(self.wanted) if layer % self.ranks == self.rank]
        self.own_CC = {layer: torch.zeros(channels, channels, device=device) for layer in own}
        """Block to its float32 sum over all tokens of all ranks, for the blocks that this rank owns."""

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        if layer not in self.wanted:
            return
        hidden_NC = hidden_NC.float() * weight_N.sqrt()[:, None]
        if self.ranks == 1:
            self.own_CC[layer].addmm_(hidden_NC.T, hidden_NC)
            return
        share_CC = hidden_NC.T @ hidden_NC
        dist.reduce(share_CC, dst=layer % self.ranks)
        if layer in self.own_CC:
            self.own_CC[layer] += share_CC
