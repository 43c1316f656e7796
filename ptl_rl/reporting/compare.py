"""Several runs side by side: what each ended with, and how sure the difference to the first one is."""

from rich.table import Table

from ptl_rl.reporting.run_data import RunData, paired_answers

HEADINGS = [
    "run",
    "start",
    "final",
    "95 % interval",
    "of the start's",
    "parameters",
    "FLOPs/token",
    "tokens/answer",
    "against the first",
    "steps",
    "time",
]


def comparison(runs: list[RunData]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of text per run."""
    return HEADINGS, [_cells(run, runs[0]) for run in runs]


def _cells(run: RunData, reference: RunData) -> list[str]:
    first, final = run.rows[0], run.final
    interval = run.interval(final.cycle)
    return [
        run.name,
        f"{first.accuracy:.1%}",
        f"{final.accuracy:.1%}",
        f"{interval[0]:.1%}-{interval[1]:.1%}" if interval else "",
        f"{final.accuracy / first.accuracy:.3f}" if first.accuracy else "",
        f"{final.parameters:,} ({final.parameters / first.parameters:.0%})",
        f"{final.flops_per_token / first.flops_per_token:.0%}",
        f"{final.tokens_per_answer:.1f}",
        _against(run, reference),
        str(sum(row.steps for row in run.rows)),
        f"{sum(row.seconds for row in run.rows):.0f} s",
    ]


def _against(run: RunData, reference: RunData) -> str:
    if run is reference:
        return "reference"
    found = paired_answers(reference.answers(reference.final.cycle), run.answers(run.final.cycle))
    if found is None:
        return "other problems"
    return f"{100 * found.difference:+.1f} points (p = {found.p_value:.2g})"


def comparison_table(runs: list[RunData]) -> Table:
    """The same for a terminal."""
    headings, rows = comparison(runs)
    table = Table(title="runs", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def comparison_markdown(runs: list[RunData]) -> str:
    """The same as markdown."""
    headings, rows = comparison(runs)
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
