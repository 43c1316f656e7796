"""Read a checkpoint's safetensors files by byte range, and tell checkpoints apart."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ptl_rl.families import UnsupportedModelError


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the safetensors file that holds it.

    Raises:
        UnsupportedModelError: no safetensors weights or damaged ones, or an index that names a missing file.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        files = {name: folder / file for name, file in names.items()}
    elif (folder / "model.safetensors").exists():
        path = folder / "model.safetensors"
        try:
            with safe_open(path, "pt") as file:
                files = dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise UnsupportedModelError(f"{path}: cannot be read ({error}); download or write it again") from None
    else:
        raise UnsupportedModelError(
            f"{folder}: no model.safetensors; only safetensors weights are read (convert with save_pretrained)"
        )
    missing = sorted({str(path) for path in files.values() if not path.exists()})
    if missing:
        raise UnsupportedModelError(f"{folder}: the index names files that do not exist: {', '.join(missing)}")
    return files


def read_tensor(folder: Path, name: str, rows: slice = slice(None)) -> torch.Tensor:
    """Rows of one tensor of a checkpoint, on the CPU; no byte of the others is read."""
    with safe_open(checkpoint_files(folder)[name], "pt") as file:
        return file.get_slice(name)[rows]


def checkpoint_hash(folder: Path) -> str:
    """Tells checkpoints of the same shape apart: hash over every tensor's name, type, shape and first row."""
    digest = hashlib.sha256()
    files = checkpoint_files(folder)
    with ExitStack() as stack:
        handles = {path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(files.values()))}
        for name in sorted(files):
            view = handles[files[name]].get_slice(name)
            digest.update(f"{name} {view.get_dtype()} {view.get_shape()}".encode())
            digest.update(view[:1].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
