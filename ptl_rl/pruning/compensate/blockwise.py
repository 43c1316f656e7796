"""Run a model one block at a time, on residual streams that are kept outside of it.

What one block is to be changed by depends on what the changed blocks before it give, so reading the whole model for
every block would cost a forward pass per block. Here a block costs its own forward pass. The root module is called all
the same, as it embeds, makes masks and positions, and under FSDP2 owns what no block does; in place of its blocks
stand stations that pass on what they get, but for the one that is asked to work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptl_rl.families import Family
from ptl_rl.pruning.masking import hooked, replaced_in
from ptl_rl.pruning.score.calibration import Batch
from ptl_rl.pruning.score.streaming import inputs_of, without_head


@dataclass
class Seen:
    """What went through a block; B sequences of T positions, A inputs of ``o_proj``, C channels, H hidden size."""

    stream_BTH: torch.Tensor
    """What it was given."""
    heads_BTA: torch.Tensor
    """Into ``o_proj``."""
    attended_BTH: torch.Tensor
    """Out of ``o_proj``, before a norm."""
    attention_BTH: torch.Tensor
    """What the attention adds to the stream: behind the norm, if there is one."""
    hidden_BTC: torch.Tensor
    """Into ``down_proj``."""
    fed_BTH: torch.Tensor
    """Out of ``down_proj``, before a norm."""
    out_BTH: torch.Tensor
    """The residual stream behind the block."""


class _Station(nn.Module):
    """Stands where a block stood."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a child: what walks over modules must not find it twice
        self.work: Callable[..., None] | None = None

    def forward(self, hidden_states: torch.Tensor, *args, **options) -> torch.Tensor:
        if self.work is not None:
            self.work(*args, **options)
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # some models ask a block what kind it is
            return getattr(self.__dict__["block"], name)


class BlockByBlock:
    """The blocks of a model whose stations are in place."""

    def __init__(self, model: PreTrainedModel, family: Family, stations: list[_Station]) -> None:
        self.model, self.family, self.stations = model, family, stations

    def embed(self, batch: Batch) -> torch.Tensor:
        """The residual stream before the first block, (B, T, H)."""
        found: list[torch.Tensor] = []
        handle = self.stations[0].register_forward_pre_hook(
            lambda _module, args, options: found.append(args[0] if args else options["hidden_states"]), with_kwargs=True
        )
        self.model(**inputs_of(batch))
        handle.remove()
        return found[0]

    def visit(self, layer: int, batch: Batch, work: Callable[[Callable[..., Seen]], None]) -> None:
        """Have ``work`` done at block ``layer``, with ``batch``'s positions and masks.

        Args:
            work: is given a function from a residual stream, (B, T, H), to what the block makes of it; also takes
                ``new``, weights by the names ``o_proj`` and ``down_proj`` that it then has, and ``channels``, ascending
                ids of those that the new ``down_proj`` is over.
        """
        station = self.stations[layer]

        def do(*args, **options) -> None:
            def run(stream_BTH, *, new: dict[str, torch.Tensor] | None = None, channels: list[int] | None = None):
                with self._tapped(layer, new or {}, channels) as seen:
                    out = station.block(stream_BTH, *args, **options)
                return Seen(stream_BTH=stream_BTH, out_BTH=out[0] if isinstance(out, tuple) else out, **seen)

            work(run)

        station.work = do
        try:
            self.model(**inputs_of(batch))
        finally:
            station.work = None

    @contextmanager
    def _tapped(
        self, layer: int, new: dict[str, torch.Tensor], channels: list[int] | None
    ) -> Iterator[dict[str, torch.Tensor]]:
        family, block, seen = self.family, self.stations[layer].block, {}
        handles = replaced_in(block, family, new.get, channels)  # first, so that what comes behind sees what they give

        def tap(path: str, output: str, inputs: str | None = None) -> None:
            def keep(_module, args, out) -> None:
                seen[output] = out
                if inputs:
                    seen[inputs] = args[0]

            handles.append(block.get_submodule(path).register_forward_hook(keep))

        tap(f"{family.attention}.{family.o_proj}", "attended_BTH", "heads_BTA")
        tap(f"{family.mlp}.{family.down_proj}", "fed_BTH", "hidden_BTC")
        tap(family.attention_norm or f"{family.attention}.{family.o_proj}", "attention_BTH")
        with hooked(handles):
            yield seen


@contextmanager
def block_by_block(model: PreTrainedModel, family: Family, batch: Batch) -> Iterator[BlockByBlock]:
    """Within this context the blocks run one at a time only.

    Args:
        batch: any; FSDP2 learns at a model's first call which modules are its blocks, so one is made before.
    """
    layers = model.get_submodule(family.layers)
    blocks = list(layers.children())
    stations = [_Station(block) for block in blocks]
    with torch.no_grad(), without_head(model):
        model(**inputs_of(batch))
        try:
            for layer, station in enumerate(stations):
                layers[layer] = station
            yield BlockByBlock(model, family, stations)
        finally:
            for layer, block in enumerate(blocks):
                layers[layer] = block
