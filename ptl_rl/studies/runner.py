"""Make a study's runs, one after the other; what a run's own journal holds is not made again."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptl_rl.config import ConfigError, RunConfig, ScoreConfig
from ptl_rl.driver.journal import Journal
from ptl_rl.driver.state import fold, next_stage
from ptl_rl.recipe import read_saved_config, save_config
from ptl_rl.studies.design import Row, Study

MODELS, RUNS, LOGS = "models", "runs", "logs"


class StudyFailed(RuntimeError):
    """Runs of a study ended without their result; the message names them and their logs."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row.name}-seed{self.seed}"

    @property
    def is_finished(self) -> bool:
        """Nothing is left to do, by the run's own journal."""
        if not (self.folder / "config.json").exists():
            return False
        config = read_saved_config(self.folder / "config.json")
        return next_stage(fold(config, Journal(self.folder / "journal.jsonl").entries())) is None


def runs_of(study: Study, out: Path, seeds: int) -> list[StudyRun]:
    """Every run of a study, seed by seed, so that an early look sees all rows."""
    return [StudyRun(row, seed, out / RUNS / f"{row.name}-seed{seed}") for seed in range(seeds) for row in study.rows]


def check_folder(study: Study, out: Path, seeds: int) -> None:
    """Raise :class:`ConfigError` if ``out`` holds runs of another design."""
    for run in runs_of(study, out, seeds):
        if not (run.folder / "config.json").exists():
            continue
        found, wanted = read_saved_config(run.folder / "config.json"), run.row.config(run.seed)
        differing = [
            name
            for name in RunConfig.model_fields
            if getattr(found, name) != getattr(wanted, name) and not (name == "model" and run.row.slicegpt_size)
        ]
        if differing:
            raise ConfigError(
                f"{run.folder}: was made with another {', '.join(differing)}; name another --out, or remove that run"
            )


def make_runs(
    study: Study, out: Path, seeds: int, *, progress: Callable[[int, int, str], None] = lambda done, total, name: None
) -> None:
    """Make all runs that are not finished; a run that fails does not keep the others from being made.

    Args:
        progress: called with runs done, runs in all, and the name of the one that begins.

    Raises:
        ConfigError: ``out`` holds runs of another design.
        StudyFailed: once the others are made, naming those that failed.
        KeyboardInterrupt: as it came; every run can go on.
    """
    check_folder(study, out, seeds)
    runs = runs_of(study, out, seeds)
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    failed = []
    for done, run in enumerate(runs):
        progress(done, len(runs), run.name)
        if not run.is_finished and (status := _make(run, out)):
            failed.append(f"{run.name} (exit status {status}; {out / LOGS / run.name}.log)")
    progress(len(runs), len(runs), "")
    if failed:
        raise StudyFailed(
            f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}; the same command goes on with them"
        )


def _make(run: StudyRun, out: Path) -> int:
    """Start or continue one run in a process of its own; returns its exit status."""
    log = out / LOGS / f"{run.name}.log"
    command = [sys.executable, "-m", "ptl_rl.cli"]
    if (run.folder / "config.json").exists():
        command += ["resume", str(run.folder)]
    else:
        try:
            model = _slicegpt_model(run, out) if run.row.slicegpt_size else None
        except ConfigError as error:
            log.write_text(f"error: {error}\n")
            return 2
        recipe = out / LOGS / f"{run.name}.json"
        save_config(run.row.config(run.seed, model), recipe)
        command += ["run", str(recipe), "--run-dir", str(run.folder)]
    with log.open("a") as output, _ending_with_us(subprocess.Popen(command, stdout=output, stderr=output)) as process:
        return process.wait()


@contextmanager
def _ending_with_us(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """A run that is interrupted ends its stages and leaves a journal to go on from; wait for that."""
    try:
        yield process
    except BaseException:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
        raise


def _slicegpt_model(run: StudyRun, out: Path) -> str:
    """The folder of the sliced model that the run starts from, made on the run's own calibration sequences."""
    folder = out / MODELS / run.name
    if not folder.exists():
        from ptl_rl.baselines.slicegpt.command import slice_with_slicegpt

        config = run.row.config(run.seed)
        source = config.data.corpus_sources[0]
        settings = ScoreConfig(
            data=source,
            prompt_suffix=config.data.prompt_suffix,
            max_bad_fraction=config.data.max_bad_fraction,
            dtype=config.model.dtype,
            calibration=config.calibration.model_copy(update={"source": "corpus", "token_weights": "uniform"}),
            seed=run.seed,
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        slice_with_slicegpt(config.model.path, folder, settings, remove=_removed(run))
    return str(folder.resolve())


def _removed(run: StudyRun) -> str:
    from ptl_rl.families import read_shape
    from ptl_rl.models import resolve_model

    assert run.row.slicegpt_size is not None
    shape = read_shape(resolve_model(run.row.config(run.seed).model.path, weights=False))
    return str(shape.hidden_size - run.row.slicegpt_size)


def save_study(study: Study, out: Path, seeds: int) -> None:
    """``study.json``: what was asked, for whoever finds the folder."""
    rows = [{"name": row.name, "label": row.label} for row in study.rows]
    content = {"study": study.name, "question": study.question, "rows": rows, "seeds": seeds, "notes": study.notes}
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(content, indent=2) + "\n")
