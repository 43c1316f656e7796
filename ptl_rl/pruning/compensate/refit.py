"""What stays takes over, block after block, so that the residual stream stays what it was in the original.

Two streams are kept for every calibration token: the original's and the cut model's. At each kept block the kept
columns of ``down_proj`` absorb the removed ones (:func:`ptl_rl.pruning.compensate.algebra.least_squares`, on what they
are fed in the cut model). ``o_proj`` and ``down_proj`` are moved by the ridge regression, on their inputs, of what the
cut model's stream lacks of the original's: what blocks before have lost, and, where removed blocks follow, what those
would have added. The architecture stays stock.

A block costs four of its forward passes (original, cut, once more with the new ``o_proj``, and with both), so the whole
costs about four passes without output head, whatever the depth. A rank holds its sequences' two streams, tokens times
hidden size each, one block's sums and no other block's weights. Sums are added up over ranks once per block, and every
rank solves for its share of the hidden units, which are independent of each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ptl_rl.data.encoding import Sequence
from ptl_rl.pruning.compensate.algebra import least_squares
from ptl_rl.pruning.compensate.blockwise import BlockByBlock, Seen, block_by_block
from ptl_rl.pruning.compensate.regression import Sums
from ptl_rl.pruning.model import PrunableModel
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.calibration import Batch
from ptl_rl.pruning.score.streaming import Listener, on_device

SMALLEST_GAIN = 0.1
"""Of a norm's root mean square: below it a hidden unit's error is not divided by its gain."""


@dataclass(frozen=True)
class Losses:
    """Shares, by mean square over the calibration tokens, of what a cut loses."""

    channels_plain: float | None = None
    """Of the FFN outputs, if the kept columns stay as they are; mean over blocks, None if no channels go."""
    channels: float | None = None
    """The same once the kept columns have absorbed what they can of the removed ones."""
    stream: float | None = None
    """Of a token's residual stream behind the last block, once all is refit; mean over tokens."""


class PositionWeights(Listener):
    """Keeps how much every position counts in every block, batch by batch."""

    by_normed_output = True

    def __init__(self, layers: int) -> None:
        self.of: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def on_channels(self, layer: int, hidden_NC: torch.Tensor, weight_N: torch.Tensor) -> None:
        self.of[layer].append(weight_N)


def position_weights(prunable: PrunableModel, sequences: list[Sequence]) -> PositionWeights:
    """How much each position counts, by the gradient that reaches each block's FFN output; one pass with gradients."""
    weights = PositionWeights(prunable.layers)
    prunable.read(sequences, [weights], sensitivity=True)
    return weights


def most_passes(layers: int, remove: int, *, sensitivity: bool = False) -> int:
    """How often :func:`refit` goes through the calibration sequences, each time with one block.

    So often where channels go; where only blocks do, those before the first of them need one pass in place of three.

    Args:
        layers: blocks of the model.
        remove: how many of them go.
    """
    return layers + 2 * (layers - remove) + (1 if sensitivity else 0)


def _changed(plan: PruningPlan) -> list[int]:
    """The kept blocks that are refit: all if channels go, else from the one before the first removed block on."""
    if plan.intermediate_size != plan.source_intermediate_size:
        return plan.keep_layers
    first = min(plan.layer_order, default=len(plan.keep_channels))
    before = [layer for layer in plan.keep_layers if layer < first][-1:]
    return before + [layer for layer in plan.keep_layers if layer > first]


def refit(
    prunable: PrunableModel,
    plan: PruningPlan,
    sequences: list[Sequence],
    save: Callable[[int, str, torch.Tensor], None],
    *,
    sensitivity: bool = False,
    weights: PositionWeights | None = None,
) -> Losses:
    """Find the weights that let what stays take over what goes; collective over all ranks.

    Args:
        save: called on every rank with a kept block, ``o_proj`` or ``down_proj``, and its new float32 weight, the
            latter over the kept channels.
        sensitivity: weigh positions by the gradient that reaches each block's FFN output in the original.
        weights: what :func:`position_weights` has found of the same sequences, so that it is not asked again.
    """
    if sensitivity and weights is None:
        weights = position_weights(prunable, sequences)
    batches = list(on_device(prunable.batches(sequences), prunable.device))
    with block_by_block(prunable.model, prunable.family, batches[0]) as blocks:
        return _Refit(prunable, plan, blocks, batches, weights, save).run()


