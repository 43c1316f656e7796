"""Apply a plan to a checkpoint on disk, file by file: no model is built and no rank holds more than one output file.

The result is an ordinary Hugging Face folder with a smaller ``intermediate_size`` and ``num_hidden_layers``.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from ptl_rl.checkpoints.companions import copy_companions, write_config
from ptl_rl.checkpoints.headers import checkpoint_files
from ptl_rl.checkpoints.write import file_name, group_into_files, weight_map, write_index, write_tensors
from ptl_rl.errors import UserError
from ptl_rl.families import Family, read_shape
from ptl_rl.pruning.plan import PruningPlan


class MissingWeightError(UserError, ValueError):
    """A compensated weight that the plan promises is not there."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a sliced model: where it comes from and how it is cut."""

    name: str
    source_name: str
    dim: int | None = None
    """Dimension along which channels are selected; None: the tensor is copied."""
    layer: int = -1
    projection: str = ""
    """``o_proj`` or ``down_proj``, whose weights compensation replaces."""


def piece_of(name: str, family: Family, new_index: dict[int, int]) -> Piece | None:
    """What becomes of a tensor of the source; None: it goes.

    Args:
        new_index: from ids of the blocks that stay to those that they then have.
    """
    match = re.fullmatch(re.escape(family.layers) + r"\.(\d+)\.(.+)", name)
    if match is None:
        return Piece(name, name)
    layer, rest = int(match.group(1)), match.group(2)
    if layer not in new_index:
        return None
    module, _, kind = rest.rpartition(".")
    dim, projection = None, ""
    if module in (f"{family.mlp}.{family.gate_proj}", f"{family.mlp}.{family.up_proj}"):
        dim = 0
    elif module == f"{family.mlp}.{family.down_proj}" and kind == "weight":
        dim, projection = 1, "down_proj"
    elif module == f"{family.attention}.{family.o_proj}" and kind == "weight":
        projection = "o_proj"
    return Piece(f"{family.layers}.{new_index[layer]}.{rest}", name, dim, layer, projection)


def _sizes(source_files: dict[str, Path], stack: ExitStack) -> tuple[dict[str, int], dict[Path, safe_open]]:
    handles = {path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(source_files.values()))}
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    sizes = {}
    for name, path in source_files.items():
        view = handles[path].get_slice(name)
        sizes[name] = torch.Size(view.get_shape()).numel() * widths.get(view.get_dtype(), 1)
    return sizes, handles


def slice_weights(
    source: Path,
    plan: PruningPlan,
    out: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    new_weights: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Write this rank's files of the sliced checkpoint; returns tensor name to file name for all ranks' files.

    Args:
        new_weights: folder of :func:`save_new_weight` files, which replace what would be copied or cut.
        progress: called with tensors written and tensors to write by this rank.

    Raises:
        MissingWeightError: ``new_weights`` lacks a block whose channels are cut.
    """
    family = read_shape(source).family
    new_index = {old: new for new, old in enumerate(plan.keep_layers)}
    with ExitStack() as stack:
        source_files = checkpoint_files(source)
        sizes, handles = _sizes(source_files, stack)
        ratio = plan.intermediate_size / plan.source_intermediate_size
        pieces, sizes_after = {}, {}
        for name in sorted(source_files):
            piece = piece_of(name, family, new_index)
            if piece is not None:
                pieces[piece.name] = piece
                sizes_after[piece.name] = int(sizes[name] * (1 if piece.dim is None else ratio))
        groups = group_into_files(sizes_after, ranks)
        own = groups[rank::ranks]
        done, total = 0, sum(map(len, own))
        for index in range(rank, len(groups), ranks):
            tensors = {}
            for name in groups[index]:
                piece = pieces[name]
                tensor = handles[source_files[piece.source_name]].get_tensor(piece.source_name)
                new = None
                if new_weights and piece.projection:
                    new = load_new_weight(new_weights, piece.layer, piece.projection)
                if new is not None:
                    tensor = new.to(tensor.dtype)
                elif new_weights and piece.dim == 1 and plan.intermediate_size != plan.source_intermediate_size:
                    raise MissingWeightError(
                        f"{new_weights}: the weight of block {piece.layer} is missing; score again"
                    )
                elif piece.dim is not None:
                    tensor = tensor.index_select(piece.dim, torch.tensor(plan.keep_channels[piece.layer]))
                tensors[name] = tensor.contiguous()
                done += 1
                progress(done, total)
            write_tensors(tensors, out / file_name(index, len(groups)))
    return weight_map(groups)


def _new_weight_file(folder: Path, layer: int, name: str) -> Path:
    return folder / f"{layer:05d}.{name}.safetensors"


def save_new_weight(folder: Path, layer: int, name: str, weight: torch.Tensor) -> None:
    """Keep a source block's new ``down_proj`` or ``o_proj`` weight for the rank that writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors({"weight": weight.float().cpu().contiguous()}, _new_weight_file(folder, layer, name))


def load_new_weight(folder: Path, layer: int, name: str) -> torch.Tensor | None:
    """float32 weight of :func:`save_new_weight`; None if that projection keeps its own."""
    path = _new_weight_file(folder, layer, name)
    return load_file(path)["weight"] if path.exists() else None


def config_changes(source: Path, plan: PruningPlan) -> dict[str, Any]:
    """What of the source's ``config.json`` is another in the sliced model."""
    family = read_shape(source).family
    config = AutoConfig.from_pretrained(source)
    changes: dict[str, Any] = {"intermediate_size": plan.intermediate_size, "num_hidden_layers": plan.num_hidden_layers}
    if plan.num_hidden_layers < config.num_hidden_layers:
        for field in family.per_layer_fields:  # written out, as what transformers fills in would be of other blocks
            values = getattr(config, field, None)
            if isinstance(values, list):
                changes[field] = [values[layer] for layer in plan.keep_layers]
        first_windowed = getattr(config, "max_window_layers", None)
        if first_windowed is not None:  # Qwen: blocks from this one on attend to a window only
            changes["max_window_layers"] = sum(layer < first_windowed for layer in plan.keep_layers)
    return changes


def write_companions(source: Path, plan: PruningPlan, out: Path, files: dict[str, str]) -> None:
    """Write ``config.json``, the weight index where there are several files, and copy the tokenizer (rank 0's part)."""
    write_config(source, out, **config_changes(source, plan))
    copy_companions(source, out)
    write_index(out, files)


def slice_checkpoint(
    source: Path,
    plan: PruningPlan,
    out: Path,
    *,
    new_weights: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Slice a whole checkpoint in one process; see :func:`slice_weights`."""
    out.mkdir(parents=True, exist_ok=True)
    files = slice_weights(source, plan, out, new_weights=new_weights, progress=progress)
    write_companions(source, plan, out, files)
