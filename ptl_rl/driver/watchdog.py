"""Watch one stage: pass its progress on, and end it when it falls silent.

A failed call inside a vLLM worker can leave verl waiting for ever, so silence is the only sign there is.
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ptl_rl.config import WatchdogConfig
from ptl_rl.stage import NewLines


class StageStalled(RuntimeError):
    """No progress within the limit."""


_interrupted = False


def interrupt(_signal: int, _frame: object) -> NoReturn:
    """Handler of SIGINT and SIGTERM. Python drops what is raised while an object is destroyed, so it is also noted."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def watch(
    process: subprocess.Popen,
    progress: Path,
    limits: WatchdogConfig,
    on_progress: Callable[[int, int, dict[str, Any]], None],
    poll_seconds: float = 0.2,
) -> int:
    """Wait for ``process``; returns its exit status.

    Raises:
        StageStalled: it made no first progress within ``startup_seconds``, or no further within ``stall_seconds``.
    """
    reader, last, started = NewLines(progress), time.monotonic(), False
    while True:
        if _interrupted:
            raise KeyboardInterrupt
        status = process.poll()
        for line in reader.read():
            on_progress(line["done"], line["total"], line["metrics"])
            last, started = time.monotonic(), True
        if status is not None:
            return status
        limit = limits.stall_seconds if started else limits.startup_seconds
        if time.monotonic() - last > limit:
            setting = "watchdog.stall_seconds" if started else "watchdog.startup_seconds"
            raise StageStalled(f"no progress for {limit} s ({setting})")
        on_progress(-1, -1, {})
        time.sleep(poll_seconds)
