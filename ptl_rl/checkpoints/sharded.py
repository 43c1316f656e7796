"""Load a Hugging Face checkpoint as an FSDP2 model whose ranks each read only their own shard from disk.

No rank ever holds the whole model: parameters are created on the meta device, sharded there, and filled from byte
ranges of the safetensors files. Peak memory is the shard plus the blocks that FSDP2 has unsharded.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ptl_rl.checkpoints.headers import checkpoint_files
from ptl_rl.families import UnsupportedModelError, is_capped, read_config_json, read_shape


def _shard_range(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """FSDP2 shards dimension 0 as ``torch.chunk`` does."""
    chunk = -(-size // ranks)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


def _read_shards(model: nn.Module, folder: Path, mesh: DeviceMesh, dtype: torch.dtype, device: torch.device):
    """State dict of DTensors, each rank's part read by byte range; tied names share one Parameter."""
    files, rank, ranks = checkpoint_files(folder), mesh.get_local_rank(), mesh.size()
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    filled: dict[str, nn.Parameter] = {}
    state: dict[str, nn.Parameter] = {}
    with ExitStack() as stack:
        handles = {path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(files.values()))}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first = tied[id(parameter)]
            if first not in filled:
                if first not in files:
                    raise UnsupportedModelError(f"{folder}: the checkpoint lacks the tensor {first}")
                low, high = _shard_range(parameter.shape[0], rank, ranks)
                local = handles[files[first]].get_slice(first)[low:high].to(device=device, dtype=dtype)
                tensor = DTensor.from_local(
                    local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
                filled[first] = nn.Parameter(tensor, requires_grad=False)
            state[name] = filled[first]
    return state


def load_sharded(
    folder: Path,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """An FSDP2-sharded causal language model in eval mode, without gradients.

    Raises:
        UnsupportedModelError: unknown family, missing tensors, weights that are not safetensors, or a soft cap on
            attention logits that ``attention`` would leave out.
    """
    shape = read_shape(folder)
    if attention == "sdpa" and is_capped(read_config_json(folder)):
        raise UnsupportedModelError(f"{folder}: sdpa leaves out the soft cap on its attention logits; use eager")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config._attn_implementation = attention
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    for block in model.get_submodule(shape.family.layers).children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else None
    device = device or torch.device(mesh.device_type)
    model.load_state_dict(_read_shards(model, folder, mesh, dtype, device), strict=False, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
    return model.eval()
