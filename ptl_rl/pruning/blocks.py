"""Which blocks go, and what the blocks before them take over.

Several blocks are chosen one at a time, each by what is measured without those before it: two blocks that can each be
done without need not both be.

What a removed block added to the residual stream is regressed, over the calibration tokens, on what went into the
``o_proj`` and ``down_proj`` of the nearest block before it that stays, and added to those two weights; the architecture
stays stock. The change of ``o_proj`` also changes what that block's own FFN reads, which the regression leaves out.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from ptl_rl.families import Family
from ptl_rl.pruning.streaming import Listener


def greedy(importance: Callable[[list[int]], torch.Tensor], remove: int) -> list[int]:
    """Ids of ``remove`` blocks, first removed first.

    Args:
        importance: gives (L,) importance of all blocks once those it is handed are gone; theirs does not matter.
    """
    gone: list[int] = []
    for _ in range(remove):
        importance_L = importance(gone).nan_to_num(nan=torch.inf)  # a model that breaks without the block needs it
        importance_L[gone] = torch.inf
        gone.append(int(importance_L.argmin()))
    return gone


def explicit(ids: list[int], removed_before: int, remove: int) -> list[int]:
    """The next ``remove`` of the blocks ``ids``, as the present model numbers them.

    Args:
        ids: of the original model, in the order in which they go.
        removed_before: how many of them are gone already.
    """
    gone, now = ids[:removed_before], ids[removed_before : removed_before + remove]
    return [block - sum(earlier < block for earlier in gone) for block in now]


def can_absorb(family: Family) -> bool:
    """Whether a block adds its projections' outputs to the residual stream as they are; Gemma norms them first."""
    return family.norms_per_layer == 2


class BlockMoments(Listener):
    """Adds up the regression of one block's contribution on what goes into its predecessor's two output projections.

    X = [inputs of o_proj, inputs of down_proj], A + C wide; Y = what the block adds, H wide.
    """

    wants_blocks = True

    def __init__(self, removed: int, predecessor: int) -> None:
        self.removed, self.attention_of = removed, predecessor
        self.heads_NA = self.hidden_NC = torch.zeros(0)
        self.xx_XX = self.xy_XH = torch.zeros(0)
        self.yy = torch.zeros((), dtype=torch.float64)

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
        y_NH = (outputs_NH.float() - inputs_NH.float()) * root_N
        if not len(self.xx_XX):
            self.xx_XX = torch.zeros(x_NX.shape[1], x_NX.shape[1], device=x_NX.device)
            self.xy_XH = torch.zeros(x_NX.shape[1], y_NH.shape[1], device=x_NX.device)
            self.yy = self.yy.to(x_NX.device)
        self.xx_XX.addmm_(x_NX.T, x_NX)
        self.xy_XH.addmm_(x_NX.T, y_NH)
        self.yy += y_NH.square().sum()

    def reduce(self) -> None:
        """Add up over all ranks."""
        if dist.is_initialized():
            for total in (self.xx_XX, self.xy_XH, self.yy):
                dist.all_reduce(total)

    def solve(self, attention_width: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """What to add to the predecessor's ``o_proj`` (H, A) and ``down_proj`` (H, C), float32.

        Args:
            attention_width: A.
            ridge: relative to the mean square of each of the two inputs; holds the changes small.

        Returns:
            The two changes, and the share of the removed block's contribution, by mean square, that stays lost.
        """
        exact_XX, wanted_XH = self.xx_XX.double(), self.xy_XH.double()
        ridged_XX = exact_XX.clone()
        for part in (slice(0, attention_width), slice(attention_width, None)):
            diagonal = ridged_XX.diagonal()[part]
            mean = float(diagonal.mean())
            diagonal += ridge * mean if mean > 0 else 1.0
        gain_XH = torch.cholesky_solve(wanted_XH, torch.linalg.cholesky(ridged_XX))
        explained = 2 * (gain_XH * wanted_XH).sum() - (gain_XH * (exact_XX @ gain_XH)).sum()
        lost = float(1 - explained / self.yy) if self.yy > 0 else 0.0
        gain_HX = gain_XH.T.float()
        return gain_HX[:, :attention_width], gain_HX[:, attention_width:], lost
