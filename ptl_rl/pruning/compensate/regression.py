"""What one regression of :mod:`ptl_rl.pruning.compensate.refit` needs of the calibration tokens, and its solution.

Every rank adds up its own tokens' part; once these are together on all ranks, each solves for some hidden units.
"""

import torch
import torch.distributed as dist

from ptl_rl.pruning.compensate.block_moments import ridge_regression
from ptl_rl.pruning.score.moments import add_products, as_read, fill_lower


class Sums:
    """The regression of what the stream lacks on the inputs of a projection that writes into it.

    X inputs, H hidden size; behind a norm the inputs are taken as they arrive there, divided by the output's size.
    """

    def __init__(self, inputs: int, hidden_size: int, device: torch.device) -> None:
        self.xx_XX = torch.zeros(inputs, inputs, device=device)
        self.xy_XH = torch.zeros(inputs, hidden_size, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of the squares of the projection's output."""

    def add(self, x_BTX: torch.Tensor, size_BT1: torch.Tensor | None, error_BTH: torch.Tensor, weight_BT: torch.Tensor):
        """Add a batch.

        Args:
            size_BT1: of the output that a norm divides by; None without one.
            error_BTH: what the stream lacks.
        """
        root_BT1 = weight_BT.sqrt().unsqueeze(-1)
        x_NX = (x_BTX.float() * (root_BT1 if size_BT1 is None else root_BT1 / size_BT1)).flatten(0, -2)
        y_NH = (error_BTH * root_BT1).flatten(0, -2)
        with as_read(x_BTX):
            add_products(self.xx_XX, x_NX)
            self.xy_XH.addmm_(x_NX.T, y_NH)

    def add_output(self, output_BTH: torch.Tensor, size_BT1: torch.Tensor | None, weight_BT: torch.Tensor) -> None:
        """Add a batch's output of the projection, without its bias, to ``square``: cheaper than from ``xx_XX``."""
        output_BTH = output_BTH.float() if size_BT1 is None else output_BTH.float() / size_BT1
        self.square += (output_BTH.square().sum(-1) * weight_BT).sum()

    def reduce(self) -> None:
        """Add up over ranks, on all of them."""
        if dist.is_initialized():
            for total in (self.xx_XX, self.xy_XH, self.square):
                dist.all_reduce(total)
        fill_lower(self.xx_XX)

    def keep(self, inputs: torch.Tensor) -> None:
        """Go on with some of the inputs only, by their ids: the others are zero."""
        self.xx_XX, self.xy_XH = self.xx_XX[inputs][:, inputs], self.xy_XH[inputs]

    def change(self, keep: torch.Tensor | slice, ridge: float, rows: slice) -> torch.Tensor:
        """(R, K) float32 change of the kept columns of some hidden units' rows.

        Args:
            ridge: relative to the columns' median square.
        """
        return ridge_regression(self.xx_XX[keep][:, keep], self.xy_XH[keep][:, rows], [slice(None)], ridge).T.float()
