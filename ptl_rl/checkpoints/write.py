"""A checkpoint's safetensors files: which tensors stand in which, so that each rank writes its own; their type."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MAX_FILE_BYTES = 5 << 30


def group_into_files(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Tensors, in order, in files of about equal size: one per rank if there are enough, none above the limit.

    Rank r writes the files r, r + ranks, and so on.

    Args:
        sizes: bytes of every tensor by its name.
    """
    limit = max(1, min(MAX_FILE_BYTES, -(-sum(sizes.values()) // ranks)))
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit and (len(groups) < ranks or filled + size > MAX_FILE_BYTES):
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def file_name(index: int, count: int) -> str:
    """Of the file ``index`` of ``count``, as transformers names it."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def weight_map(groups: list[list[str]]) -> dict[str, str]:
    """Tensor name to file name."""
    return {name: file_name(index, len(groups)) for index, group in enumerate(groups) for name in group}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all, with the permissions of any new file; safetensors makes it private."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.touch()
    permissions = unfinished.stat().st_mode
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.chmod(permissions)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    """``model.safetensors.index.json`` of what :func:`weight_map` gives, where there are several files."""
    names = set(files.values())
    if names != {file_name(0, 1)}:
        size = sum((folder / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": size}, "weight_map": dict(files)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def convert_weights(source: Path, out: Path, dtype: str) -> None:
    """Copy a checkpoint's safetensors files, floating-point tensors as ``dtype``; one file is in memory at a time."""
    files = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                files[name] = path.name
        write_tensors(tensors, out / path.name)
    write_index(out, files)