class _Refit:
    """The two streams on their way through the blocks."""

    def __init__(
        self,
        prunable: PrunableModel,
        plan: PruningPlan,
        blocks: BlockByBlock,
        batches: list[Batch],
        weights: PositionWeights | None,
        save: Callable[[int, str, torch.Tensor], None],
    ) -> None:
        self.prunable, self.plan, self.blocks, self.batches, self.save = prunable, plan, blocks, batches, save
        self.weights = weights
        self.original = [blocks.embed(batch) for batch in batches]
        self.cut = list(self.original)
        self.diverged = False
        self.shares = torch.zeros(2, dtype=torch.float64)

    def run(self) -> Losses:
        plan = self.plan
        cuts_channels, changed = plan.intermediate_size != plan.source_intermediate_size, set(_changed(plan))
        self._follow_removed(0)
        for layer in plan.keep_layers:
            if layer in changed:
                self._change(layer, plan.keep_channels[layer] if cuts_channels else None)
            else:
                self._advance(layer, self.original)
                self.cut = list(self.original)
        stream = self._lost()
        if not cuts_channels:
            return Losses(stream=stream)
        shares = self.shares.to(self.prunable.device)  # each rank has those of the rows that it has solved for
        if dist.is_initialized():
            dist.all_reduce(shares)
        plain, left = (shares / plan.num_hidden_layers).tolist()
        return Losses(plain, left, stream)

    def _advance(self, layer: int, streams: list[torch.Tensor], **new: Any) -> None:
        for index, batch in enumerate(self.batches):

            def work(run: Callable[..., Seen], index: int = index) -> None:
                streams[index] = run(streams[index], **new).out_BTH

            self._visit(layer, batch, work)

    def _visit(self, layer: int, batch: Batch, work: Callable[[Callable[..., Seen]], None]) -> None:
        self.blocks.visit(layer, batch, work)
        self.prunable.progress()

    def _follow_removed(self, layer: int) -> None:
        """Take the original's stream through the removed blocks that begin at ``layer``, if any do."""
        while layer < self.prunable.layers and layer not in self.plan.keep_layers:
            self._advance(layer, self.original)
            self.diverged = True
            layer += 1

    def _change(self, layer: int, channels: list[int] | None) -> None:
        self.prunable.fetch(layer)
        new: dict[str, torch.Tensor] = {}
        sums = None
        for index, batch in enumerate(self.batches):

            def first(run: Callable[..., Seen], index: int = index) -> None:
                nonlocal sums
                original = run(self.original[index])
                if self.diverged:
                    cut = run(self.cut[index])
                    sums = sums or self._sums(cut.heads_BTA, cut.out_BTH)
                    size_BT1 = self._size(layer, "attention_norm", cut.attended_BTH)
                    error_BTH = original.stream_BTH.float() - cut.stream_BTH.float()
                    error_BTH += original.attention_BTH.float() - cut.attention_BTH.float()
                    sums.add(cut.heads_BTA, size_BT1, error_BTH, self._weight_BT(layer, index, cut))
                self.original[index] = original.out_BTH

            self._visit(layer, batch, first)
        self._follow_removed(layer + 1)
        if sums is not None:
            sums.reduce()
            new["o_proj"] = self._solved(layer, "o_proj", sums, None)
        sums = None
        bias_H = self._bias(layer)
        for index, batch in enumerate(self.batches):

            def second(run: Callable[..., Seen], index: int = index) -> None:
                nonlocal sums
                cut = run(self.cut[index], new=new)
                sums = sums or self._sums(cut.hidden_BTC, cut.out_BTH)
                size_BT1 = self._size(layer, "output_norm", cut.fed_BTH)
                error_BTH = self.original[index].float() - cut.out_BTH.float()
                weight_BT = self._weight_BT(layer, index, cut)
                sums.add(cut.hidden_BTC, size_BT1, error_BTH, weight_BT)
                sums.add_output(cut.fed_BTH if bias_H is None else cut.fed_BTH - bias_H, size_BT1, weight_BT)

            self._visit(layer, batch, second)
        assert sums is not None
        sums.reduce()
        new["down_proj"] = self._solved(layer, "down_proj", sums, channels)
        self._advance(layer, self.cut, new=new, channels=channels)
        self.diverged = True
        for name, weight in new.items():
            self.save(layer, name, weight)

    def _sums(self, x_BTX: torch.Tensor, stream_BTH: torch.Tensor) -> Sums:
        return Sums(x_BTX.shape[-1], stream_BTH.shape[-1], self.prunable.device)

    def _size(self, layer: int, norm: str, output_BTH: torch.Tensor) -> torch.Tensor | None:
        """What the norm divides its input by; None where the family has no such norm."""
        name = getattr(self.prunable.family, norm)
        if name is None:
            return None
        eps = self.blocks.stations[layer].block.get_submodule(name).eps
        return (output_BTH.float().square().mean(-1, keepdim=True) + eps).sqrt()

    def _weight_BT(self, layer: int, index: int, cut: Seen) -> torch.Tensor:
        """How much an error of the stream counts at each position."""
        if self.weights is None:
            return self.batches[index].weight_BT
        weight_BT = self.weights.of[layer][index].view_as(self.batches[index].weight_BT)
        size_BT1 = self._size(layer, "output_norm", cut.fed_BTH)
        return weight_BT if size_BT1 is None else weight_BT * size_BT1.squeeze(-1).square()

    def _solved(self, layer: int, name: str, sums: Sums, channels: list[int] | None) -> torch.Tensor:
        """The new weight, over ``channels`` if given; every rank solves for its share of the hidden units' rows.

        What is absorbed and what the stream lacks are two regressions, each with a factorisation of its own: from two
        ranks on, they are made side by side.
        """
        prunable, plan = self.prunable, self.plan
        standing: Any = slice(None)
        if name == "down_proj" and prunable.standing_LK is not None:
            assert channels is not None
            standing = prunable.standing_LK[layer]
            sums.keep(standing.to(prunable.device))
            channels = torch.searchsorted(standing, torch.tensor(channels)).tolist()
        inputs, hidden_size = sums.xy_XH.shape
        keep: Any = slice(None) if channels is None else torch.tensor(channels, device=prunable.device)
        new_HK = torch.zeros(hidden_size, inputs if channels is None else len(channels), device=prunable.device)
        for task, rows in prunable.shares(hidden_size, 1 if channels is None else 2):
            if task == 0:
                new_HK[rows] += self._before_norm(layer, name, sums.change(keep, plan.stream_ridge, rows), rows)
            if channels is None:
                new_HK[rows] += prunable.weight(layer, name, rows).float()
            elif task == 1:
                weight_RX = prunable.weight(layer, name, rows)[:, standing]
                fit = least_squares(weight_RX, sums.xx_XX, channels, plan.ridge)
                lost = torch.tensor([fit.lost_plain, fit.lost], dtype=torch.float64)
                self.shares += lost / max(float(sums.square), 1e-300)
                new_HK[rows] += fit.weight_HK
        if dist.is_initialized():
            dist.all_reduce(new_HK)
        return new_HK

    def _before_norm(self, layer: int, name: str, change_RK: torch.Tensor, rows: slice) -> torch.Tensor:
        """What gives the change behind the norm of the projection's output, its division apart."""
        norm = "attention_norm" if name == "o_proj" else "output_norm"
        if getattr(self.prunable.family, norm) is None:
            return change_RK
        gain_H = self.prunable.family.norm_offset + self.prunable.weight(layer, norm).float()
        least = SMALLEST_GAIN * gain_H.square().mean().sqrt()
        gain_H = torch.where(gain_H < 0, gain_H.clamp_max(-least), gain_H.clamp_min(least))
        return change_RK / gain_H[rows, None]

    def _bias(self, layer: int) -> torch.Tensor | None:
        """What ``down_proj`` adds whatever it is fed."""
        family = self.prunable.family
        bias = self.blocks.stations[layer].block.get_submodule(f"{family.mlp}.{family.down_proj}").bias
        return bias.full_tensor() if isinstance(bias, DTensor) else bias

    def _lost(self) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=self.prunable.device)
        for original_BTH, cut_BTH, batch in zip(self.original, self.cut, self.batches, strict=True):
            error_BT = (original_BTH.float() - cut_BTH.float()).square().sum(-1)
            share_BT = error_BT / original_BTH.float().square().sum(-1).clamp_min(1e-12)
            sums += torch.stack([(share_BT * batch.weight_BT).sum(), batch.weight_BT.sum()]).double()
        if dist.is_initialized():
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])
