"""Off-policy distillation: the loss of continued pre-training, with the parent's distribution at every token beside it.

The unpruned parent is loaded into the trainer's own workers, sharded over them as the policy is, and reads the same
micro-batch without gradients; nothing of it is stored.
"""

import os
from pathlib import Path

import torch
from tensordict import TensorDict
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import sft_loss

from ptl_rl.attention import FLASH

CHUNK_TOKENS = 1024
"""Tokens whose distributions are held in float32 at a time."""


def _chunk_divergence(policy_NV: torch.Tensor, parent_NV: torch.Tensor) -> torch.Tensor:
    parent_log_NV = log_softmax(parent_NV.float(), dim=-1)
    return (parent_log_NV.exp() * (parent_log_NV - log_softmax(policy_NV.float(), dim=-1))).sum(-1)


def divergence(policy_NV: torch.Tensor, parent_NV: torch.Tensor) -> torch.Tensor:
    """(N,) ``KL(parent || policy)`` over the whole vocabulary, in nats; gradients reach the policy's logits only."""
    chunks = zip(policy_NV.split(CHUNK_TOKENS), parent_NV.split(CHUNK_TOKENS), strict=True)
    return torch.cat([checkpoint(_chunk_divergence, *chunk, use_reentrant=False) for chunk in chunks])


class ParentLoss:
    """verl's loss function: ``cross_entropy`` times its own SFT loss plus ``weight`` times the divergence.

    Means are over all tokens of the global batch that count. verl calls it twice per micro-batch: with the policy's
    logits, where it returns what it wants of every token, and with that and the log-probabilities, for the loss.
    """

    def __init__(self, folder: Path, weight: float, cross_entropy: float, attention: str, dtype: str) -> None:
        self.folder, self.weight, self.cross_entropy = folder, weight, cross_entropy
        self.attention = attention
        self.dtype = dtype
        self._parent: torch.nn.Module | None = None

    def _loaded(self) -> torch.nn.Module:
        if self._parent is None:
            from torch.distributed.device_mesh import init_device_mesh
            from verl.utils.device import get_device_name

            from ptl_rl.checkpoints.sharded import load_sharded

            mesh = init_device_mesh(get_device_name(), (torch.distributed.get_world_size(),))
            parent = load_sharded(self.folder, mesh, getattr(torch, self.dtype), attention=self.attention)
            self._parent = parent.requires_grad_(False)
        return self._parent

    @torch.no_grad()
    def parent_logits(self, data: TensorDict) -> torch.Tensor:
        """(N, V) over the documents of a micro-batch, one after the other; padded only if the policy's are."""
        ids = data["input_ids"]
        if self.attention == FLASH:  # a position of 0 tells it where a document begins
            options = {"input_ids": ids.values()[None], "position_ids": data["position_ids"].values()[None]}
            return self._loaded()(**options, use_cache=False).logits[0]
        length_B = ids.offsets().diff()
        # Left to itself torch pads to the tokens of all rows together, where it does not know the longest one.
        ids_BT = torch.nested.to_padded_tensor(ids, 0, output_size=(len(length_B), int(length_B.max())))
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < length_B[:, None]
        logits_BTV = self._loaded()(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        return logits_BTV[mask_BT]

    def __call__(self, model_output=None, data=None, dp_group=None, student_logits=None):
        if student_logits is not None:
            # flash-attn's kernel writes its gradient over the logits, which the divergence's backward pass reads again.
            # verl looks at this at every call, and takes the log-probabilities without the kernel.
            os.environ["VERL_DISABLE_FLASH_ATTN_CE"] = "1"
            return {"parent_divergence": divergence(student_logits[0], self.parent_logits(data))[None]}
        loss, metrics = sft_loss(None, model_output, data, dp_group)
        # A token's mask stands where the token does, its prediction one place before.
        counts_N = torch.roll(data["loss_mask"].values(), shifts=-1, dims=0)
        apart_N = model_output["parent_divergence"].values() * counts_N
        parent_loss = apart_N.sum() / data["batch_num_tokens"] * data["dp_size"]
        metrics = {**metrics, "parent_kl": float(apart_N.detach().sum() / counts_N.sum().clamp_min(1))}
        return self.cross_entropy * loss + self.weight * parent_loss, metrics


def ask_for_logits(data: TensorDict) -> None:
    """Have verl hand the policy's logits of this batch to the loss function."""
    tu.assign_non_tensor(data, distillation_use_topk=True)
