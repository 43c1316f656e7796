"""What the blocks before a removed one could take over: the regressions.

What a removed block added to the residual stream is regressed, over the calibration tokens, on what went into the
``o_proj`` and ``down_proj`` of the nearest block before it that is still there, and added to those two weights; the
architecture stays stock. The change of ``o_proj`` also changes what that block's own FFN reads, which the regression
leaves out. :mod:`ptl_rl.pruning.choose.absorption` reads and solves them, for all candidates in one pass; what slicing
writes in the end comes from :mod:`ptl_rl.pruning.compensate.refit`.

Where a block norms its FFN's output before it adds it (Gemma 2, 3), the sum of both contributions is written as one
normed output: the norm's weight becomes the root mean square of that sum, and ``down_proj`` gives its direction.
"""

import torch
import torch.distributed as dist

from ptl_rl.pruning.score.moments import as_read
from ptl_rl.pruning.score.streaming import Listener


class _Products(Listener):
    """Adds up ``x^T x`` and ``x^T y`` over all ranks' batches on the one rank ``owner``, as no rank could hold all.

    The others hold a batch's products while these are being reduced, as :mod:`ptl_rl.pruning.score.moments` does.
    """

    wants_blocks = True

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.xx_XX = self.xy_XH = torch.zeros(0)

    def _add(self, x_NX: torch.Tensor, y_NH: torch.Tensor, read: torch.Tensor) -> None:
        """Add a batch; collective. ``read`` has the type of what the factors came from."""
        own, inputs = self.rank == self.owner, x_NX.shape[1]
        if own and not len(self.xx_XX):
            self.xx_XX, self.xy_XH = (
                torch.zeros(inputs, width, device=x_NX.device) for width in (inputs, y_NH.shape[1])
            )
        with as_read(read):
            if self.ranks == 1:
                self.xx_XX.addmm_(x_NX.T, x_NX)
                self.xy_XH.addmm_(x_NX.T, y_NH)
                return
            for total, product in ((self.xx_XX, x_NX.T @ x_NX), (self.xy_XH, x_NX.T @ y_NH)):
                dist.reduce(product, self.owner)
                if own:
                    total += product

    def reduce(self) -> None:
        """Add up over ranks, on the owner, what is small enough to be held by all until then."""

    def let_go(self) -> None:
        """Free the sums' memory."""
        self.xx_XX = self.xy_XH = torch.zeros(0)


