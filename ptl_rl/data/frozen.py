"""The rows of a run, written into its folder once. Every stage reads these, whatever becomes of the sources.

A set is one Arrow file in the run's order, which is memory-mapped; ``data.json`` holds the files' hashes and those of
every subset. The folder is written under another name, synced and renamed.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ptl_rl.config import RunConfig
from ptl_rl.config.data import EvaluationSet
from ptl_rl.data.corpora import Corpus, SourceUse, load_corpus
from ptl_rl.data.partition import subset_hash
from ptl_rl.data.prepare import run_data
from ptl_rl.data.records import DataError, Progress, Record, no_progress
from ptl_rl.data.sources import BATCH_ROWS, file_hash
from ptl_rl.data.store import Store, frozen_batch, frozen_schema

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

    @cached_property
    def sets(self) -> dict[str, dict[str, Any]]:
        """By set: ``rows``, ``sha256``, and ``subsets``, hashes in the order of the cycles."""
        path = self.folder / FACTS
        try:
            facts = json.loads(path.read_text())
            if facts["format"] != FORMAT:
                raise DataError(f"{path}: written by another version of ptl-rl (format {facts['format']})")
            return facts["sets"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: the run's data cannot be read ({error}); {REMEDY}") from None

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

        path = self._file(name)
        try:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: the run's data cannot be read ({error}); {REMEDY}") from None
        store = Store(str(path), name, f"{path} row {{}}", table, self.sets[name]["sha256"], read=len(table))
        rows = len(store)
        return Corpus([store], numpy.arange(rows), [SourceUse(str(path), rows, rows, rows)])

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
    temporary.mkdir(parents=True)
    facts = {}
    for name, corpus in sets.items():
        path = temporary / f"{name}.arrow"
        _write(corpus, path)
        hashes = [subset_hash(part) for part in data.subsets.get(name, [])]
        facts[name] = {"rows": len(corpus), "sha256": file_hash(path), "subsets": hashes}
        progress(f"writing data.{name} into the run", len(corpus), len(corpus))
    path = temporary / FACTS
    path.write_text(json.dumps({"format": FORMAT, "sets": facts}, indent=1) + "\n")
    check(FrozenData(temporary))
    for written in (*temporary.iterdir(), temporary):
        handle = os.open(written, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)  # one without its facts
    temporary.rename(folder)
    return FrozenData(folder)


def _write(corpus: Corpus, path: Path) -> None:
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, frozen_schema()) as writer:
        numbered = enumerate(corpus, 1)
        while chunk := list(itertools.islice(numbered, BATCH_ROWS)):
            writer.write_batch(frozen_batch(chunk))
