"""Make a study's runs, one after the other; what a run's own journal holds is not made again."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptl_rl.baselines.slicegpt import NOTE
from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.config.recipe import read_saved_config, save_config
from ptl_rl.driver.journal import Journal
from ptl_rl.driver.state import fold, next_stage
from ptl_rl.studies.design import Row, Study
from ptl_rl.studies.slicegpt_model import MADE_FROM, was_made_from

MODELS, RUNS, LOGS, STUDY = "models", "runs", "logs", "study.json"


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

    def model_folder(self, out: Path) -> Path:
        """Of the model that a SliceGPT row starts from."""
        return out.resolve() / MODELS / self.name

    def config(self, out: Path) -> RunConfig:
        """The run's whole configuration."""
        return self.row.config(self.seed, str(self.model_folder(out)) if self.row.slicegpt_size else None)

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


def runs_found(row: Row, out: Path) -> list[StudyRun]:
    """The runs of a row that a folder holds, by seed, whoever asked for them."""
    found = []
    for folder in (out / RUNS).glob(f"{row.name}-seed*"):
        seed = folder.name.removeprefix(f"{row.name}-seed")
        if seed.isdecimal():
            found.append(StudyRun(row, int(seed), folder))
    return sorted(found, key=lambda run: run.seed)


def _saved_config(run: StudyRun, out: Path) -> RunConfig:
    """What a run was started with; a model that lies in the study's folder is looked for where that is now."""
    saved = read_saved_config(run.folder / "config.json")
    here = run.model_folder(out)
    if run.row.slicegpt_size and Path(saved.model.path).parts[-2:] == here.parts[-2:]:
        return saved.model_copy(update={"model": saved.model.model_copy(update={"path": str(here)})})
    return saved


def check_folder(study: Study, out: Path, seeds: int) -> None:
    """Raise :class:`ConfigError` if ``out`` holds another study, or runs or models of another design."""
    saved = out / STUDY
    if saved.exists():
        try:
            name = json.loads(saved.read_text())["study"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{saved}: cannot be read ({error}); name another `out`") from None
        if name != study.name:
            raise ConfigError(f"{out}: holds the study {name}; name another `out`")
    for run in runs_of(study, out, seeds):
        if (run.folder / "config.json").exists():
            found, wanted = _saved_config(run, out), run.config(out)
            differing = [name for name in RunConfig.model_fields if getattr(found, name) != getattr(wanted, name)]
            if differing:
                raise ConfigError(
                    f"{run.folder}: was made with another {', '.join(differing)}; name another `out`, or remove it"
                )
        note = run.model_folder(out) / NOTE
        if run.row.slicegpt_size and note.exists():
            found_note = json.loads(note.read_text()).get(MADE_FROM)
            if not was_made_from(found_note, run.row.config(run.seed), run.row.slicegpt_size):
                raise ConfigError(
                    f"{note.parent}: was made of another model, size or calibration; name another `out`, or remove it "
                    f"and {run.folder}"
                )


def make_runs(
    study: Study, out: Path, seeds: int, *, progress: Callable[[int, int, str], None] = lambda done, total, name: None
) -> None:
    """Make all runs that are not finished; a run that fails does not keep the others from being made.

    Args:
        progress: called with runs done, runs in all, and the name of the one that begins.

    Raises:
        StudyFailed: once the others are made, naming those that failed.
        KeyboardInterrupt: as it came; every run can go on.
    """
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
    """Start or continue one run, in a process of its own; returns its exit status."""
    recipe = out / LOGS / f"{run.name}.json"
    if run.row.slicegpt_size and not run.model_folder(out).exists():
        save_config(run.row.config(run.seed), recipe)
        size = str(run.row.slicegpt_size)
        module = ["ptl_rl.studies.slicegpt_model", str(recipe), str(run.model_folder(out)), size]
        run.model_folder(out).parent.mkdir(parents=True, exist_ok=True)
        if status := _python(module, out / LOGS / f"{run.name}.log"):
            return status
    if (run.folder / "config.json").exists():
        config = run.folder / "config.json"
        if (moved := _saved_config(run, out)) != read_saved_config(config):
            save_config(moved, config)
        module = ["ptl_rl.cli", "resume", str(run.folder)]
    else:
        save_config(run.config(out), recipe)
        module = ["ptl_rl.cli", "run", str(recipe), "--run-dir", str(run.folder)]
    return _python(module, out / LOGS / f"{run.name}.log")


def _python(module: list[str], log: Path) -> int:
    command = [sys.executable, "-m", *module]
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


def save_study(study: Study, out: Path) -> None:
    """``study.json``: what was asked, for whoever finds the folder."""
    rows = [{"name": row.name, "label": row.label} for row in study.rows]
    content = {"study": study.name, "question": study.question, "rows": rows, "notes": study.notes}
    out.mkdir(parents=True, exist_ok=True)
    (out / STUDY).write_text(json.dumps(content, indent=2) + "\n")