class BlockMoments(_Products):
    """Adds up the regression of one block's contribution on what goes into its predecessor's two output projections.

    X = [inputs of o_proj, inputs of down_proj], A + C wide; Y = what the block adds, H wide.
    """

    def __init__(self, removed: int, predecessor: int, owner: int = 0) -> None:
        super().__init__(owner)
        self.removed, self.predecessor, self.attention_of = removed, predecessor, predecessor
        self.heads_NA = self.hidden_NC = torch.zeros(0)

    def on_attention(self, layer: int, heads_NA: torch.Tensor) -> None:
        self.heads_NA = heads_NA

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        if layer == self.attention_of:
            self.hidden_NC = hidden_NC

    def on_block(self, layer: int, inputs_NH: torch.Tensor, outputs_NH: torch.Tensor, weight_N: torch.Tensor) -> None:
        if layer != self.removed:
            return
        root_N = weight_N.sqrt()[:, None]
        x_NX = torch.cat([self.heads_NA, self.hidden_NC], dim=1).float() * root_N
        self.heads_NA = self.hidden_NC = torch.zeros(0)
        y_NH = (outputs_NH.float() - inputs_NH.float()) * root_N
        self._add(x_NX, y_NH, inputs_NH)

    def solve(self, attention_width: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What to add to the predecessor's ``o_proj`` (H, A) and ``down_proj`` (H, C), float32.

        Args:
            attention_width: A.
            ridge: relative to the median square of each of the two inputs; holds the changes small.
        """
        parts = [slice(0, attention_width), slice(attention_width, None)]
        gain_HX = ridge_regression(self.xx_XX, self.xy_XH, parts, ridge).T.float()
        return gain_HX[:, :attention_width], gain_HX[:, attention_width:]


class NormedBlockMoments(_Products):
    """The same regression where the predecessor adds ``g * D h / rms(D h)``, of which D and g may change.

    With the new norm ``g'``, a new ``D'`` gives the wanted sum ``m + y`` of contributions up to its length if
    ``D' h = rms(D h) (m + y) / g'``. That is linear in what is known: ``D' = (g D + B) / g'``, B the regression of y on
    ``h / rms(D h)``. ``g'`` is the root mean square of ``m + y`` in every hidden unit, with the sign of g, so that the
    direction has the length that the norm gives it, on average over units.
    """

    def __init__(self, removed: int, predecessor: int, norm_H: torch.Tensor, eps: float, owner: int = 0) -> None:
        super().__init__(owner)
        self.removed, self.predecessor, self.output_of = removed, predecessor, predecessor
        self.norm_H, self.eps = norm_H.float(), eps
        self.output_NH = self.x_NC = torch.zeros(0)
        hidden_size = len(norm_H)
        self.sum_square_H = torch.zeros(hidden_size, dtype=torch.float64, device=norm_H.device)
        self.weight = torch.zeros((), dtype=torch.float64, device=norm_H.device)

    def on_output(self, layer: int, output_NH: torch.Tensor) -> None:
        self.output_NH = output_NH.float()

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        if layer != self.predecessor:
            return
        root_N1 = (self.output_NH.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        self.x_NC = hidden_NC.float() * root_N1
        self.output_NH = self.output_NH * root_N1 * self.norm_H

    def on_block(self, layer: int, inputs_NH: torch.Tensor, outputs_NH: torch.Tensor, weight_N: torch.Tensor) -> None:
        if layer != self.removed:
            return
        root_N1 = weight_N.sqrt()[:, None]
        y_NH = outputs_NH.float() - inputs_NH.float()
        self.sum_square_H += ((self.output_NH + y_NH) * root_N1).square().sum(0)
        x_NC, y_NH = self.x_NC * root_N1, y_NH * root_N1
        self.output_NH = self.x_NC = torch.zeros(0)
        self._add(x_NC, y_NH, inputs_NH)
        self.weight += weight_N.sum()

    def reduce(self) -> None:
        if dist.is_initialized():
            for total in (self.sum_square_H, self.weight):
                dist.reduce(total, self.owner)

    def solve(self, down_HC: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The predecessor's new ``down_proj`` (H, C) and new norm, offset included, (H,); float32.

        Args:
            down_HC: its present ``down_proj``.
            ridge: relative to the median square of the regression's inputs.
        """
        gain_CH = ridge_regression(self.xx_XX, self.xy_XH, [slice(None)], ridge)
        size_H = (self.sum_square_H / self.weight).sqrt().clamp_min(1e-12)
        new_norm_H = torch.where(self.norm_H < 0, -size_H, size_H)
        new_down_HC = (
            self.norm_H.double()[:, None] * down_HC.to(self.norm_H.device).double() + gain_CH.T
        ) / new_norm_H[:, None]
        return new_down_HC.float(), new_norm_H.float()


def ridge_regression(xx_XX: torch.Tensor, xy_XH: torch.Tensor, parts: list[slice], ridge: float) -> torch.Tensor:
    """(X, H) float64 coefficients.

    Args:
        parts: of X, each with a ridge relative to the median of its own squares: a few massive activations, which some
            models have, would say nothing about the others.
    """
    ridged_XX = xx_XX.to(torch.float64, copy=True)
    for part in parts:
        diagonal = ridged_XX.diagonal()[part]
        median = float(diagonal.median())
        diagonal += ridge * median if median > 0 else 1.0
    return torch.cholesky_solve(xy_XH.double(), torch.linalg.cholesky(ridged_XX))
