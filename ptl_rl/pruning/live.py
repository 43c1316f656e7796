"""Score, choose and cut a model that is being trained, where it is: its shards stay as they are, what goes is zeroed.

Everything is what a cycle's stages do on a checkpoint (:mod:`ptl_rl.pruning.engine`); here weights are read from the
shards and written into them. A rank holds one block's projections whole at a time, and its own rows of the new ones.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ptl_rl.config import CriterionConfig
from ptl_rl.config.in_place import HELD_OUT, TRIAL_SEQUENCES
from ptl_rl.data.encoding import Sequence
from ptl_rl.errors import UserError
from ptl_rl.families import read_shape
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose.choice import Scores, make_plan
from ptl_rl.pruning.choose.width_search import WidthSearch
from ptl_rl.pruning.compensate.refit import Losses, PositionWeights, position_weights, refit
from ptl_rl.pruning.masking import only_blocks
from ptl_rl.pruning.model import PrunableModel
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.streaming import mean_loss
from ptl_rl.pruning.slice.in_place import cut_in_place, own_rows, put_rows, shard_of


@dataclass
class LiveModel(PrunableModel):
    """A model in training, sharded by FSDP2 or whole; ``source`` is the checkpoint that it began as."""

    block: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole weights of the block at work, by name."""
    parameters: dict[str, torch.Tensor] = field(init=False)
    fetched: int = -1

    def __post_init__(self) -> None:
        self.reshard()
        self.name_parameters()

    def name_parameters(self) -> None:
        """Note the parameters' names as they are now: while blocks run one at a time, others stand in their places."""
        self.parameters = dict(self.model.named_parameters())

    def fetch(self, layer: int) -> None:
        """Put a block's projections and norms together from all shards; collective."""
        family, self.block = self.family, {}
        names = ["o_proj", "down_proj"]
        names += [norm for norm in ("attention_norm", "output_norm") if getattr(family, norm) is not None]
        for name in names:
            parameter = self.parameters[family.projection(layer, name) + ".weight"].detach()
            self.block[name] = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        self.fetched = layer

    def weight(self, layer: int, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of a weight of the block that was fetched last."""
        assert layer == self.fetched
        return self.block[name][rows].to(self.device)

    def reshard(self) -> None:
        """Let go of what was gathered for a forward pass: it would hide what is written into the shards."""
        self.block = {}
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@dataclass(frozen=True)
class LiveCut:
    """What one cut in place did."""

    plan: PruningPlan
    """Of the channels that stood before, counted as if the model had been sliced: as a cycle's plan is."""
    losses: Losses
    loss_before: float
    """Mean of ``-log p`` of the tokens of every eighth sequence, in nats."""
    loss: float
    """The same of the cut model."""
    tried: list[tuple[int, float]]
    """Widths that were measured in search of the largest cut, and their losses."""
    score_seconds: float = 0.0
    compensate_seconds: float = 0.0
    """Of all trials and of the cut that was made; what is left of a cut's time goes to losses and zeroing."""


def blocks_after(plans: list[PruningPlan]) -> list[int]:
    """Ascending ids of the blocks that plans which follow each other leave of the first one's source."""
    blocks = list(range(len(plans[0].keep_channels)))
    for plan in plans:
        blocks = [blocks[place] for place in plan.keep_layers]
    return blocks


def standing_after(plans: list[PruningPlan]) -> torch.Tensor:
    """Ascending ids, (L, K), of the channels that such plans leave of the L blocks that are left."""
    width, layers = plans[0].source_intermediate_size, len(plans[0].keep_channels)
    standing_LK = torch.arange(width).expand(layers, -1)
    for plan in plans:
        standing_LK = standing_LK.gather(1, torch.tensor(plan.keep_channels))[plan.keep_layers]
    return standing_LK


def whole_plan(plans: list[PruningPlan]) -> PruningPlan:
    """What plans that follow each other do together, as one plan; without compensation, which was made with each."""
    last, layers = plans[-1], range(len(plans[0].keep_channels))
    standing = dict(zip(blocks_after(plans), standing_after(plans).tolist(), strict=True))
    order, blocks = list[int](), list(layers)
    for plan in plans:
        order += [blocks[place] for place in plan.layer_order]
        blocks = [blocks[place] for place in plan.keep_layers]
    return PruningPlan(
        keep_channels=[standing.get(layer, list(range(last.intermediate_size))) for layer in layers],
        keep_layers=blocks,
        layer_order=order,
        source_intermediate_size=plans[0].source_intermediate_size,
        alignment=last.alignment,
        channel_criterion=last.channel_criterion,
        layer_criterion=last.layer_criterion,
        subset_hash=last.subset_hash,
        source=plans[0].source,
        source_hash=plans[0].source_hash,
        notes=[note for plan in plans for note in plan.notes],
    )


def nothing_cut(source: Path) -> PruningPlan:
    """The plan that keeps everything."""
    shape = read_shape(source)
    layers, width = shape.num_hidden_layers, shape.intermediate_size
    return PruningPlan(
        keep_channels=[list(range(width))] * layers,
        keep_layers=list(range(layers)),
        layer_order=[],
        source_intermediate_size=width,
        alignment=1,
        channel_criterion="none",
        layer_criterion="none",
        subset_hash="",
        source=str(source),
    )


class NoCutFits(UserError, RuntimeError):
    """Not even the smallest cut does so little damage; the message has both numbers."""


@dataclass(frozen=True)
class _Trial:
    """A cut that was measured, and not made."""

    plan: PruningPlan
    losses: Losses
    rows: dict[tuple[int, str], torch.Tensor]
    """This rank's rows of the new weights, by block and projection."""
    loss: float


@dataclass
class _Cutter:
    """Measures cuts of a live model, and makes one; collective."""

    live: LiveModel
    fitted: list[Sequence]
    measured: list[Sequence]
    sensitivity: bool
    trial_weights: PositionWeights | None = None
    seconds: float = 0.0
    """Spent on compensation so far."""

    @property
    def few(self) -> list[Sequence]:
        """Sequences, spread over those that compensation is fitted to, for trials."""
        count = min(TRIAL_SEQUENCES, len(self.fitted))
        return [self.fitted[place * len(self.fitted) // count] for place in range(count)]

    def loss(self) -> float:
        return mean_loss(self.live.model, self.live.batches(self.measured), self.live.device)

    def _parameter(self, layer: int, name: str) -> torch.Tensor:
        return self.live.parameters[self.live.family.projection(layer, name) + ".weight"]

    def _own(self, plan: PruningPlan) -> PruningPlan:
        """The same by the numbers that channels have in the live model, where those that were cut before still are."""
        if self.live.standing_LK is None:
            return plan
        kept = self.live.standing_LK.gather(1, torch.tensor(plan.keep_channels)).tolist()
        return plan.model_copy(update={"keep_channels": kept, "source_intermediate_size": self.live.channels})

    def fit(self, plan: PruningPlan, sequences: list[Sequence], weights: PositionWeights | None = None) -> _Trial:
        """Find the new weights of a cut; the model stays as it was, and the loss is not known."""
        live, rows, started = self.live, dict[tuple[int, str], torch.Tensor](), time.monotonic()
        losses = Losses()
        if plan.compensate != "none":

            def keep(layer: int, name: str, weight: torch.Tensor) -> None:
                rows[layer, name] = own_rows(self._parameter(layer, name), weight)

            losses = refit(live, self._own(plan), sequences, keep, sensitivity=self.sensitivity, weights=weights)
        self.seconds += time.monotonic() - started
        return _Trial(plan, losses, rows, math.nan)

    def try_out(self, plan: PruningPlan) -> _Trial:
        """Find new weights of a cut, by few sequences, and its loss; the model stays as it was."""
        live = self.live
        if self.sensitivity and plan.compensate != "none" and self.trial_weights is None:
            started = time.monotonic()
            self.trial_weights = position_weights(live, self.few)
            live.reshard()
            self.seconds += time.monotonic() - started
        trial = self.fit(plan, self.few, self.trial_weights)
        live.reshard()
        undo = self._shards()
        self._apply(trial, None)
        loss = self.loss()
        live.reshard()
        for name, shard in undo.items():
            put_rows(live.parameters[name], shard)
        return replace(trial, loss=loss)

    def make(self, trial: _Trial, optimizer: torch.optim.Optimizer | None) -> _Trial:
        """Cut as it was tried out, the optimizer's moments, too, and clear gradients; gives the loss."""
        self.live.reshard()
        self._apply(trial, optimizer)
        if math.isnan(trial.loss):
            trial = replace(trial, loss=self.loss())
            self.live.reshard()
        return trial

    def _shards(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's part of all that a cut changes."""
        names = ("gate_proj", "up_proj", "down_proj", "o_proj")
        family, live = self.live.family, self.live
        prefixes = [family.projection(layer, name) for layer in range(live.layers) for name in names]
        found = [prefix + kind for prefix in prefixes for kind in (".weight", ".bias")]
        return {name: shard_of(live.parameters[name]) for name in found if name in live.parameters}

    def _apply(self, trial: _Trial, optimizer: torch.optim.Optimizer | None) -> None:
        own_plan = self._own(trial.plan)
        for (layer, name), own in trial.rows.items():
            columns = own_plan.keep_channels[layer] if name == "down_proj" else None
            put_rows(self._parameter(layer, name), own, columns)
        self.live.model.zero_grad()  # of training, if any wait
        cut_in_place(self.live.model, self.live.family, own_plan, optimizer)


def _largest(
    cutter: _Cutter, plan_of: Callable[[int], PruningPlan], widths: list[int], before: float, limit: float
) -> tuple[_Trial | None, list[tuple[int, float]]]:
    """The trial of the smallest of ascending ``widths`` whose loss is at most ``limit`` above ``before``, and all.

    None in place of the trial: even the largest width does too much damage.
    """
    tried: list[tuple[int, float]] = []
    best, search = None, WidthSearch(widths, limit)
    while (place := search.next()) is not None:
        trial = cutter.try_out(plan_of(widths[place]))
        width = trial.plan.intermediate_size
        tried.append((width, trial.loss))
        # A criterion may keep more than it is asked to, and all of it.
        if search.found(place, trial.loss - before if width < cutter.live.width else math.inf):
            best = trial
    return best, tried


def _of_rank_0(scores: Scores, device: torch.device) -> Scores:
    """One rank's scores on all: every rank makes the plan, and a criterion of one's own may draw numbers."""
    if not dist.is_initialized():
        return scores
    importance_LC, order = scores.importance_LC.to(device), torch.tensor(scores.layer_order, device=device)
    dist.broadcast(importance_LC, src=0)
    dist.broadcast(order, src=0)
    return replace(scores, importance_LC=importance_LC.cpu(), layer_order=order.tolist())


def _held_out(live: LiveModel, sequences: list[Sequence], fewest: int) -> list[Sequence]:
    """Every eighth of the sequences in which some token counts; all of them where that is fewer than ``fewest``."""
    counting = [s for s in sequences if s.weight and (live.prompt_weight or len(s.ids) > s.prompt_tokens)]
    held_out = counting[::HELD_OUT]
    return held_out if len(counting) >= HELD_OUT and len(held_out) >= fewest else sequences


def _noted(plan: PruningPlan, damage: float, max_damage: float) -> PruningPlan:
    """Trials are compensated by fewer sequences; what was made by all of them can be worse than it was."""
    said = (
        f"the cut to {plan.intermediate_size} channels raised the loss by {damage:.3f} nats a token, more than "
        f"schedule.max_damage ({max_damage:g}) and than when it was tried out"
    )
    return plan.model_copy(update={"notes": [*plan.notes, said]})


def cut_live(
    live: LiveModel,
    optimizer: torch.optim.Optimizer | None,
    criterion: CriterionConfig,
    sequences: list[Sequence],
    before: list[PruningPlan],
    *,
    remove_channels: int,
    remove_layers: int = 0,
    layers_before: int = 0,
    alignment: int,
    general: Collection[Sequence] = (),
    sensitivity: bool = False,
    seed: int = 0,
    subset_hash: str = "",
    max_damage: float | None = None,
) -> LiveCut:
    """Zero the channels and blocks that matter least, let what stays take over, and clear gradients; collective.

    Args:
        sequences: what the model is scored on, and what compensation is fitted to.
        before: plans of the cuts that were made in place before, first one first.
        remove_channels: that every block loses now; at most, with ``max_damage``.
        remove_layers: blocks that go now.
        layers_before: blocks that went before these cuts, and are no part of the model.
        max_damage: most that the loss may rise by, in nats a token, on sequences that compensation is not fitted to:
            the largest cut is found that stays at or below it, to within a tenth of its width.

    Raises:
        NoCutFits: there is none; nothing was changed.
    """
    kept = blocks_after(before) if before else list(range(live.layers))
    removal = engine.Removal(remove_channels, remove_layers, layers_before + live.layers - len(kept))
    live.standing_LK = standing_after(before) if before else None
    if live.standing_LK is not None and live.width == live.channels:  # blocks went, and no channels
        live.standing_LK = None
    with only_blocks(live.model, live.family, kept):
        live.reshard()  # or the names would be of gathered parameters, which a look at the model has left
        live.name_parameters()
        options: dict[str, Any] = {"general": list(general), "sensitivity": sensitivity, "seed": seed}
        started = time.monotonic()
        scores = _of_rank_0(engine.score(live, criterion, removal, sequences, **options), live.device)
        score_seconds = time.monotonic() - started

        def plan_of(width: int) -> PruningPlan:
            return make_plan(
                scores,
                criterion,
                remove_channels=live.width - width,
                alignment=alignment,
                subset_hash=subset_hash,
                source=live.source,
            )

        fitted, measured = sequences, _held_out(live, sequences, fewest=1 if max_damage is not None else 8)
        if max_damage is not None and len(measured) < len(sequences):
            fitted = [sequence for sequence in sequences if not any(sequence is other for other in measured)]
        cutter = _Cutter(live, fitted, measured, sensitivity)
        smallest, loss_before = live.width - remove_channels, cutter.loss()
        if max_damage is None:
            chosen, tried = cutter.fit(plan_of(smallest), fitted), list[tuple[int, float]]()
        else:
            first = max(-(-smallest // alignment), 1) * alignment
            widths = list(range(first, live.width, alignment))
            largest, tried = _largest(cutter, plan_of, widths, loss_before, max_damage)
            if largest is None:
                live.model.zero_grad()
                width, loss = tried[-1] if tried else (live.width, loss_before)
                raise NoCutFits(
                    f"the smallest cut, to {width} channels, raises the loss by {loss - loss_before:.3f} nats a token, "
                    f"more than schedule.max_damage ({max_damage:g})"
                )
            chosen = cutter.fit(largest.plan, fitted) if len(cutter.few) < len(fitted) else largest
        chosen = cutter.make(chosen, optimizer)
        if max_damage is not None and chosen.loss - loss_before > max_damage:
            chosen = replace(chosen, plan=_noted(chosen.plan, chosen.loss - loss_before, max_damage))
        return LiveCut(chosen.plan, chosen.losses, loss_before, chosen.loss, tried, score_seconds, cutter.seconds)


def rollout_sequences(
    prompts: list[list[int]], responses: list[list[int]], rewards: list[float], longest: int, most: int
) -> list[Sequence]:
    """Of a step's rollouts, those that ended by themselves and earned something, weighed by it.

    Each prompt's first such response comes before any prompt's second.

    Args:
        longest: tokens that a response may have; one of so many was cut off.
        most: sequences that are wanted.
    """
    of_prompt: dict[tuple[int, ...], list[Sequence]] = {}
    for prompt, response, reward in zip(prompts, responses, rewards, strict=True):
        if reward > 0 and len(response) < longest:
            sequence = Sequence(prompt + response, len(prompt), reward)
            of_prompt.setdefault(tuple(prompt), []).append(sequence)
    in_turns = itertools.chain.from_iterable(itertools.zip_longest(*of_prompt.values()))
    return [sequence for sequence in in_turns if sequence is not None][:most]
