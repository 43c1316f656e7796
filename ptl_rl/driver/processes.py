"""Start a stage's process, and make sure that nothing of it is left: processes are found by a tag in their environment.

Ray, vLLM and multiprocessing start processes in sessions and groups of their own, so neither process groups nor
parent links find them all; the inherited environment does.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
SEGMENT_PREFIXES = ("psm_", "verl_weights_")
STAGE_MODULE = "ptl_rl.driver.stage_main"
"""What a stage's process runs; tests of the driver put a quick stand-in here."""


def start_stage(spec: Path, log: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start ``spec``'s stage in a session of its own (a Ctrl-C reaches the driver only), output to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", STAGE_MODULE, str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Safe path: a user's own reward.py in the working directory must not hide the package of that name.
            env={**os.environ, **env, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )


@contextlib.contextmanager
def named_in_environment(name: str, value: str) -> Iterator[None]:
    """Processes that are started meanwhile carry ``name=value``; what this process starts later does not."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def tagged_processes(name: str, value: str) -> list[psutil.Process]:
    """Living processes, this one excepted, whose environment holds ``name=value``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.pid != os.getpid()
                and process.environ().get(name) == value
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def end_processes(name: str, value: str, grace_seconds: float) -> int:
    """Wait up to ``grace_seconds`` for tagged processes to end by themselves, then end them; returns how many were."""
    deadline = time.monotonic() + grace_seconds
    while (left := tagged_processes(name, value)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=2)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    return len(left)


def _mapped_segments() -> set[str]:
    names = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            for line in (Path("/proc") / str(process.pid) / "maps").read_text().splitlines():
                _, _, path = line.partition("/dev/shm/")
                if path:
                    names.add(path.removesuffix(" (deleted)"))
    return names


def remove_orphaned_segments(since: float) -> list[str]:
    """Remove shared memory that this user's ended weight transfers left: made after ``since``, mapped by no process."""
    if not SHARED_MEMORY.is_dir():
        return []
    candidates = []
    for path in SHARED_MEMORY.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.name.startswith(SEGMENT_PREFIXES) and status.st_uid == os.getuid() and status.st_ctime >= since:
                candidates.append(path)
    if not candidates:
        return []
    mapped = _mapped_segments()
    removed = []
    for path in candidates:
        if path.name not in mapped:
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path.name)
    return removed
