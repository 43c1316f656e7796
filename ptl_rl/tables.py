"""Tables for a terminal and as markdown. A row is a mapping from headings to text, and the first row has them all."""

from collections.abc import Collection, Sequence
from typing import Any

from rich.table import Table

Cells = dict[str, str]


def text_table(rows: Sequence[Cells], left: Collection[str] = (), **options: Any) -> Table:
    """Columns are aligned to the right, but for those that ``left`` names; ``options`` are rich's."""
    table = Table(title_justify="left", **options)
    for heading in rows[0] if rows else ():
        table.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def markdown_table(rows: Sequence[Cells]) -> str:
    """With a line break at its end; nothing without rows."""
    if not rows:
        return ""
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in (rows[0], *(row.values() for row in rows)))
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines]) + "\n"
