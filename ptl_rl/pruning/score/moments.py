"""Streaming second moments ``C = sum of w h h^T`` of every block's FFN channels, which ``obs`` needs.

One matrix is (C, C) for C channels, 1.4 GB in float32 at 18944 channels, so no rank keeps them all: block l belongs to
rank l modulo ranks, every rank adds its tokens' share to it batch by batch, and the solve for a block runs where
its matrix is. What a rank holds beside its own is one matrix, while it is being reduced. As the matrices are
symmetric, a batch adds to stripes of their upper half only, which is 9/16 of the products.

Where a block norms its FFN's output (Gemma 2, 3), ``w`` is the position's weight over the output's mean square: an
error at a position where the output is small is as large behind the norm as a large one where it is large.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ptl_rl.pruning.score.streaming import Listener

STRIPES = 8


def _stripes(width: int) -> Iterator[tuple[slice, slice]]:
    """Rows, and the columns from where these rows meet the diagonal."""
    height = -(-width // STRIPES)
    for start in range(0, width, height):
        yield slice(start, start + height), slice(start, None)


@contextmanager
def as_read(values: torch.Tensor) -> Iterator[None]:
    """Within this context a GPU may take float32 factors at TF32's 11 bits, if ``values``, which they came from, have
    no more: bfloat16 has 8, float16 11. Times the root of a position's weight they may not fit and are rounded, by
    2^-12 at most, far less than they had been; sums stay float32, and the products are several times as fast."""
    before = torch.get_float32_matmul_precision()
    if values.device.type == "cuda" and values.dtype in (torch.bfloat16, torch.float16):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_products(sum_XX: torch.Tensor, x_NX: torch.Tensor) -> None:
    """Add ``x^T x`` to ``sum_XX``, above whose diagonal stripes it then is; :func:`fill_lower` does the rest."""
    for rows, columns in _stripes(len(sum_XX)):
        sum_XX[rows, columns].addmm_(x_NX[:, rows].T, x_NX[:, columns])


def fill_lower(sum_XX: torch.Tensor) -> torch.Tensor:
    """Mirror what :func:`add_products` has added up; in place."""
    for rows, columns in _stripes(len(sum_XX)):
        sum_XX[columns, rows] = sum_XX[rows, columns].T.clone()
    return sum_XX


class SecondMoments(Listener):
    """Sums up this rank's matrices."""

    by_normed_output = True

    def __init__(self, layers: int, channels: int, device: torch.device, wanted: Collection[int] | None = None) -> None:
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.wanted = set(range(layers) if wanted is None else wanted)
        """Blocks that are summed up."""
        own = [layer for layer in sorted(self.wanted) if layer % self.ranks == self.rank]
        self.channels, self.device = channels, device
        self._upper_CC = {layer: torch.zeros(channels, channels, device=device) for layer in own}
        """Block to its float32 sum over all tokens of all ranks, below whose diagonal stripes nothing stands."""

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        if layer not in self.wanted:
            return
        alone = self.ranks == 1
        sum_CC = self._upper_CC[layer] if alone else torch.zeros(self.channels, self.channels, device=self.device)
        with as_read(hidden_NC):
            add_products(sum_CC, hidden_NC.float() * weight_N.sqrt()[:, None])
        if alone:
            return
        dist.reduce(sum_CC, dst=layer % self.ranks)
        if layer in self._upper_CC:
            self._upper_CC[layer] += sum_CC

    @property
    def layers(self) -> list[int]:
        """Blocks whose matrices this rank owns and has not handed out."""
        return list(self._upper_CC)

    def take(self, layer: int) -> torch.Tensor:
        """``C`` of a block, (channels, channels) float32, which is held here no longer."""
        return fill_lower(self._upper_CC.pop(layer))
