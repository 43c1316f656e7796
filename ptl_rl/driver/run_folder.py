"""Where everything of a run lies, and how an artefact becomes part of it: verify, sync, rename, journal."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptl_rl.config import ConfigError
from ptl_rl.driver.journal import Entry, fingerprint, sync_folder, sync_tree
from ptl_rl.driver.state import ORIGINAL, Stage
from ptl_rl.errors import UserError, resolved

ARTEFACTS = {
    "score": ("scores", ["scores.safetensors"]),
    "slice": ("sliced", ["config.json", "plan.json"]),
    "recover": ("recovered", ["config.json"]),
    "evaluate": ("evaluation", ["eval.json", "samples.parquet"]),
}
"""Stage to the name of the folder it leaves and the files that must be in it."""


class MissingArtefact(UserError, RuntimeError):
    """What the journal names is not there, or not as it was; no other checkpoint is ever put in its place."""


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = resolved(path)
        self.config = self.path / "config.json"
        self.journal = self.path / "journal.jsonl"
        self.data = self.path / "data"
        self.models = self.path / "models.json"
        self.logs = self.path / "logs"
        self.reward_errors = self.logs / "reward_errors.jsonl"

    def cycle(self, number: int) -> Path:
        return self.path / "cycles" / f"{number:03d}"

    def artefact(self, stage: Stage) -> Path:
        """Final folder of a stage's artefact."""
        name = ARTEFACTS[stage.name][0] + stage.suffix
        return self.cycle(stage.cycle) / name

    def temporary(self, stage: Stage) -> Path:
        return self.artefact(stage).with_name(f".{self.artefact(stage).name}.tmp")

    def work(self, stage: Stage) -> Path:
        """Folder that survives a killed stage."""
        return self.artefact(stage).with_name(f".{self.artefact(stage).name}.work")

    def checkpoint(self, name: str, original: Path) -> Path:
        """The folder of a checkpoint that the state names.

        Raises:
            MissingArtefact: naming the path and what to do.
        """
        path = original if name == ORIGINAL else self.path / name
        if not (path / "config.json").exists():
            raise MissingArtefact(
                f"{path}: the journal names this checkpoint, but it is not there; put it back, or start a new run"
            )
        return path

    def commit(self, stage: Stage) -> str:
        """Check a stage's temporary folder, sync it and give it its final name; returns the name for the journal."""
        temporary, final = self.temporary(stage), self.artefact(stage)
        for name in ARTEFACTS[stage.name][1]:
            if not (temporary / name).exists():
                raise MissingArtefact(f"{temporary / name}: stage {stage.label} ended without writing it")
        if stage.name in ("slice", "recover") and not list(temporary.glob("*.safetensors")):
            raise MissingArtefact(f"{temporary}: stage {stage.label} ended without writing weights (*.safetensors)")
        sync_tree(temporary)
        if final.exists():  # renamed by a driver that died before its journal line
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(final.parent)
        return str(final.relative_to(self.path))

    def files_of(self, artefact: str) -> dict[str, str]:
        """Fingerprints of an artefact's files by name, for its journal line."""
        folder = self.path / artefact
        return {
            str(path.relative_to(folder)): fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }

    def check_unchanged(self, entry: Entry) -> None:
        """Hold an artefact against its journal line, before it is used.

        Raises:
            MissingArtefact: naming the first file that is gone or was changed, and what to do.
        """
        for name, written in entry.files.items():
            path = self.path / str(entry.artefact) / name
            if not path.is_file() or fingerprint(path) != written:
                what = "is not what its stage wrote" if path.is_file() else "is gone"
                raise MissingArtefact(
                    f"{path}: {what} (the journal has its checksum); put it back as it was, or start a new run"
                )

    def link_best(self, checkpoint: str) -> None:
        """Point ``best`` at the last accepted checkpoint, atomically."""
        temporary = self.path / ".best.tmp"
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(checkpoint)
        temporary.replace(self.path / "best")

    def write_manifest(self, cycle: int, entries: list[Entry], facts: dict) -> None:
        """``manifest.json`` of one cycle: its journal entries and what they were made with."""
        stages = [e.model_dump(mode="json") for e in entries if e.cycle == cycle]
        manifest, temporary = self.cycle(cycle) / "manifest.json", self.cycle(cycle) / ".manifest.tmp"
        with contextlib.suppress(FileNotFoundError, ValueError):
            if len(json.loads(manifest.read_text())["stages"]) == len(stages):
                return  # they were made with what it says, whatever is installed by now
        text = json.dumps({"cycle": cycle, **facts, "stages": stages}, indent=1) + "\n"
        temporary.write_text(text)
        temporary.replace(manifest)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the kernel frees the lock when the process dies.

        Raises:
            ConfigError: another driver is at work on the same folder, or its file system cannot hold a run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot write there ({error.strerror or error}); choose another `run_dir`"
            ) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another ptl process is working on this run") from None
            except OSError as error:
                raise ConfigError(
                    f"{self.path}: the file system cannot lock files (flock: {error.strerror or error}), and without a "
                    "lock two drivers could work on one run; mount it with locks (Lustre: -o flock), or choose a "
                    "`run_dir` on another file system"
                ) from None
            self._try_out()
            yield
        finally:
            os.close(handle)

    def _try_out(self) -> None:
        """Do what will be done hours later, and refuse a file system that cannot: ``best``, and what is put on disk.

        Raises:
            ConfigError: naming what it cannot do.
        """
        link, what = self.path / ".try-out", "replace a symbolic link"
        try:
            for target in ("journal.jsonl", "config.json"):
                temporary = link.with_name(".try-out.tmp")
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(target)
                temporary.replace(link)
            link.unlink()
            what = "wait until data is on disk (fsync)"
            sync_folder(self.path)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: the file system cannot {what} ({error.strerror or error}), which a run needs; choose a "
                "`run_dir` on another file system"
            ) from None
