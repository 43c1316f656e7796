"""How many rows sets have, as far as that can be told without reading them."""

import contextlib
from pathlib import Path

from ptl_rl.config import RunConfig, SourceConfig
from ptl_rl.config.data import HUB, EvaluationSet, held_out_rows
from ptl_rl.errors import expanded
from ptl_rl.planning.assumptions import KNOWN_ROWS, UNKNOWN_ROWS

SAMPLE_BYTES = 1 << 20


def known_rows(sources: SourceConfig | list[SourceConfig] | None) -> int:
    """Rows of a set: those that its sources say, or that a look at a local file tells."""
    if sources is None:
        return UNKNOWN_ROWS
    return sum(map(_rows, sources if isinstance(sources, list) else [sources]))


def _rows(source: SourceConfig) -> int:
    path = expanded(source.path)
    found = None
    with contextlib.suppress(OSError, ValueError):  # pyarrow's errors are among them
        if path.suffix == ".jsonl":
            found = _lines(path)
        elif path.suffix == ".parquet":
            import pyarrow.parquet

            found = pyarrow.parquet.read_metadata(path).num_rows
    if found is not None:
        return min(found, source.rows or found)
    return source.rows or KNOWN_ROWS.get(source.path.removeprefix(HUB), UNKNOWN_ROWS)


def _lines(path: Path) -> int:
    """Of a text file; of a long one by the mean length of its first lines."""
    with path.open("rb") as file:
        begin = file.read(SAMPLE_BYTES)
    size, lines = path.stat().st_size, begin.count(b"\n") + (not begin.endswith(b"\n") and bool(begin))
    return lines if size <= len(begin) else round(size / len(begin) * lines)


def evaluation_rows(config: RunConfig, name: EvaluationSet) -> int:
    """Rows of an evaluation set, whether it is named or held out."""
    source = config.evaluation_set(name)
    return known_rows(source) if source is not None else _held_out(config)[name]


def _held_out(config: RunConfig) -> dict[EvaluationSet, int]:
    _, sources = config.data.learnt(config.needs_answers)
    own = [source for source in sources if source.may_have_answers and not source.is_made]
    return held_out_rows(known_rows(own), config.data.held_out)


def unnamed_notes(config: RunConfig) -> list[str]:
    """What stands in for data that the recipe does not name."""
    notes = []
    name, sources = config.data.learnt(config.needs_answers)
    if config.data.train is None and name == "train":
        if not config.is_of_the_test_bed:
            return ["data.train is not set, and ptl run refuses that; sizes, memory and disk do not depend on it"]
        notes.append(f"data.train is not set: {sources[0].rows} problems of the test bed stand in")
    if unnamed := config.data.unnamed_sets(config.needs_answers):
        from ptl_rl.data.held_out import FEWEST

        rows = _held_out(config)
        which = " and ".join(f"data.{unset}" for unset in unnamed)
        counts = " and ".join(f"{rows[unset]:,}" for unset in unnamed)
        few = any(rows[unset] < FEWEST[unset] for unset in unnamed)
        refusal = "; ptl run refuses so few" if few else ""
        notes.append(
            f"{which} {'is' if len(unnamed) == 1 else 'are'} not set: some {counts} rows of data.{name} are held out "
            f"(data.held_out {config.data.held_out:g}){refusal}"
        )
    return notes
