"""Load problems from the test bed, local files or the hub into one record schema, and say which rows are bad."""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptl_rl.config import FieldMap, SourceConfig

TESTBED, HUB = "testbed:", "hub:"


class DataError(ValueError):
    """Data that a run cannot use; the message names file, line and remedy."""


@dataclass(frozen=True)
class Record:
    """One problem: ``solution`` is the chain of thought, ``answer`` what the boxed result must equal.

    Plain text stands in ``solution``, and the others are empty.
    """

    question: str
    solution: str
    answer: str
    source: str
    id: str

    def reward_sample(self) -> dict[str, Any]:
        """Arguments of a reward function for the reference solution as the response."""
        return {
            "data_source": self.source,
            "solution_str": self.solution,
            "ground_truth": self.answer,
            "extra_info": {"index": 0, "id": self.id},
        }


@dataclass
class Corpus:
    """Records of one source and the rows that were dropped, each with file, line and reason."""

    records: list[Record]
    bad_rows: list[str] = field(default_factory=list)


def _record(row: Any, fields: FieldMap, source: str, where: str) -> Record:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, this is {type(row).__name__}")
    values = {"question": "", "solution": "", "answer": ""}
    columns = {"solution": fields.text} if fields.text else fields.model_dump(exclude={"text"})
    for part, column in columns.items():
        value = row.get(column)
        if value is None:
            raise DataError(
                f"{where}: no column {column!r} for the {'text' if fields.text else part}; the row has "
                f"{', '.join(map(str, row)) or 'none'} (set the fields of this source)"
            )
        values[part] = str(value).strip()
        if not values[part]:
            raise DataError(f"{where}: column {column!r} ({part}) is empty")
    content = values["question"] or values["solution"]
    identity = str(row.get("id") or hashlib.sha256(content.encode()).hexdigest()[:16])
    return Record(**values, source=source, id=identity)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield where, DataError(f"{where}: not valid JSON: {error}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds; all mean that the data cannot be had
        raise DataError(
            f"hub data set {name!r} (split {split!r}) cannot be loaded: {error}. Offline? Set path to a local .jsonl "
            "or .parquet file with the same rows."
        ) from None
    for number, row in enumerate(dataset, 1):
        yield f"{name}[{split}] row {number}", row


def _rows(source: SourceConfig) -> Iterator[tuple[str, Any]]:
    if source.path.startswith(HUB):
        return _hub_rows(source.path.removeprefix(HUB), source.split)
    path = Path(source.path)
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _jsonl_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(f"{path}: unknown kind of data; use a .jsonl or .parquet file, 'testbed:SPLIT' or 'hub:NAME'")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return reader(path)


def _testbed(source: SourceConfig, seed: int) -> Corpus:
    from ptl_rl.testbed.word_problems import SPLITS, problems

    split = source.path.removeprefix(TESTBED)
    if split not in SPLITS:
        raise DataError(f"{source.path}: no such split of the test bed; there are {', '.join(SPLITS)}")
    if source.rows is None:
        raise DataError(f"{source.path}: the test bed is endless; set rows")
    # Evaluation problems do not depend on the run's seed, so that seeds can be compared.
    stream = problems(split, seed if split in ("rl", "pretrain") else 0)
    rows = itertools.islice(stream, source.rows)
    return Corpus([Record(p.question, p.solution, p.answer, "ptl_rl/word_problems", p.id) for p in rows])


def _read_rows(rows: Iterable[tuple[str, Any]], source: SourceConfig, max_bad_fraction: float) -> Corpus:
    corpus, total = Corpus([]), 0
    name = source.path.removeprefix(HUB) if source.path.startswith(HUB) else Path(source.path).stem
    for where, row in rows:
        total += 1
        try:
            if isinstance(row, DataError):
                raise row
            corpus.records.append(_record(row, source.fields, name, where))
        except DataError as error:
            corpus.bad_rows.append(str(error))
    if total == 0:
        raise DataError(f"{source.path}: no rows")
    if len(corpus.bad_rows) > max_bad_fraction * total:
        more = f" (and {len(corpus.bad_rows) - 1} more)" if len(corpus.bad_rows) > 1 else ""
        raise DataError(
            f"{corpus.bad_rows[0]}{more}; {len(corpus.bad_rows)} of {total} rows are bad, max_bad_fraction "
            f"allows {max_bad_fraction:g}"
        )
    return corpus


def load_corpus(source: SourceConfig, seed: int, max_bad_fraction: float = 0.0) -> Corpus:
    """Read a source, shuffle it with ``seed`` and keep its first ``source.rows`` records.

    Args:
        max_bad_fraction: share of rows that may be malformed; they are dropped and listed in ``bad_rows``.

    Raises:
        DataError: missing or unreadable file, unknown kind, or too many malformed rows; names file and line.
    """
    if source.path.startswith(TESTBED):
        return _testbed(source, seed)
    corpus = _read_rows(_rows(source), source, max_bad_fraction)
    random.Random(seed).shuffle(corpus.records)
    if source.rows is not None:
        if source.rows > len(corpus.records):
            raise DataError(f"{source.path}: rows is {source.rows}, but there are only {len(corpus.records)}")
        corpus.records = corpus.records[: source.rows]
    return corpus
