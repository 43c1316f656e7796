"""The embedded test bed: generated word problems, tiny models of every family, and shipped checkpoints of some.

It exists so that the whole system (Ray, verl, FSDP2, vLLM) runs and proves itself on two CPU cores without a
download, and so that a change to the loop can be judged in minutes instead of GPU days.
"""

from pathlib import Path

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
CHECKPOINT_DIR = _CHECKPOINTS / "qwen2"
"""The demo's model, ``testbed``."""


def shipped_checkpoint(name: str) -> Path | None:
    """Folder of ``testbed`` or ``testbed:NAME``; None for any other name.

    Raises:
        ValueError: no checkpoint of that name is shipped.
    """
    testbed, colon, shipped = name.partition(":")
    if testbed != "testbed":
        return None
    folder = _CHECKPOINTS / shipped if colon else CHECKPOINT_DIR
    if not colon or (shipped and (folder / "config.json").is_file()):
        return folder
    there = ", ".join(sorted(f"testbed:{path.name}" for path in _CHECKPOINTS.iterdir()))
    raise ValueError(f"{name}: no such checkpoint is shipped; there are {there}")
