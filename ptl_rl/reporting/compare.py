"""Several runs side by side: what each ended with, and how sure the difference to the first one is."""

from ptl_rl.reporting.run_data import RunData, paired_answers
from ptl_rl.tables import Cells


def comparison(runs: list[RunData]) -> list[Cells]:
    """A row per run."""
    return [_cells(run, runs[0]) for run in runs]


def _cells(run: RunData, reference: RunData) -> Cells:
    first, final = run.rows[0], run.final
    interval = run.interval(final.cycle)
    return {
        "run": run.name,
        "start": f"{first.accuracy:.1%}",
        "final": f"{final.accuracy:.1%}",
        "95 % interval": f"{interval[0]:.1%}-{interval[1]:.1%}" if interval else "",
        "of the start's": f"{final.accuracy / first.accuracy:.3f}" if first.accuracy else "",
        "parameters": f"{final.parameters:,} ({final.parameters / first.parameters:.0%})",
        "FLOPs/token": f"{final.flops_per_token / first.flops_per_token:.0%}",
        "tokens/answer": f"{final.tokens_per_answer:.1f}",
        "against the first": _against(run, reference),
        "steps": str(sum(row.steps for row in run.rows)),
        "time": f"{sum(row.seconds for row in run.rows):.0f} s",
    }


def _against(run: RunData, reference: RunData) -> str:
    if run is reference:
        return "reference"
    found = paired_answers(reference.answers(reference.final.cycle), run.answers(run.final.cycle))
    if found is None:
        return "other problems"
    return f"{100 * found.difference:+.1f} points (p = {found.p_value:.2g})"
