"""What verl's checkpoints hold at which step, and a recovered policy's Hugging Face checkpoint, written by all ranks.

verl writes at every step that it saves all that it ever writes. Here the Hugging Face checkpoint is written at the last
step only, and what training goes on from before it only. verl 0.9 gathers every tensor of the former in rank 0's host
memory, beside an empty model of the same size: 45 GB at 7.6 B parameters in float32. Here a tensor is put together at a
time, and kept by the one rank that writes its file.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager, drop_tied_target_keys
from verl.utils.fsdp_utils import fsdp_version

from ptl_rl.checkpoints.companions import copy_companions, write_config
from ptl_rl.checkpoints.write import file_name, group_into_files, weight_map, write_index, write_tensors


def write_weights(state: dict[str, torch.Tensor], folder: Path, rank: int, ranks: int) -> None:
    """Write a sharded state dict as safetensors files; called on all ranks, each of which holds one file at most.

    The files of as many as there are ranks are put together, one tensor after the other, and then written side by side.

    Args:
        state: by name, DTensors (put together here) or tensors that every rank has whole.
        folder: which all ranks see, and which exists.
    """
    if rank == 0:
        for stale in folder.glob("*.safetensors*"):  # of an attempt with another number of ranks
            stale.unlink()
    dist.barrier()
    groups = group_into_files({name: value.numel() * value.element_size() for name, value in state.items()}, ranks)
    for first in range(0, len(groups), ranks):
        own = {}
        for owner, group in enumerate(groups[first : first + ranks]):
            for name in group:
                value = state[name].detach()
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if owner == rank:
                    own[name] = whole.cpu().contiguous()
                del whole
        if own:
            write_tensors(own, folder / file_name(first + rank, len(groups)))
    dist.barrier()
    if rank == 0:
        write_index(folder, weight_map(groups))
    dist.barrier()


def contents_at(step: int, last_step: int | None, contents: list[str]) -> list[str]:
    """What of ``contents`` is written at a step: ``hf_model`` at the last one alone, everything else before it alone.

    Args:
        last_step: after it training ends; None if that is not known, then everything is written.
    """
    before = [name for name in contents if name != "hf_model"]
    if last_step is None or not before or "hf_model" not in contents:
        return contents
    return ["hf_model"] if step >= last_step else before


class ShardedCheckpointManager(FSDPCheckpointManager):
    """verl's, but that ``hf_model`` is written by all ranks, and at its step. Adapters and FSDP1 are left to verl."""

    checkpoint_save_contents: list[str]
    _to_register: tuple[str, int] | None = None

    @property
    def _writes_shards(self) -> bool:
        return "hf_model" in self.checkpoint_save_contents and fsdp_version(self.model) == 2 and not self._has_lora()

    @property
    def should_save_hf_model(self) -> bool:
        """What verl writes itself."""
        return super().should_save_hf_model and not self._writes_shards

    def register_checkpoint(self, new_path: str, max_ckpt_to_keep: int) -> None:
        """Removes older checkpoints, so it waits until this one is whole."""
        if self._writes_shards:
            self._to_register = new_path, max_ckpt_to_keep
        else:
            super().register_checkpoint(new_path, max_ckpt_to_keep)

    def load_checkpoint(self, local_path: str, *args, **kwargs) -> None:
        """As verl's; later checkpoints replace this one, as if this process had written it."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if local_path is not None:
            self.previous_saved_paths = [local_path]

    def save_checkpoint(self, local_path: str, hdfs_path=None, global_step: int = 0, max_ckpt_to_keep=None) -> None:
        """As verl's; the weights lie in ``huggingface`` with the configuration and tokenizer that verl writes there."""
        contents = self.checkpoint_save_contents
        settings = self.checkpoint_config or {}
        self.checkpoint_save_contents = contents_at(global_step, settings.get("last_step", None), contents)
        try:
            super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
            if local_path is not None and self._writes_shards:
                self.write_shards(Path(local_path) / "huggingface")
        finally:
            self.checkpoint_save_contents = contents

    def write_shards(self, folder: Path) -> None:
        """Write the weights, configuration and tokenizer into a folder that exists; called on all ranks."""
        self._write(get_model_state_dict(self.model), folder)
        if self.rank == 0 and self._to_register is not None:
            super().register_checkpoint(*self._to_register)
            self._to_register = None
        dist.barrier()

    def write_sliced_weights(self, state: dict[str, Any], folder: Path, changes: dict[str, Any]) -> None:
        """The same of a smaller model; called on all ranks.

        Args:
            state: its state dict, sharded as this model's.
            changes: what is another in its configuration.
        """
        self._write(dict(state), folder, **changes)
        dist.barrier()

    def _write(self, state: dict[str, Any], folder: Path, **changes: Any) -> None:
        drop_tied_target_keys(state, self.model, self.model.config)
        write_weights(state, folder, self.rank, self.world_size)
        # verl writes what transformers makes of the source's files, with the attention of the training.
        if self.rank == 0:
            source = Path(self.model.config.name_or_path or folder)
            source = source if (source / "config.json").is_file() else folder
            write_config(source, folder, str(next(iter(state.values())).dtype).removeprefix("torch."), **changes)
            if source != folder:
                copy_companions(source, folder)
