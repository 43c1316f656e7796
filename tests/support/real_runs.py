"""Runs on the real stack, driven by the command line as a user would: what is at work, and how they are ended."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from ptl_rl.driver.journal import Journal

PATIENCE = 900
"""Seconds for a driver to come to a stage; a busy machine takes several times what an idle one does."""


def resume_command(run_dir: Path, python: str) -> list[str]:
    return [python, "-m", "ptl_rl.cli", "resume", str(run_dir)]


def entries(run_dir: Path) -> list[str]:
    return [f"{e.cycle}.{e.stage}" for e in Journal(run_dir / "journal.jsonl").entries()]


def processes_with(name: str, values: set[str]) -> list[psutil.Process]:
    """Living processes that have one of the values in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) in values and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def with_command(processes: list[psutil.Process], *words: str) -> psutil.Process:
    """The oldest of ``processes`` whose command line goes on with ``words`` behind the interpreter."""
    found = []
    for process in processes:
        with suppress(psutil.Error):  # ended meanwhile
            if process.cmdline()[1 : len(words) + 1] == list(words):
                found.append((process.create_time(), process))
    return min(found, key=lambda pair: pair[0])[1]  # one that it has just forked has its command line for a moment


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Living processes of the run, found by the ids of all drivers that worked on it."""
    ids = {json.loads(path.read_text())["stage_id"][:32] for path in run_dir.glob("logs/*.spec.json")}
    return processes_with("PTL_RUN_ID", ids)


@contextmanager
def killed_in_the_end(
    arguments: list[str], output: int | IO = subprocess.DEVNULL, **options
) -> Iterator[subprocess.Popen]:
    """A process that SIGKILL ends, also when the test fails: it would go on beside the tests that follow."""
    process = subprocess.Popen(arguments, stdout=output, stderr=output, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def wait_for(found: Callable[[], object], process: subprocess.Popen) -> None:
    """Until something is there, while the process that is to bring it about lives."""
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(run_dir: Path, stage: str) -> list[int]:
    """Training steps that the latest attempt at a stage has reported."""
    attempts = sorted(run_dir.glob(f"logs/{stage}.*.progress.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = attempts[-1].read_text().splitlines() if attempts else []
    return [json.loads(line)["done"] for line in lines if line.endswith("}")]
