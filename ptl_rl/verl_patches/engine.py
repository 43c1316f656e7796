"""What verl's FSDP engine is given; verl imports this module in its workers, by `model.external_lib`.

Importing must do the work. Nothing else imports it, for the engine is heavy to import. verl's SFT trainer imports
`external_lib` in its own process only, and hands its workers configurations that are made: so the class of one of them
stands here, and a worker to which Ray hands it has imported this module.
"""

import functools
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from verl.trainer.config import CheckpointConfig

LOG_PROBABILITY_TOKENS = 1024
"""Tokens whose distributions are held in float32 at a time."""


@dataclass
class StepwiseCheckpointConfig(CheckpointConfig):
    """verl's section ``checkpoint``, and what our writer must know to tell the steps apart."""

    last_step: int | None = None
    """After it training ends; see :func:`ptl_rl.verl_patches.checkpoint.contents_at`."""


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

    from ptl_rl.verl_patches.checkpoint import ShardedCheckpointManager

    engine.FSDPCheckpointManager = ShardedCheckpointManager


def _chunk_log_probabilities(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    logits_NV = logits_NV.float()
    return logits_NV.gather(-1, labels_N[:, None]).squeeze(-1) - logits_NV.logsumexp(-1)


def log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``labels``, in float32.

    Args:
        logits: (..., V), of any floating type; (...) ``labels``.
    """
    logits_NV, labels_N = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    pairs = zip(logits_NV.split(LOG_PROBABILITY_TOKENS), labels_N.split(LOG_PROBABILITY_TOKENS), strict=True)
    chunks = [checkpoint(_chunk_log_probabilities, *pair, use_reentrant=False) for pair in pairs]
    return torch.cat(chunks).view(labels.shape)


def take_log_probabilities_in_chunks() -> None:
    """Take log-probabilities of many tokens at a time where flash-attn's kernel for them is missing (verl 0.9).

    verl then goes through the tokens one by one, in Python; its kernel, where there is one, stays in use.
    """
    from verl.utils import torch_functional

    if not hasattr(torch_functional.logprobs_from_logits_v2, "stock"):
        log_probabilities.stock = torch_functional.logprobs_from_logits_v2  # type: ignore[attr-defined]
        torch_functional.logprobs_from_logits_v2 = log_probabilities


def _activate() -> None:
    from ptl_rl.cpu.checks import should_activate
    from ptl_rl.cpu.patches import check_version

    check_version()
    write_checkpoints_on_all_ranks()
    take_log_probabilities_in_chunks()
    if should_activate():
        keep_offloaded_memory_unpinned()


_activate()
