"""Open a source, whatever it is, as a stream of numbered rows with a fingerprint that changes with its content."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptl_rl.config import SourceConfig
from ptl_rl.config.data import HUB
from ptl_rl.data.known import Layout, known_layout, layout_of
from ptl_rl.data.records import DataError, RowError
from ptl_rl.errors import expanded

BATCH_ROWS = 2048
Row = tuple[int, Any]
"""Its number from 1 (a line, in a text file), and a mapping or the :class:`RowError` that it is."""
Told = Callable[[int, int], None]
"""Told how much is read, and of how much."""


@dataclass(frozen=True)
class Opened:
    """A source that can be read."""

    name: str
    """What its records say they come from."""
    fingerprint: str
    layout: Layout
    where: str
    """Says where a row stands once it is given its number."""
    rows: Callable[[Told], Iterator[Row]]
    """Raises :class:`pyarrow.ArrowException` for a file that is not what it seems."""


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that stands in an object twice, JSON's readers take the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(f"{next(name for name in names if names.count(name) > 1)!r} stands in one object twice")
    return found


def _jsonl_rows(path: Path, told: Told) -> Iterator[Row]:
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            done += len(line)
            if number % BATCH_ROWS == 0:
                told(done, size)
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:  # also for integers of more digits than Python reads
                row = error if isinstance(error, RowError) else RowError(f"not valid JSON: {error}")
            yield number, row
    told(size, size)


def _numbered(batches: Iterator[Any], total: int, told: Told) -> Iterator[Row]:
    """Rows of Arrow record batches."""
    number = 0
    for batch in batches:
        short = [field for field in batch.schema if _has_short_floats(field.type)]
        for start in range(0, len(batch), BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                for field in short:
                    row[field.name] = _as_written(row[field.name], field.type)
                yield number, row
            told(number, total)


def _has_short_floats(kind: Any) -> bool:
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    if hasattr(kind, "value_type"):  # also of dictionaries
        inner.append(kind.value_type)
    return str(kind) in ("float", "halffloat") or any(map(_has_short_floats, inner))


def _as_written(value: Any, kind: Any) -> Any:
    """A float of 16 or 32 bits as the shortest decimal that means it: 0.1, where Arrow gives 0.10000000149011612."""
    import numpy
    import pyarrow

    if value is None:
        return None
    if pyarrow.types.is_float32(kind):
        return value if value.is_integer() else float(str(numpy.float32(value)))
    if pyarrow.types.is_float16(kind):
        return value if value.is_integer() else float(str(numpy.float16(value)))
    if pyarrow.types.is_dictionary(kind):
        return _as_written(value, kind.value_type)
    if pyarrow.types.is_map(kind):
        return [(_as_written(key, kind.key_type), _as_written(part, kind.item_type)) for key, part in value]
    if pyarrow.types.is_struct(kind):
        return {name: _as_written(part, kind.field(name).type) for name, part in value.items()}
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return [_as_written(part, kind.value_type) for part in value]
    return value


def _columns(layout: Layout, names: list[str]) -> list[str] | None:
    """Those that are read; None for all: where the layout names none, and of a source that lacks one, for the error."""
    if not layout.columns or not set(layout.columns) <= set(names):
        return None
    return [name for name in dict.fromkeys((*layout.columns, "id")) if name in names]


def _parquet_rows(path: Path, layout: Layout, told: Told) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = _columns(layout, file.schema_arrow.names)
        yield from _numbered(file.iter_batches(batch_size=BATCH_ROWS, columns=columns), file.metadata.num_rows, told)


def _arrow_rows(path: Path, layout: Layout, told: Told) -> Iterator[Row]:
    """Of an Arrow IPC file, or of a stream, which is what ``datasets`` writes."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        try:
            file = pyarrow.ipc.open_file(mapped)
            schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            stream = pyarrow.ipc.open_stream(mapped)
            schema, batches = stream.schema, (batch for batch in stream)
        columns = _columns(layout, schema.names) or schema.names
        yield from _numbered((batch.select(columns) for batch in batches), 0, told)  # how many stands nowhere


def _dataset_rows(dataset: Any, layout: Layout, told: Told) -> Iterator[Row]:
    columns = _columns(layout, dataset.column_names)
    arrow = (dataset.select_columns(columns) if columns else dataset).with_format("arrow")
    yield from _numbered((table for table in arrow.iter(batch_size=BATCH_ROWS)), len(dataset), told)


def _hub(source: SourceConfig, layout: Layout) -> Opened:
    import datasets

    name, known = source.path.removeprefix(HUB), known_layout(source)
    config = source.config or (known.config if known else None)
    split = source.split or (known.split if known else "train")
    try:
        dataset = datasets.load_dataset(name, config, data_dir=known.data_dir if known else None, split=split)
    except Exception as error:  # the hub client raises many kinds; all mean that the data cannot be had
        reason = " ".join(str(error).split())
        raise DataError(
            f"hub data set {name!r} (split {split!r}) cannot be loaded: {reason}. Offline? Set path to a local file "
            f"with the same rows" + (f" and layout to {name}." if known else ".")
        ) from None
    where = f"{name}[{split}] row {{}}"
    return Opened(name, dataset._fingerprint, layout, where, lambda told: _dataset_rows(dataset, layout, told))


def _saved(source: SourceConfig, path: Path, layout: Layout) -> Opened:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            split = source.split or "train"
            if split not in dataset:
                raise DataError(f"{path}: no split {split!r}; there are {', '.join(dataset)}")
            dataset = dataset[split]
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a folder that datasets.save_to_disk wrote: {error}") from None
    digest = hashlib.sha256(str(source.split).encode())
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {file_hash(file)}\n".encode())
    rows = lambda told: _dataset_rows(dataset, layout, told)  # noqa: E731
    return Opened(path.name, digest.hexdigest(), layout, f"{path} row {{}}", rows)


def open_source(source: SourceConfig, *, all_columns: bool = False) -> Opened:
    """Find a source and say how its rows are read; the test bed's, which are made, are not read.

    Args:
        all_columns: give rows whole; by default only the columns of the source's layout are read.

    Raises:
        DataError: nothing is there, or nothing of a known kind.
    """
    layout = layout_of(source)
    if all_columns:
        layout = replace(layout, columns=())
    if source.path.startswith(HUB):
        return _hub(source, layout)
    path = expanded(source.path)
    if path.is_dir():
        return _saved(source, path, layout)
    readers: dict[str, Callable[[Told], Iterator[Row]]] = {
        ".jsonl": lambda told: _jsonl_rows(path, told),
        ".parquet": lambda told: _parquet_rows(path, layout, told),
        ".arrow": lambda told: _arrow_rows(path, layout, told),
    }
    if path.suffix not in readers:
        raise DataError(
            f"{path}: unknown kind of data; use a .jsonl, .parquet or .arrow file, a folder of datasets.save_to_disk, "
            "'testbed:SPLIT' or 'hub:NAME'"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    where = f"{path}:{{}}" if path.suffix == ".jsonl" else f"{path} row {{}}"
    return Opened(path.stem, path.suffix + file_hash(path), layout, where, readers[path.suffix])
