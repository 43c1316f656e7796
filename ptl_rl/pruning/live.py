"""Score, choose and cut a model that is being trained, where it is: its shards stay as they are, what goes is zeroed.

Everything is what a cycle's stages do on a checkpoint (:mod:`ptl_rl.pruning.engine`); here weights are read from the
shards and written into them. A rank holds one block's projections whole at a time, and its own rows of the new ones.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ptl_rl.config import CriterionConfig
from ptl_rl.data.encoding import Sequence
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose.choice import make_plan
from ptl_rl.pruning.compensate.refit import Losses, refit
from ptl_rl.pruning.model import PrunableModel
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.streaming import mean_loss
from ptl_rl.pruning.slice.in_place import cut_in_place, own_rows, put_rows


@dataclass
class LiveModel(PrunableModel):
    """A model in training, sharded by FSDP2 or whole; ``source`` is the checkpoint that it began as."""

    block: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole weights of the block at work, by name."""
    parameters: dict[str, torch.Tensor] = field(init=False)
    fetched: int = -1

    def __post_init__(self) -> None:
        self.reshard()
        # By name, as they stand now: while blocks run one at a time, others stand in their places.
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
    """Mean of ``-log p`` of the sequences' tokens, in nats."""
    loss: float
    """The same of the cut model."""


def standing_after(plans: list[PruningPlan]) -> torch.Tensor:
    """Ascending ids, (L, K), of the channels that plans which follow each other leave of the first one's source."""
    first, *others = (torch.tensor(plan.keep_channels) for plan in plans)
    for kept_LK in others:
        first = first.gather(1, kept_LK)
    return first


def whole_plan(plans: list[PruningPlan]) -> PruningPlan:
    """What plans that follow each other do together, as one plan; without compensation, which was made with each."""
    last = plans[-1]
    return PruningPlan(
        keep_channels=standing_after(plans).tolist(),
        keep_layers=last.keep_layers,
        layer_order=[],
        source_intermediate_size=plans[0].source_intermediate_size,
        alignment=last.alignment,
        channel_criterion=last.channel_criterion,
        layer_criterion=last.layer_criterion,
        subset_hash=last.subset_hash,
        source=last.source,
        source_hash=last.source_hash,
        notes=[note for plan in plans for note in plan.notes],
    )


def cut_live(
    live: LiveModel,
    optimizer: torch.optim.Optimizer | None,
    criterion: CriterionConfig,
    sequences: list[Sequence],
    before: list[PruningPlan],
    *,
    remove_channels: int,
    alignment: int,
    general: list[Sequence] = [],  # noqa: B006
    sensitivity: bool = False,
    seed: int = 0,
    subset_hash: str = "",
) -> LiveCut:
    """Zero the channels that matter least, let the others take over, and leave gradients cleared; collective.

    Args:
        sequences: what the model is scored on, and what compensation is fitted to.
        before: plans of the cuts that were made in place before, first one first.
        remove_channels: that every block loses now.
    """
    live.standing_LK = standing_after(before) if before else None
    removal = engine.Removal(remove_channels, 0)
    scores = engine.score(live, criterion, removal, sequences, general=general, sensitivity=sensitivity, seed=seed)
    plan = make_plan(
        scores,
        criterion,
        remove_channels=remove_channels,
        alignment=alignment,
        subset_hash=subset_hash,
        source=live.source,
    )
    together = whole_plan([*before, plan])
    loss_before = mean_loss(live.model, live.batches(sequences), live.device)
    losses, new = Losses(), dict[tuple[int, str], torch.Tensor]()
    if plan.compensate != "none":
        fitted = together.model_copy(update={"ridge": plan.ridge, "stream_ridge": plan.stream_ridge})

        def keep(layer: int, name: str, weight: torch.Tensor) -> None:
            new[layer, name] = own_rows(live.parameters[live.family.projection(layer, name) + ".weight"], weight)

        losses = refit(live, fitted, sequences, keep, sensitivity=sensitivity)
    live.reshard()
    for (layer, name), rows in new.items():
        columns = together.keep_channels[layer] if name == "down_proj" else None
        put_rows(live.parameters[live.family.projection(layer, name) + ".weight"], rows, columns)
    live.model.zero_grad()  # scoring by sensitivity went backwards
    cut_in_place(live.model, live.family, together, optimizer)
    loss = mean_loss(live.model, live.batches(sequences), live.device)
    live.reshard()
    return LiveCut(plan, losses, loss_before, loss)


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
