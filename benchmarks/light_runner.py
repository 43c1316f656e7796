"""Run stages within a time budget and leave one JSON line of each; ``gpu_first_light.py`` says what the stages are.

It exists for machines that are rented for minutes and seen through their output alone: a stage that fails or hangs
costs its own time and no more, and its line holds what is needed to mend it from afar.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ptl_rl.driver.environment import nvidia_smi
from ptl_rl.driver.processes import end_processes, tagged_processes

ROOT = Path(__file__).resolve().parent.parent
TAIL_LINES = 60
TAG = "PTL_FIRST_LIGHT"
Line = dict[str, Any]


class StageFailed(RuntimeError):
    """A stage's command did not do what it should.

    Attributes:
        found: what was seen before that.
        log: whose last lines say why.
    """

    def __init__(self, reason: str, log: Path | None = None, found: Line | None = None) -> None:
        super().__init__(reason)
        self.log, self.found = log, found or {}


class StageSkipped(Exception):
    """What this machine cannot run, with the reason."""


@dataclass(frozen=True)
class Stage:
    """One thing to be seen."""

    name: str
    needs_seconds: float
    """About what it takes: with less left it is not begun."""
    run: Callable[[float], Line]
    """Given the seconds that it may take, returns what it saw; raises what went wrong."""
    most_seconds: float = float("inf")
    """A stage that hangs is ended then, for the sake of the later ones."""


def tail(log: Path | None, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; empty without one."""
    if log is None or not log.exists():
        return ""
    return "\n".join(line[:500] for line in log.read_text(errors="replace").splitlines()[-lines:])


class Lines:
    """The file of JSON lines; a later line of a stage takes the place of an earlier one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, line: Line) -> None:
        cut_short = self.path.exists() and self.path.read_text()[-1:] not in ("", "\n")
        with self.path.open("a") as file:
            file.write(("\n" if cut_short else "") + json.dumps(line) + "\n")

    def latest(self) -> dict[str, Line]:
        """By stage. What a killed process left of a line is passed over."""
        found: dict[str, Line] = {}
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            found[line["stage"]] = line
        return found


class Sampler(threading.Thread):
    """Looks every so often at how much memory is used, and keeps the peak.

    Args:
        read: GiB in use on the most used GPU (or on the host) and how busy the GPUs are in percent; None if unknown.
    """

    def __init__(self, read: Callable[[], tuple[float, float] | None], every_seconds: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.read, self.every_seconds = read, every_seconds
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._seen: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._ended.wait(self.every_seconds):
            seen = self.read()
            if seen is not None:
                with self._lock:
                    self._seen.append(seen)

    def take(self) -> Line:
        """Peak and mean since the last call."""
        with self._lock:
            seen, self._seen = self._seen, []
        if not seen:
            return {}
        peak, busy = max(gib for gib, _ in seen), sum(percent for _, percent in seen) / len(seen)
        return {"memory_peak_gib": round(peak, 2), "busy_percent": round(busy)}

    def end(self) -> None:
        self._ended.set()


def read_gpus() -> tuple[float, float] | None:
    """What ``nvidia-smi`` says: every process's memory, also that of engines in processes of their own."""
    try:
        used, busy = zip(*(map(float, row) for row in nvidia_smi("memory.used,utilization.gpu")), strict=True)
    except ValueError:  # no rows, or a GPU that does not say
        return None
    return max(used) / 1024, max(busy)


def read_host() -> tuple[float, float]:
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) / 2**30, psutil.cpu_percent()


