"""The rows of a run, written into its folder once. Every stage reads these, whatever becomes of the sources.

A set is one Arrow file in the run's order, which is memory-mapped; ``data.json`` holds the files' hashes and those of
every subset. The folder is written under another name, synced and renamed.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ptl_rl.config import RunConfig
from ptl_rl.config.data import EvaluationSet
from ptl_rl.data.cache import sync
from ptl_rl.data.corpora import Corpus, SourceUse, load_corpus
from ptl_rl.data.partition import subset_hash
from ptl_rl.data.prepare import run_data
from ptl_rl.data.records import DataError, Progress, Record, no_progress
from ptl_rl.data.sources import file_hash
from ptl_rl.data.store import features, mapped, tables

FORMAT = 1
FACTS, CONTRAST = "data.json", "contrast"
REMEDY = "put it back as it was, or start a new run"


class FrozenData:
    """The data of a run's folder.

    Raises:
        DataError: from every method, where a file is missing or was changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        return (self.folder / FACTS).exists()

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """By set: ``rows``, ``sha256``, and ``subsets``, hashes in the order of the cycles."""
        return self._facts["sets"]

    def made_otherwise(self, config: RunConfig, subsets: int) -> list[str]:
        """Settings that decide which rows a run reads, and were others when these were written."""
        made, now = self._facts["made_with"], settings_of_rows(config, subsets)
        return [name for name in made if name in now and made[name] != now[name]]

    @cached_property
    def _facts(self) -> dict[str, Any]:
        path = self.folder / FACTS
        try:
            facts = json.loads(path.read_text())
            written, _, _ = facts["format"], facts["sets"], facts["made_with"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: the run's data cannot be read ({error}); {REMEDY}") from None
        if written != FORMAT:
            raise DataError(f"{path}: written by another version of ptl-rl (format {written}); {REMEDY}")
        return facts

    def facts_of(self, name: str) -> dict[str, Any]:
        """Of one set."""
        if name not in self.sets:
            raise DataError(f"{self.folder / FACTS}: the run's data has no {name}; {REMEDY}")
        return self.sets[name]

    def check(self) -> None:
        """Hold every file against its hash."""
        for name, facts in self.sets.items():
            path = self._file(name)
            if not path.exists():
                raise DataError(f"{path}: the run's data is gone; {REMEDY}")
            if file_hash(path) != facts["sha256"]:
                raise DataError(f"{path}: the run's data was changed; {REMEDY}")

    def read(self, name: str) -> Corpus:
        """A set by the name that it has under ``data``."""
        import numpy
        import pyarrow

        path, digest = self._file(name), self.facts_of(name)["sha256"]
        try:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: the run's data cannot be read ({error}); {REMEDY}") from None
        rows = len(table)
        return Corpus([mapped(table, str(path), digest)], numpy.arange(rows), [SourceUse(str(path), rows, rows, rows)])

    def training(self) -> Corpus:
        return self.read("train")

    def worked_solutions(self) -> Corpus:
        """``data.corpus``, or where there is none the training data."""
        return self.read(self.name_of_solutions)

    @property
    def name_of_solutions(self) -> str:
        return "corpus" if "corpus" in self.sets else "train"

    def evaluation(self, name: EvaluationSet) -> Corpus:
        return self.read(name)

    def contrast(self) -> Sequence[Record]:
        """General text that importance is contrasted with; nothing if the criterion asks for none."""
        return self.read(CONTRAST) if CONTRAST in self.sets else []

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.arrow"


def freeze(
    config: RunConfig,
    subsets: int,
    folder: Path,
    check: Callable[[FrozenData], None] = lambda data: None,
    progress: Progress = no_progress,
) -> FrozenData:
    """Read everything that a run needs, and write it.

    Args:
        subsets: into how many the training data is dealt.
        check: called with what was written, before it counts; what it raises leaves nothing.

    Raises:
        DataError: something cannot be read or used.
    """
    data = run_data(config, subsets, progress)
    sets: dict[str, Corpus] = dict(data.sets)
    if config.criterion.contrast is not None:
        source, most_bad = config.criterion.contrast.data, config.data.max_bad_fraction
        general = load_corpus(source, config.seed, most_bad, progress=progress)
        sets[CONTRAST] = general[: config.criterion.contrast_sequences]
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_sets(sets, data.subsets, settings_of_rows(config, subsets), temporary, progress)
        check(FrozenData(temporary))
        shutil.rmtree(folder, ignore_errors=True)  # one without its facts
        temporary.rename(folder)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{folder}: cannot write the run's data: {why}; make room, or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder.parent)
    return FrozenData(folder)


def settings_of_rows(config: RunConfig, subsets: int) -> dict[str, Any]:
    """All that decides which rows a run reads, and in which order, by the name of the setting."""
    contrast = config.criterion.contrast
    return {
        **{f"data.{name}": value for name, value in config.data.model_dump(mode="json").items()},
        "criterion.contrast.data": contrast.data.model_dump(mode="json") if contrast else None,
        "criterion.contrast.sequences": config.criterion.contrast_sequences,
        "seed": config.seed,
        "recovery": "with answers" if config.needs_answers else "without",
        "schedule": subsets,
    }


def _write_sets(
    sets: dict[str, Corpus], parts: dict[str, list[Corpus]], made_with: dict[str, Any], folder: Path, progress: Progress
) -> None:
    facts = {}
    for name, corpus in sets.items():
        path = folder / f"{name}.arrow"
        _write(corpus, path)
        hashes = [subset_hash(part) for part in parts.get(name, [])]
        facts[name] = {"rows": len(corpus), "sha256": file_hash(path), "subsets": hashes}
        progress(f"writing data.{name} into the run", len(corpus), len(corpus))
    (folder / FACTS).write_text(json.dumps({"format": FORMAT, "made_with": made_with, "sets": facts}, indent=1) + "\n")
    for written in (*folder.iterdir(), folder):
        sync(written)


def _write(corpus: Corpus, path: Path) -> None:
    import pyarrow

    schema = features().arrow_schema.remove_metadata()
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        for table in tables(enumerate(corpus, 1)):
            writer.write_table(table)
