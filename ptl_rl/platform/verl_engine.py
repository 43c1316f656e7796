"""What verl's FSDP engine is given; verl imports this module in its workers, by `model.external_lib`.

Importing must do the work. It is apart from `verl_patches`, which every process that imports verl runs: the engine is
heavy to import. verl's SFT trainer imports `external_lib` in its own process only, and hands its workers configurations
that are made: so the class of one of them stands here, and a worker that unpickles it has imported this module.
"""

import functools
from dataclasses import dataclass

from verl.trainer.config import CheckpointConfig


@dataclass
class StepwiseCheckpointConfig(CheckpointConfig):
    """verl's section ``checkpoint``, and what our writer must know to tell the steps apart."""

    last_step: int | None = None
    """After it training ends; see :func:`ptl_rl.platform.verl_checkpoint.contents_at`."""


def keep_offloaded_memory_unpinned() -> None:
    """Let a reference policy (FSDP2's CPU offload) exist without an accelerator (verl 0.9, torch 2.13).

    verl offloads it to pinned memory, without a setting, and torch pins memory for an accelerator only.
    """
    from verl.workers.engine.fsdp import transformer_impl as engine

    policy = engine.CPUOffloadPolicy
    if isinstance(policy, functools.partial):
        return

    def unpinned(pin_memory: bool = True):
        return policy(pin_memory=False)

    engine.CPUOffloadPolicy = functools.partial(unpinned)


def write_checkpoints_on_all_ranks() -> None:
    """Save recovered policies without gathering them on rank 0 (verl 0.9), on any device."""
    from verl.workers.engine.fsdp import transformer_impl as engine

    from ptl_rl.platform.verl_checkpoint import ShardedCheckpointManager

    engine.FSDPCheckpointManager = ShardedCheckpointManager


def _activate() -> None:
    from ptl_rl.platform.checks import should_activate

    write_checkpoints_on_all_ranks()
    if should_activate():
        keep_offloaded_memory_unpinned()


_activate()
