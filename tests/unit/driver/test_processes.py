"""Processes are found by their tag wherever they hide, and shared memory goes only when nobody maps it."""

import os
import subprocess
import sys
import time
from multiprocessing import shared_memory

import pytest

from ptl_rl.config import WatchdogConfig
from ptl_rl.driver import processes
from ptl_rl.driver.processes import end_processes, remove_orphaned_segments, tagged_processes
from ptl_rl.driver.watchdog import StageStalled, watch

SLEEP = "import time; time.sleep(60)"


def start(code: str, tag: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PTL_TEST": tag}, start_new_session=True)


def wait_for(tag: str, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(tagged_processes("PTL_TEST", tag)) != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tagged_processes_end_and_others_live(tmp_path):
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"
    stubborn, parent, other = start(ignore, "one"), start(child, "one"), start(SLEEP, "two")
    parent.wait()  # its child lives on, in another session and without its parent
    wait_for("one", 2)
    try:
        assert end_processes("PTL_TEST", "one", grace_seconds=0) == 2
        assert tagged_processes("PTL_TEST", "one") == []
        assert other.poll() is None
    finally:
        for process in (stubborn, other):
            process.kill()
            process.wait()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm")  # noqa: PTH112
def test_only_unmapped_new_segments_are_removed(monkeypatch):
    prefix = f"ptltest{os.getpid()}"  # not those that runs on this machine have, nor theirs this one's
    monkeypatch.setattr(processes, "SEGMENT_PREFIXES", (prefix,))
    since = time.time() - 1
    held = shared_memory.SharedMemory(create=True, size=64, name=f"{prefix}held")
    orphan = shared_memory.SharedMemory(create=True, size=64, name=f"{prefix}orphan")
    orphan.close()
    try:
        assert orphan.name not in remove_orphaned_segments(since=time.time() + 60)
        removed = remove_orphaned_segments(since=since)
        assert orphan.name in removed and held.name not in removed
    finally:
        held.close()
        held.unlink()


def test_watchdog_passes_progress_on_and_ends_silence(tmp_path):
    progress, seen = tmp_path / "progress.jsonl", []
    progress.write_text('{"done": 1, "total": 2, "metrics": {"reward": 0.5}}\n{"done": 2, "tot')
    limits = WatchdogConfig(startup_seconds=10, stall_seconds=5).model_copy(update={"stall_seconds": 1})
    process = start(SLEEP, "watch")
    try:
        with pytest.raises(StageStalled, match=r"no progress for 1 s \(watchdog.stall_seconds\)"):
            watch(process, progress, limits, lambda *line: seen.append(line), poll_seconds=0.05)
    finally:
        process.kill()
        process.wait()
    assert [line for line in seen if line[0] >= 0] == [(1, 2, {"reward": 0.5})]
    alive = "import time\nfor _ in range(8):\n    time.sleep(0.25)\n    "
    alive += f'open({str(progress)!r}, \'a\').write(\'{{"done": -1, "total": -1, "metrics": {{}}}}\\n\')'
    progress.write_text("")
    assert watch(start(alive, "watch"), progress, limits, lambda *_: None, poll_seconds=0.05) == 0  # within a long step
    quick = start("raise SystemExit(3)", "watch")
    assert watch(quick, tmp_path / "none", limits, lambda *_: None, poll_seconds=0.05) == 3
