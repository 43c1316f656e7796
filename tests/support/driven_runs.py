"""Runs that the real driver drives in seconds: what a stage does, and Ray, are replaced; its waits are shorter."""

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from forked import fork_server

import ptl_rl
from ptl_rl.config import RunConfig, WatchdogConfig
from ptl_rl.config.recipe import parse_config
from ptl_rl.driver import loop, processes
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.loop import Driver, start_run
from ptl_rl.driver.processes import end_processes
from ptl_rl.driver.ray_session import RaySession
from ptl_rl.driver.run_folder import RunFolder
from ptl_rl.driver.state import Stage, State, stage_of
from ptl_rl.driver.watchdog import watch
from ptl_rl.stage import StageSpec

HURRY = 10
"""By how much the watchdog's limits are shortened."""
PATIENCE = 30
"""Seconds for anything that a busy machine may delay."""
CYCLE = ("score", "slice", "recover", "evaluate", "gate")


def labels_of(cycles: int) -> list[str]:
    """The stages of a run whose every cycle is accepted at once."""
    return ["000-evaluate", *(f"{cycle:03d}-{stage}" for cycle in range(1, cycles + 1) for stage in CYCLE)]


def small_config(**sections: Any) -> RunConfig:
    """One cut of the shipped model unless ``schedule`` says otherwise; a stalled stage is ended after 1.5 s."""
    values = {
        "name": "driven",
        "model": {"path": "testbed"},
        "data": {"train": {"path": "testbed:rl", "rows": 64}},
        "schedule": {"channels_per_cycle": [480], "alignment": 16},
        "gate": {"max_extensions": 0},
        "resources": {"device": "cpu"},
        "watchdog": {"startup_seconds": HURRY * PATIENCE, "stall_seconds": HURRY * 3 // 2},
    }
    return parse_config({**values, **sections})


class Session(RaySession):
    """Without Ray: the GPUs are free unless ``is_free`` says otherwise."""

    is_free: Callable[[], bool] = staticmethod(lambda: True)

    def __enter__(self) -> "Session":
        self.started_here, self.address = True, "none"
        return self

    def __exit__(self, *_: object) -> None: ...

    def _are_free(self) -> bool:
        return type(self).is_free()

    def wait_for_workers(self, namespaces: str, seconds: float = 0.5) -> None:
        super().wait_for_workers(namespaces, seconds)


class Told:
    """In place of a display: keeps what the driver tells."""

    def __init__(self, on_note: Callable[[str], None] = lambda text: None) -> None:
        self.on_note = on_note
        self.notes: list[str] = []
        self.began: list[str] = []
        self.finished: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.cuts: list[Entry] = []

    def start(self, entries: list[Entry], state: State) -> None: ...

    def stop(self) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.on_note(text)

    def stage_started(self, stage, state: State) -> None:
        self.began.append(stage.label)

    def progress(self, done: int, total: int, metrics: dict[str, Any]) -> None:
        if done >= 0:
            self.steps.append((done, total))

    def cut_made(self, entry: Entry) -> None:
        self.cuts.append(entry)

    def stage_finished(self, entry: Entry, state: State) -> None:
        self.finished.append(stage_of(entry).label)


def _watch_in_a_hurry(process, progress, limits: WatchdogConfig, on_progress) -> int:
    shorter = {name: getattr(limits, name) / HURRY for name in ("startup_seconds", "stall_seconds")}
    return watch(process, progress, limits.model_copy(update=shorter), on_progress, poll_seconds=0.02)


def _end_in_a_hurry(name: str, value: str, grace_seconds: float) -> int:
    return end_processes(name, value, min(grace_seconds, 0.2))


_versions = functools.cache(loop.package_versions)


def replace_stages(setattr_: Callable[[object, str, Any], None] = setattr) -> None:
    """Put the stand-ins in place; with ``monkeypatch.setattr`` until the test ends."""
    setattr_(processes, "STAGE_MODULE", "fake_stage")
    setattr_(processes, "SEGMENT_PREFIXES", (f"ptltest{os.getpid()}",))  # not those of other runs on this machine
    setattr_(loop, "RaySession", Session)
    setattr_(loop, "watch", _watch_in_a_hurry)
    setattr_(loop, "end_processes", _end_in_a_hurry)
    setattr_(loop, "package_versions", _versions)


def search_path() -> str:
    """``PYTHONPATH`` on which processes find the stand-in and this very ``ptl_rl``."""
    return os.pathsep.join([str(Path(__file__).parent), str(Path(ptl_rl.__file__).parent.parent)])


class DrivenRun:
    """A run folder, and what its journal, specs and processes say."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.folder = start_run(config, path)
        self.path = self.folder.path
        self.journal = Journal(self.folder.journal)
        self.config = config
        self.act({})

    def act(self, acts: dict[str, str | float]) -> None:
        """From now on stages do as ``acts`` says, see :mod:`fake_stage`; those it does not name do their work."""
        (self.path / "acts.json").write_text(json.dumps(acts))

    def drive(self, told: Told | None = None) -> State:
        """What ``ptl run`` and ``ptl resume`` do, in this process."""
        return Driver(RunFolder(self.path), lambda _: told or Told()).run()

    def labels(self) -> list[str]:
        return [stage_of(entry).label for entry in self.journal.entries()]

    def decisions(self) -> list[str]:
        return [e.metrics["decision"] for e in self.journal.entries() if e.stage == "gate"]

    def specs(self) -> dict[str, StageSpec]:
        """Every start of a stage by its label and number, in order of time."""
        paths = [path for path in self.folder.logs.glob("*.spec.json") if path.stat().st_size]  # none of a full disk
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        return {path.name.removesuffix(".spec.json"): StageSpec.model_validate_json(path.read_text()) for path in paths}

    def starts(self, label: str) -> int:
        return len(list(self.folder.logs.glob(f"{label}.*.spec.json")))

    def maker(self, folder: str) -> str:
        """Which start of which stage made an artefact, by what the artefact itself says: ``001-slice.1``."""
        return json.loads((self.path / folder / "config.json").read_text())["made_by"].partition("-")[2]

    def processes(self) -> list[psutil.Process]:
        """Living processes of all drivers that ever worked on this run, and so of all stages."""
        ids = {spec.stage_id.partition("-")[0] for spec in self.specs().values()}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PTL_RUN_ID") in ids and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def check_complete(self, cycles: int = 1) -> None:
        """Everything is journaled once, stands where the journal says, and nothing else is left."""
        assert self.labels() == labels_of(cycles)
        for entry in self.journal.entries():
            if entry.artefact is not None:
                last = f"{stage_of(entry).label}.{self.starts(stage_of(entry).label)}"
                assert self.maker(entry.artefact) == entry.metrics["made_by"].partition("-")[2] == last
        for cycle in range(1, cycles + 1):
            manifest = json.loads((self.path / f"cycles/{cycle:03d}/manifest.json").read_text())
            assert [stage["stage"] for stage in manifest["stages"]] == list(CYCLE)
        assert (self.path / "best").resolve() == self.path / f"cycles/{cycles:03d}/recovered"
        assert [path.name for path in self.path.glob("cycles/*/.*")] == []
        assert self.processes() == []


def wait_until(condition: Callable[[], object], process: BaseProcess) -> None:
    """Until something is so of the run that ``process`` drives."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


def start_child(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process for a driver that a signal is to end; forked from one that has imported everything, which is quick."""
    process = fork_server().Process(target=target, args=arguments)
    process.start()
    return process


def _prepare_child() -> None:
    os.environ["PYTHONPATH"] = search_path()
    replace_stages()


def _kill_at(when: str, label: str, run_dir: Path) -> None:
    """Have this process end by SIGKILL before the stage's 'rename', before its 'line' in the journal, or 'after' it."""
    append, rename = Journal.append, Path.rename
    end = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    unfinished = RunFolder(run_dir).temporary(Stage(int(label[:3]), label[4:])) if when == "rename" else None

    def append_and_die(journal: Journal, entry: Entry) -> Entry:
        if when == "line" and stage_of(entry).label == label:
            end()
        written = append(journal, entry)
        if when == "after" and stage_of(entry).label == label:
            end()
        return written

    def die_or_rename(path: Path, target: Path) -> Path:
        if path == unfinished:
            end()
        return rename(path, target)

    Journal.append, Path.rename = append_and_die, die_or_rename  # type: ignore[method-assign]


def drive_until_killed(run_dir: Path, when: str, label: str) -> None:
    """Target of :func:`start_child`: a driver that is gone at that instant."""
    _prepare_child()
    _kill_at(when, label, run_dir)
    Driver(RunFolder(run_dir), lambda _: Told()).run()


def resume_command(run_dir: Path, errors: Path) -> None:
    """Target of :func:`start_child`: ``ptl resume``, what it says in ``errors``."""
    from ptl_rl.cli import app

    _prepare_child()
    with errors.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        app(["resume", str(run_dir)])
