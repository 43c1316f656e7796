"""``ptl data`` for people: a table of sources, subsets, tokens and samples; and bars while they are read."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

QUIET_SECONDS = 1.0
"""What is read faster than this needs no bar."""


@contextlib.contextmanager
def reading_bars(console: Console) -> Iterator[Any]:
    """Gives a function that is told of progress and shows a bar with the remaining time for all that takes long."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    since: dict[str, float] = {}
    tasks: dict[str, TaskID] = {}

    def progress(what: str, done: int, total: int) -> None:
        began = since.setdefault(what, time.monotonic())
        if what not in tasks and time.monotonic() - began > QUIET_SECONDS:
            bars.start()
            tasks[what] = bars.add_task(what)
        if what in tasks:
            bars.update(tasks[what], completed=done, total=total or None, visible=not total or done < total)

    try:
        yield progress
    finally:
        bars.stop()


def sources_table(report: dict[str, Any]) -> Table:
    """One row per source of every set."""
    table = Table(title=f"data of {report['name']}, seed {report['seed']}", title_justify="left")
    table.add_column("set")
    table.add_column("source", overflow="fold")
    is_held_out = any(source["held_out"] for found in report["sets"].values() for source in found["sources"])
    held_out = ("held_out",) if is_held_out else ()
    headings = ("read", "bad", "unanswered", *held_out, "duplicate", "contaminated", "kept", "used")
    for heading in headings:
        table.add_column(heading.replace("_", " "), justify="right")
    for name, found in report["sets"].items():
        for source in found["sources"]:
            table.add_row(name, source["path"], *(f"{source[heading]:,}" for heading in headings))
    return table


def _subsets_line(name: str, subsets: dict[str, Any]) -> str:
    smallest, largest = subsets["smallest"], subsets["largest"]
    rows = f"{largest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    return f"{name}: {subsets['count']} disjoint subsets of {rows} rows: {' '.join(subsets['hashes'])}"


def _tokens_line(name: str, rows: int, tokens: dict[str, Any]) -> str:
    about, total = "about " if tokens["estimate"] else "", tokens["questions"] + tokens["solutions"]
    how = f"estimate from {tokens['counted']:,} records" if tokens["estimate"] else "counted"
    return (
        f"{name}: {about}{total:,} tokens, {tokens['questions']:,} in questions and {tokens['solutions']:,} in "
        f"solutions, {total / max(1, rows):,.0f} per record ({how})"
    )


def show(report: dict[str, Any], console: Console) -> None:
    """Print what :func:`ptl_rl.driver.data_report.data_report` found."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    console.print(sources_table(report))
    for name, found in report["sets"].items():
        if found["subsets"]:
            line(_subsets_line(name, found["subsets"]))
    for name, found in report["sets"].items():
        if found["tokens"]:
            line(_tokens_line(name, found["rows"], found["tokens"]))
    for name, found in report["sets"].items():
        for record in found["samples"]:
            line(f"\n{name} {record['id']} ({record['source']})")
            for part in ("question", "solution", "answer"):
                if record[part]:
                    line(f"  {part}: " + record[part].replace("\n", "\n    "))
    if report["notes"]:
        line("")
    for note in report["notes"]:
        line(f"note: {note}")
    line(f"prepared data is kept in {report['cache']}")
