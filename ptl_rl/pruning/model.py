"""A model to be pruned, on one rank of many or in one process, and how it reads."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ptl_rl.checkpoints.read import read_tensor
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import Family
from ptl_rl.pruning.score.calibration import Batch, batches_for_rank
from ptl_rl.pruning.score.streaming import CalibrationError, Listener, stream


@dataclass
class PrunableModel:
    """A model to be pruned, and how it reads."""

    model: PreTrainedModel
    family: Family
    source: Path
    """Folder of the checkpoint that the model was loaded from."""
    device: torch.device
    batch_size: int
    pad_token_id: int
    prompt_weight: float
    moments_gib: float | None = None
    """Most memory of a rank for second moments; None: no limit."""
    progress: Callable[[], None] = lambda: None
    """Called after every batch."""
    standing_LK: torch.Tensor | None = None
    """Ascending ids, per block, of the channels that are not zero; None: all. The others were cut in place."""

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.family.layers).children())

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def channels(self) -> int:
        """Per block, also those that were cut in place."""
        return self.model.config.intermediate_size

    @property
    def width(self) -> int:
        """Channels per block that were not cut."""
        return self.channels if self.standing_LK is None else self.standing_LK.shape[1]

    def standing(self, layer: int) -> torch.Tensor | slice:
        """Which of a block's channels were not cut, as an index."""
        return slice(None) if self.standing_LK is None else self.standing_LK[layer].to(self.device)

    def moment_groups(self) -> list[list[int]]:
        """Blocks whose second moments are summed up together, so that no rank holds more of them than it may.

        Raises:
            CalibrationError: a rank may not hold one.
        """
        every = list(range(self.layers))
        if self.moments_gib is None:
            return [every]
        each_gib = self.channels**2 * 4 / 2**30
        at_once = int(self.moments_gib / each_gib) * self.ranks
        if not at_once:
            raise CalibrationError(
                f"calibration.moments_gib is {self.moments_gib:g}, but the matrix of one block of {self.channels} "
                f"channels takes {each_gib:.2g}; raise it, or choose a criterion other than obs"
            )
        return [every[start : start + at_once] for start in range(0, len(every), at_once)]

    def batches(self, sequences: list[Sequence]) -> Iterator[Batch]:
        """This rank's share."""
        return batches_for_rank(
            sequences, self.batch_size, self.rank, self.ranks, self.pad_token_id, self.prompt_weight
        )

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``; progress is told of each once it has been read."""
        for batch in batches:
            yield batch
            self.progress()

    def report(self, tell: Callable[[int, int], None], total: int) -> None:
        """Have ``tell`` called after every batch, with how many were read and how many there are to read."""
        done = itertools.count(1)
        self.progress = lambda: tell(min(next(done), total), total)

    def rounds(self, sequences: list[Sequence]) -> int:
        """Batches that every rank reads in one pass."""
        return -(-len(sequences) // (self.batch_size * self.ranks))

    def read(self, sequences: list[Sequence], listeners: list[Listener], sensitivity: bool = False) -> None:
        batches = self.counted(self.batches(sequences))
        stream(self.model, self.family, batches, listeners, self.device, sensitivity=sensitivity)

    def fetch(self, layer: int) -> None:
        """Called on all ranks before any of them asks for a block's weights; a checkpoint needs no preparation."""

    def weight(self, layer: int, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of a projection's weight, read from the checkpoint, all of them by default."""
        return read_tensor(self.source, self.family.projection(layer, name) + ".weight", rows).to(self.device)

    def shares(self, rows: int, tasks: int = 1) -> list[tuple[int, slice]]:
        """What this rank does of ``tasks`` that each are ``rows`` independent rows: tasks, and which of their rows.

        A task costs something beside its rows (a factorisation), so a rank does one task only, if there are as many
        ranks as tasks: rank r does task r modulo ``tasks``, and shares its rows with the other ranks that do.
        """
        if self.ranks < tasks:
            return [(task, slice(0, rows)) for task in range(self.rank, tasks, self.ranks)]
        task, place = self.rank % tasks, self.rank // tasks
        members = len(range(task, self.ranks, tasks))
        own = slice(rows * place // members, rows * (place + 1) // members)
        return [(task, own)] if own.start < own.stop else []


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()
