"""What a run reads: records of one or several sources in a seeded order.

A corpus behaves as a list of records and holds none of them: it looks them up one at a time in memory-mapped tables.
Its slices and subsets are corpora over the same tables.
"""

import array
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, overload

from ptl_rl.config import SourceConfig
from ptl_rl.config.data import TESTBED
from ptl_rl.data.records import DataError, Progress, Record, RowError, no_progress
from ptl_rl.data.sources import BATCH_ROWS
from ptl_rl.data.store import TEXTS, Store, open_store

if TYPE_CHECKING:
    import datasets
    import numpy

__all__ = ["Corpus", "DataError", "Dropped", "Record", "RowError", "SourceUse", "load_corpus"]


@dataclass(frozen=True)
class Dropped:
    """Rows that are left out for one reason, and where some of them stand."""

    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceUse:
    """What became of the rows of one source: ``read`` is ``kept`` and all that is ``dropped``."""

    path: str
    read: int
    kept: int
    used: int
    """Those within the source's ``rows``."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """By reason: bad, unanswered, held_out, duplicate, contaminated."""


class Corpus(Sequence[Record]):
    """Records by place.

    Args:
        rows: for every record its place in ``stores``, counted through all of them.
        sources: what became of the rows of each store.
    """

    def __init__(self, stores: list[Store], rows: "numpy.ndarray", sources: list[SourceUse]) -> None:
        self._stores, self._rows, self.sources = stores, rows, sources

    @cached_property
    def _texts(self) -> "datasets.Dataset":
        from datasets import concatenate_datasets

        return concatenate_datasets([store.rows.select_columns(list(TEXTS)) for store in self._stores])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> "Corpus": ...
    def __getitem__(self, place: int | slice) -> "Record | Corpus":
        if isinstance(place, slice):
            return self.select(self._rows[place])
        return Record(**self._texts[int(self._rows[place])])

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self._rows), BATCH_ROWS):
            block = self._texts[self._rows[start : start + BATCH_ROWS].tolist()]
            yield from map(Record, *(block[name] for name in TEXTS))

    def select(self, rows: "numpy.ndarray") -> "Corpus":
        return Corpus(self._stores, rows, self.sources)

    def at(self, places: "numpy.ndarray") -> "Corpus":
        """The records at ``places``, in that order."""
        return self.select(self._rows[places])

    def question_keys(self) -> "numpy.ndarray":
        """Equal for records that share their question."""
        import numpy

        keys = [store.numbers("question_key") for store in self._stores]
        return numpy.concatenate(keys)[self._rows] if keys else numpy.empty(0, numpy.uint64)

    def matching(self, column: str, pattern: str) -> "numpy.ndarray":
        """Places of the records with a text that holds what a regular expression (RE2) describes."""
        import numpy
        import pyarrow.compute

        found = [pyarrow.compute.match_substring_regex(store.column(column), pattern) for store in self._stores]
        return numpy.flatnonzero(numpy.concatenate([column.to_numpy() for column in found])[self._rows])

    def where(self, place: int) -> str:
        """Where the row of a record stands, for people."""
        row = int(self._rows[place])
        for store in self._stores:
            if row < len(store):
                return store.place(row)
            row -= len(store)
        raise IndexError(place)

    @property
    def dropped(self) -> dict[str, Dropped]:
        """Of all sources, by reason."""
        found: dict[str, Dropped] = {}
        for source in self.sources:
            for reason, dropped in source.dropped.items():
                before = found.get(reason, Dropped(0))
                found[reason] = Dropped(before.count + dropped.count, before.examples + dropped.examples)
        return found


def check_bad_rows(store: Store, max_bad_fraction: float) -> None:
    """Raise :class:`DataError` for a source without rows, or with too many malformed ones."""
    read, bad = len(store), len(store) - len(store.records)
    if read == 0:
        raise DataError(f"{store.path}: no rows")
    if bad > max_bad_fraction * read:
        more = f" (and {bad - 1} more)" if bad > 1 else ""
        raise DataError(
            f"{store.bad_examples[0]}{more}; {bad} of {read} rows are bad, max_bad_fraction allows {max_bad_fraction:g}"
        )


def chosen_rows(source: SourceConfig, kept: "numpy.ndarray", seed: int, spared: int = 0) -> "numpy.ndarray":
    """The rows of a source that are used, in their order: those of a file are shuffled, then the first ones taken.

    Args:
        spared: how many may be missing from the source's ``rows``, as they are held out.
    """
    import numpy

    if source.path.startswith(TESTBED):
        return kept
    order = shuffled(len(kept), seed)
    if source.rows is not None:
        if source.rows > len(kept) + spared:
            raise DataError(f"{source.path}: rows is {source.rows}, but there are only {len(kept) + spared}")
        order = order[: source.rows]
    return numpy.asarray(kept)[order]


def shuffled(count: int, seed: int) -> "numpy.ndarray":
    """``range(count)`` in the order in which ``random.Random(seed).shuffle`` leaves a list of ``count``."""
    import numpy

    order = array.array("q", range(count))
    random.Random(seed).shuffle(order)
    return numpy.frombuffer(order, dtype=numpy.int64) if count else numpy.empty(0, numpy.int64)


def load_corpus(
    source: SourceConfig,
    seed: int,
    max_bad_fraction: float = 0.0,
    *,
    answers: bool = False,
    progress: Progress = no_progress,
) -> Corpus:
    """Read one source, shuffle it with ``seed`` and keep its first ``source.rows`` records; nothing is compared.

    Args:
        max_bad_fraction: share of rows that may be malformed; they are dropped and counted.
        answers: drop records without an answer.

    Raises:
        DataError: missing or unreadable file, unknown kind, or too many malformed rows; names file and line.
    """
    store = open_store(source, seed, progress)
    check_bad_rows(store, max_bad_fraction)
    kept = store.records
    dropped = bad_rows(store)
    if answers:
        kept = with_answer(store, kept, dropped)
    rows = chosen_rows(source, kept, seed)
    return Corpus([store], rows, [SourceUse(source.path, len(store), len(kept), len(rows), dropped)])


def bad_rows(store: Store) -> dict[str, Dropped]:
    bad = len(store) - len(store.records)
    return {"bad": Dropped(bad, store.bad_examples)} if bad else {}


def with_answer(store: Store, kept: "numpy.ndarray", dropped: dict[str, Dropped]) -> "numpy.ndarray":
    """Those of the rows ``kept`` that have an answer; notes in ``dropped`` how many have none.

    Raises:
        DataError: none has.
    """
    answered = store.has("answer")[kept]
    if answered.all():
        return kept
    if not answered.any():
        raise DataError(
            f"{store.path}: no row has an answer, which rewards and evaluation compare with; use it as data.corpus, or "
            "set fields.answer"
        )
    places = [store.place(int(row)) for row in kept[~answered][:3]]
    dropped["unanswered"] = Dropped(int((~answered).sum()), tuple(f"{place}: no answer" for place in places))
    return kept[answered]
