"""The embedded test bed: generated word problems, tiny models of every family, and a shipped checkpoint.

It exists so that the whole system (Ray, verl, FSDP2, vLLM) runs and proves itself on two CPU cores without a
download, and so that a change to the loop can be judged in minutes instead of GPU days.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).parent / "checkpoint"
