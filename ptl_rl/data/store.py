"""One source's records as a data set of ``datasets``: however large the source, no more than a batch is in memory."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from ptl_rl.config import SourceConfig
from ptl_rl.config.data import TESTBED
from ptl_rl.data.cache import cached, key_of
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
    import datasets
    import numpy
    import pyarrow

BAD_EXAMPLES = 20
TEXTS = ("question", "solution", "answer", "source", "id")
"""Columns that are the fields of a record."""
KEYS = ("question_key", "content_key")
BAD = ("", "", "", "", "")


@dataclass(frozen=True)
class Store:
    """The rows of a source in its order. A malformed one has an ``error``, and nothing in its other columns."""

    path: str
    """Of the source, as the recipe gives it."""
    where: str
    """Says where a row stands once it is given its number."""
    rows: "datasets.Dataset"
    """With the columns of :data:`TEXTS` and :data:`KEYS`, ``number`` and ``error``."""
    key: str
    """Differs where the content does."""

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> "pyarrow.ChunkedArray":
        """Of all rows, memory-mapped."""
        return self.rows.data.column(name)

    def numbers(self, name: str) -> "numpy.ndarray":
        """A column of numbers, whole."""
        return self.column(name).to_numpy()

    def has(self, name: str) -> "numpy.ndarray":
        """Whether a column of texts holds one, for every row."""
        import pyarrow.compute

        return pyarrow.compute.not_equal(self.column(name), "").to_numpy()

    @cached_property
    def records(self) -> "numpy.ndarray":
        """Places of the well-formed rows."""
        import numpy

        return numpy.flatnonzero(~self.has("error"))

    @cached_property
    def bad_examples(self) -> tuple[str, ...]:
        """Where the first malformed rows stand, and what is wrong with them."""
        import numpy

        bad, errors = numpy.flatnonzero(self.has("error")), self.column("error")
        return tuple(f"{self.place(row)}: {errors[row].as_py()}" for row in bad[:BAD_EXAMPLES].tolist())

    def place(self, row: int) -> str:
        """Where a row stands, for people."""
        return self.where.format(self.column("number")[row].as_py())


def features() -> "datasets.Features":
    """The columns of every :class:`Store`."""
    from datasets import Features, Value

    types = {**dict.fromkeys(TEXTS, "string"), "number": "int64", **dict.fromkeys(KEYS, "uint64"), "error": "string"}
    return Features({name: Value(of) for name, of in types.items()})


def tables(rows: Iterable[tuple[int, Record | RowError]]) -> "Iterator[pyarrow.Table]":
    """Numbered rows as tables with the columns of :func:`features`."""
    import pyarrow

    schema = features().arrow_schema.remove_metadata()
    rows = iter(rows)
    while chunk := [_entry(number, row) for number, row in itertools.islice(rows, BATCH_ROWS)]:
        yield pyarrow.Table.from_arrays(
            [pyarrow.array(column, of.type) for column, of in zip(zip(*chunk, strict=True), schema, strict=True)],
            schema=schema,
        )


def _entry(number: int, row: Record | RowError) -> tuple[Any, ...]:
    if isinstance(row, RowError):
        return (*BAD, number, 0, 0, str(row).encode(errors="backslashreplace").decode())
    texts = row.question, row.solution, row.answer, row.source, row.id
    return (*texts, number, question_key(row.question, row.solution), content_key(row.question, row.solution), "")


def _converted(row: Any, opened: Opened) -> Record | RowError:
    try:
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, dict):
            raise RowError(f"a row is a JSON object, this is {type(row).__name__}")
        parts = opened.layout.parts(row)
    except RowError as error:
        return error
    given = row.get("id")
    identity = str(given).encode(errors="replace").decode() if given and isinstance(given, str | int) else ""
    return Record(*parts, opened.name, identity or content_id(parts.question, parts.solution))


def _read(opened: Opened, path: str, progress: Progress) -> "Iterator[pyarrow.Table]":
    import pyarrow

    rows = opened.rows(lambda done, total: progress(f"reading {path}", done, total))
    try:
        yield from tables((number, _converted(row, opened)) for number, row in rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read, or is not what its name says: {error}") from None


@lru_cache(maxsize=8)
def _testbed(path: str, rows: int | None, seed: int) -> Store:
    from ptl_rl.testbed import programs, word_problems
    from ptl_rl.testbed.problem import EASY, LEVELS, SPLITS

    named, colon, of_levels = path.removeprefix(TESTBED).partition(":")
    kind, _, split = named.rpartition("-")
    if kind not in ("", "programs") or split not in SPLITS:
        there = ", ".join([*SPLITS, *(f"programs-{name}" for name in SPLITS)])
        raise DataError(f"{path}: no such split of the test bed; there are {there}")
    known = {str(level): level for level in LEVELS}
    levels = [known.get(level.strip()) for level in of_levels.split(",")] if colon else list(EASY)
    if None in levels:
        raise DataError(
            f"{path}: write levels behind the split as in {TESTBED}{named}:4,5; there are {', '.join(known)}, and "
            f"{', '.join(map(str, EASY))} where none is named"
        )
    problems, name = (
        (programs.problems, "ptl_rl/programs") if kind else (word_problems.problems, "ptl_rl/word_problems")
    )
    if rows is None:
        raise DataError(f"{path}: the test bed is endless; set rows, e.g. data.rows=256")
    # Evaluation problems do not depend on the run's seed, so that seeds can be compared.
    found = problems(split, seed if split in ("rl", "pretrain") else 0, [level for level in levels if level])
    try:
        made = list(itertools.islice(found, rows))
    except ValueError as error:  # no more of them
        raise DataError(f"{path}: {error}") from None
    return store_of((Record(p.question, p.solution, p.answer, name, p.id) for p in made), path)


def store_of(records: Iterable[Record], path: str) -> Store:
    """Records that stand in no file, held in memory."""
    import pyarrow

    empty = features().arrow_schema.remove_metadata().empty_table()
    return mapped(pyarrow.concat_tables([empty, *tables(enumerate(records, 1))]), path)


def mapped(table: "pyarrow.Table", path: str, key: str = "") -> Store:
    """A table with the columns of :func:`features` as the rows of ``path``."""
    import datasets

    key = key or key_of("memory", table.column("content_key").to_pylist())
    rows = datasets.Dataset(table, fingerprint=key)  # without one it would be a hash of everything
    return Store(path, f"{path} row {{}}", rows, key)


def open_store(source: SourceConfig, seed: int, progress: Progress = no_progress) -> Store:
    """All rows of a source, from the cache if they were read before.

    Args:
        seed: only makes problems of the test bed.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    if source.path.startswith(TESTBED):
        return _testbed(source.path, source.rows, seed)
    opened = open_source(source)
    key = key_of("records", opened.name, opened.fingerprint, opened.layout.name)
    rows = cached(key, features(), lambda: _read(opened, source.path, progress))
    return Store(source.path, opened.where, rows, key)
