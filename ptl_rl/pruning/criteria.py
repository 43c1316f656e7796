"""Importance criteria: pure functions from calibration statistics to scores. Large means: keep.

Source: the paper's Eq. 2-4 for channels (what a channel adds to its layer's output is ``h_j * W_down[:, j]``) and
Eq. 5-6 for blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Statistics:
    """Weighted sums over all calibration tokens of all ranks. L blocks, C channels per block; float64."""

    abs_sum_LC: torch.Tensor
    square_sum_LC: torch.Tensor
    channel_weight_L: torch.Tensor
    """Sum of the weights in the two above."""
    down_norm_LC: torch.Tensor
    """Euclidean norm of every column of ``down_proj``."""
    change_sum_L: torch.Tensor
    """Sum over tokens of the norm of (block output - block input)."""
    block_weight_L: torch.Tensor
    """Sum of the weights in the one above."""


def activation(statistics: Statistics) -> torch.Tensor:
    """Paper Eq. 4: mean absolute activation ``E|h_j|`` over reasoning tokens; (L, C) float32."""
    return (statistics.abs_sum_LC / statistics.channel_weight_L[:, None]).float()


def rms_contribution(statistics: Statistics) -> torch.Tensor:
    """Size of Eq. 2's change, ``sqrt(E[h_j^2]) * ||W_down[:, j]||``; (L, C) float32."""
    mean_square_LC = statistics.square_sum_LC / statistics.channel_weight_L[:, None]
    return (mean_square_LC.sqrt() * statistics.down_norm_LC).float()


def block_influence(statistics: Statistics) -> torch.Tensor:
    """Paper Eq. 5: mean norm of what a block adds to the residual stream; (L,) float32."""
    return (statistics.change_sum_L / statistics.block_weight_L).float()


CHANNEL_CRITERIA: dict[str, Callable[[Statistics], torch.Tensor]] = {
    "activation": activation,
    "rms_contribution": rms_contribution,
}
LAYER_CRITERIA: dict[str, Callable[[Statistics], torch.Tensor]] = {"block_influence": block_influence}
