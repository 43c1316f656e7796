"""Read a checkpoint's safetensors files by byte range, and tell checkpoints apart."""

import hashlib
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open

from ptl_rl.checkpoints.headers import checkpoint_files
from ptl_rl.families import UnsupportedModelError

CHUNK_VALUES = 1 << 24
"""Read at a time where a whole checkpoint is."""


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


def check_finite(folder: Path) -> None:
    """Read every weight of a checkpoint once; raise :class:`UnsupportedModelError` for one that is no finite number."""
    files = checkpoint_files(folder)
    for path in sorted(set(files.values())):
        with safe_open(path, "pt") as file:
            for name in sorted(name for name, where in files.items() if where == path):
                view = file.get_slice(name)
                rows, *rest = view.get_shape()
                step = max(1, CHUNK_VALUES // max(1, torch.Size(rest).numel()))
                for start in range(0, rows, step):
                    low, high = torch.aminmax(view[start : start + step])  # not a number spreads to both
                    if not (low.isfinite() and high.isfinite()):
                        raise UnsupportedModelError(
                            f"{path}: {name} holds values that are infinite or not a number; the checkpoint is "
                            "damaged, or its training diverged: take another one"
                        )