@dataclass
class Commands:
    """Runs commands in process groups of their own, and ends all of what they started."""

    tag: str = field(default_factory=lambda: uuid.uuid4().hex)

    def environment(self) -> dict[str, str]:
        """This checkout's code, and no look at the internet."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **ours, "TQDM_DISABLE": "1", TAG: self.tag}

    def call(self, arguments: Sequence[str | Path], log: Path, seconds: float) -> None:
        """Run ``arguments``, output to ``log`` and, as it comes, to the screen.

        Raises:
            StageFailed: another exit status than 0, or not at an end within ``seconds``.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        shown, deadline = log.stat().st_size if log.exists() else 0, time.monotonic() + seconds
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                shown = self._show(log, shown)
            status = process.poll()
            if status is None:
                write_stacks(self.tag, log.with_suffix(".stacks"))
        finally:
            self._end(process)
            self._show(log, shown)
        what = " ".join(Path(argument).name for argument in arguments[1:4])
        if status is None:
            stacks = log.with_suffix(".stacks")
            raise StageFailed(f"{what}: ended after {seconds:.0f} s, the most that it may take; stacks: {stacks}", log)
        if status:
            raise StageFailed(f"{what}: exit status {status}", log)

    @staticmethod
    def _show(log: Path, start: int) -> int:
        with log.open("rb") as file:
            file.seek(start)
            whole = file.read().rpartition(b"\n")[0]  # of a line that is still being written, nothing yet
        for line in whole.decode(errors="replace").splitlines():
            print(f"    {line}", flush=True)
        return start + len(whole) + bool(whole)

    def _end(self, process: subprocess.Popen) -> None:
        """The group gets a chance to end its own; then goes what carries the tag, in whatever session it is."""
        for number, grace_seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(grace_seconds)
                except subprocess.TimeoutExpired:
                    continue
        end_processes(TAG, self.tag, grace_seconds=0)


def write_stacks(tag: str, out: Path) -> None:
    """Where the Python of every process at work stands, as ``py-spy``, which comes with Ray, sees it."""
    spy = Path(sys.executable).with_name("py-spy")
    with out.open("w") as file:
        for process in tagged_processes(TAG, tag)[:40]:
            try:
                command = " ".join(process.cmdline())[:200]
                if any(word in command for word in ("ray::IDLE", "raylet", "gcs_server", "dashboard", "log_monitor")):
                    continue
                dump = subprocess.run(
                    [spy, "dump", "--pid", str(process.pid)], capture_output=True, text=True, timeout=5
                )
                file.write(f"== {process.pid} {command}\n{dump.stdout}{dump.stderr}\n")
            except (OSError, subprocess.SubprocessError, psutil.Error) as error:
                file.write(f"== {process.pid}: {error}\n")


def _failure(error: BaseException) -> Line:
    if isinstance(error, StageFailed):
        return {**error.found, "error": str(error), "log": str(error.log or ""), "tail": tail(error.log)}
    text = traceback.format_exc().splitlines()[-TAIL_LINES:]
    return {"error": f"{type(error).__name__}: {error}", "tail": "\n".join(text)}


def run_stages(
    stages: Sequence[Stage],
    lines: Lines,
    *,
    seconds: float,
    resume: bool = False,
    sampler: Sampler | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Line]:
    """Run ``stages`` in order and add a line of each; the lines are returned, with those that ``resume`` found.

    A line's ``ok`` is true, false, or null for a stage that was skipped, and ``skipped`` says why.
    """
    begun, found, earlier = clock(), [], lines.latest() if resume else {}
    for stage in stages:
        if earlier.get(stage.name, {}).get("ok"):
            found.append(earlier[stage.name])
            print(f"{stage.name}: ok in an earlier run, not run again", flush=True)
            continue
        left, started = seconds - (clock() - begun), clock()
        line: Line = {"stage": stage.name, "ok": None, "seconds": 0.0}
        interrupted = False
        if left < stage.needs_seconds:
            line["skipped"] = f"{max(0, left):.0f} s left, needs about {stage.needs_seconds:.0f}"
        else:
            print(f"[{clock() - begun:.0f} of {seconds:.0f} s] {stage.name}", flush=True)
            if sampler is not None:
                sampler.take()
            try:
                line |= {"ok": True, **stage.run(min(left, stage.most_seconds))}
            except StageSkipped as reason:
                line["skipped"] = str(reason)
            except (Exception, KeyboardInterrupt) as error:
                line |= {"ok": False, **_failure(error)}
                interrupted = isinstance(error, KeyboardInterrupt)
            line["seconds"] = round(clock() - started, 1)
            if sampler is not None:
                line |= sampler.take()
        lines.add(line)
        found.append(line)
        print(f"[{clock() - begun:.0f} of {seconds:.0f} s] {verdict(line)}", flush=True)
        if interrupted:
            break
    return found


def verdict(line: Line) -> str:
    """A line of the table."""
    if line["ok"] is None:
        return f"{line['stage']:8} skipped: {line['skipped']}"
    said = line.get("seen", "") if line["ok"] else line["error"].splitlines()[0][:160]
    return f"{line['stage']:8} {'ok' if line['ok'] else 'FAILED':7} {line['seconds']:6.1f} s  {said}"


def python(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, *arguments]
