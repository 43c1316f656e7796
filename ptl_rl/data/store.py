"""One source's records as a memory-mapped table: however large the source, no more than a batch is in memory."""

import bisect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from ptl_rl.config import SourceConfig
from ptl_rl.config.data import TESTBED
from ptl_rl.data.cache import cached, key_of
from ptl_rl.data.known import Layout
from ptl_rl.data.records import (
    DataError,
    Progress,
    Record,
    RowError,
    content_id,
    content_key,
    no_progress,
    question_key,
)
from ptl_rl.data.sources import BATCH_ROWS, Opened, open_source

if TYPE_CHECKING:
    import numpy
    import pyarrow

BAD_EXAMPLES = 20
SOURCE = "source"
"""Column of tables whose records come from several sources; the records of others have the store's name."""


@dataclass(frozen=True)
class Store:
    """Records in the order in which they stand in their source."""

    path: str
    """Of the source, as the recipe gives it."""
    name: str
    where: str
    table: "pyarrow.Table"
    key: str
    """Differs where the content does."""
    read: int
    bad: int = 0
    bad_examples: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def _columns(self) -> list[tuple[Any, ...]]:
        names = [name for name in ("question", "solution", "answer", "id", SOURCE) if name in self.table.column_names]
        return [tuple(batch.column(name) for name in names) for batch in self.table.to_batches()]

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((len(columns[0]) for columns in self._columns), initial=0))

    def record(self, row: int) -> Record:
        """The record at a place from 0."""
        batch = bisect.bisect_right(self._starts, row) - 1
        place = row - self._starts[batch]
        question, solution, answer, identity, *source = (column[place].as_py() for column in self._columns[batch])
        return Record(question, solution, answer, source[0] if source else self.name, identity)

    def numbers(self, column: str) -> "numpy.ndarray":
        """A column of numbers, whole."""
        return self.table.column(column).to_numpy()

    def has_answer(self) -> "numpy.ndarray":
        import pyarrow.compute

        return pyarrow.compute.not_equal(self.table.column("answer"), "").to_numpy()

    def place(self, row: int) -> str:
        """Where a record stands, for people."""
        return self.where.format(self.table.column("number")[row].as_py())


def _schema() -> "pyarrow.Schema":
    import pyarrow

    texts = [(name, pyarrow.string()) for name in ("question", "solution", "answer", "id")]
    numbers = [("number", pyarrow.int64()), ("question_key", pyarrow.uint64()), ("content_key", pyarrow.uint64())]
    return pyarrow.schema([*texts, *numbers])


def frozen_schema() -> "pyarrow.Schema":
    """Of records that come from several sources."""
    import pyarrow

    return _schema().append(pyarrow.field(SOURCE, pyarrow.string()))


def frozen_batch(records: "list[tuple[int, Record]]") -> "pyarrow.RecordBatch":
    """Numbered records as a batch of :func:`frozen_schema`."""
    rows = [(*_entry(number, r.question, r.solution, r.answer, r.id), r.source) for number, r in records]
    return _batch(rows, frozen_schema())


def _entry(number: int, question: str, solution: str, answer: str, identity: str) -> tuple[Any, ...]:
    keys = question_key(question, solution), content_key(question, solution)
    return question, solution, answer, identity, number, *keys


def _batch(rows: list[tuple[Any, ...]], schema: "pyarrow.Schema | None" = None) -> "pyarrow.RecordBatch":
    import pyarrow

    schema = schema or _schema()
    columns = [pyarrow.array(column, f.type) for column, f in zip(zip(*rows, strict=True), schema, strict=True)]
    return pyarrow.RecordBatch.from_arrays(columns, schema=schema)


def _converted(number: int, row: Any, layout: Layout) -> tuple[Any, ...]:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"a row is a JSON object, this is {type(row).__name__}")
    parts = layout.parts(row)
    identity = str(row.get("id") or "").encode(errors="replace").decode()
    return _entry(number, *parts, identity or content_id(parts.question, parts.solution))


def _batches(opened: Opened, path: str, progress: Progress, about: dict[str, Any]) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow

    about |= {"read": 0, "bad": 0, "bad_rows": []}
    rows: list[tuple[Any, ...]] = []
    try:
        for number, row in opened.rows(lambda done, total: progress(f"reading {path}", done, total)):
            about["read"] += 1
            try:
                rows.append(_converted(number, row, opened.layout))
            except RowError as error:
                about["bad"] += 1
                if len(about["bad_rows"]) < BAD_EXAMPLES:
                    about["bad_rows"].append([number, str(error)])
            if len(rows) == BATCH_ROWS:
                yield _batch(rows)
                rows = []
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read, or is not what its name says: {error}") from None
    if rows:
        yield _batch(rows)


@lru_cache(maxsize=8)
def _testbed(path: str, rows: int | None, seed: int) -> Store:
    from ptl_rl.testbed import programs, word_problems
    from ptl_rl.testbed.problem import SPLITS

    kind, _, split = path.removeprefix(TESTBED).rpartition("-")
    if kind not in ("", "programs") or split not in SPLITS:
        there = ", ".join([*SPLITS, *(f"programs-{name}" for name in SPLITS)])
        raise DataError(f"{path}: no such split of the test bed; there are {there}")
    problems, name = (
        (programs.problems, "ptl_rl/programs") if kind else (word_problems.problems, "ptl_rl/word_problems")
    )
    if rows is None:
        raise DataError(f"{path}: the test bed is endless; set rows, e.g. data.rows=256")
    # Evaluation problems do not depend on the run's seed, so that seeds can be compared.
    stream = itertools.islice(problems(split, seed if split in ("rl", "pretrain") else 0), rows)
    records = (Record(p.question, p.solution, p.answer, name, p.id) for p in stream)
    return store_of(records, path, name)


def store_of(records: Iterable[Record], path: str, name: str) -> Store:
    """Records that stand in no file, held in memory; ``name`` is what all of them come from."""
    import pyarrow

    rows = (_entry(number, r.question, r.solution, r.answer, r.id) for number, r in enumerate(records, 1))
    batches = []
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        batches.append(_batch(chunk))
    table = pyarrow.Table.from_batches(batches, _schema())
    key = key_of("memory", table.column("content_key").to_pylist())
    return Store(path, name, f"{path} row {{}}", table, key, read=table.num_rows)


def open_store(source: SourceConfig, seed: int, progress: Progress = no_progress) -> Store:
    """All well-formed records of a source, from the cache if they were read before.

    Args:
        seed: only makes problems of the test bed.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    if source.path.startswith(TESTBED):
        return _testbed(source.path, source.rows, seed)
    opened = open_source(source)
    key = key_of("records", opened.fingerprint, opened.layout.name)
    entry = cached(key, _schema(), lambda about: _batches(opened, source.path, progress, about))
    examples = tuple(f"{opened.where.format(number)}: {reason}" for number, reason in entry.about["bad_rows"])
    about = entry.about
    return Store(source.path, opened.name, opened.where, entry.table, key, about["read"], about["bad"], examples)
