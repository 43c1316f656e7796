"""What came of a study's runs: a table, a figure and a paragraph of plain statements."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.evaluation.intervals import Paired, accuracy_interval, paired
from ptl_rl.studies.design import Row, Study
from ptl_rl.studies.runner import StudyRun, runs_of

RESULTS, TABLE, FIGURE, TEXT = "results.json", "table.md", "figure.png", "README.md"


@dataclass(frozen=True)
class Line:
    """One row with its seeds put together. Accuracies are means over seeds."""

    row: Row
    accuracies: list[float]
    """Of each seed's final model."""
    mean: float
    low: float
    high: float
    """95 % bootstrap interval of the mean over the test problems; a problem's result is its mean over seeds."""
    original: float
    """Of the model that the study starts from."""
    parameters: int
    flops_per_token: int
    tokens_per_answer: float
    steps: int
    seconds: float
    """Of a run, on average."""
    against: Paired | None = None
    """With the study's reference row as the first."""


@dataclass(frozen=True)
class _Final:
    """The last evaluation of a run."""

    metrics: dict[str, Any]
    correct: dict[str, float]
    steps: int
    seconds: float


def _final(run: StudyRun) -> _Final | None:
    entries = Journal(run.folder / "journal.jsonl").entries()
    evaluations = [entry for entry in entries if entry.stage == "evaluate" and entry.cycle]
    if not run.is_finished or not evaluations:
        return None
    last = evaluations[-1]
    recoveries = [entry for entry in entries if entry.stage == "recover"]
    return _Final(
        last.metrics,
        _correct(run.folder, last),
        sum(entry.metrics["steps"] for entry in recoveries),
        sum(entry.seconds for entry in entries),
    )


def _correct(folder: Path, entry: Entry) -> dict[str, float]:
    import pyarrow.parquet

    assert entry.artefact is not None
    table = pyarrow.parquet.read_table(folder / entry.artefact / "samples.parquet", columns=["id", "correct"])
    return dict(zip(table["id"].to_pylist(), table["correct"].to_pylist(), strict=True))


def original_metrics(study: Study, out: Path, seeds: int) -> dict[str, Any] | None:
    """Of the study's own model before anything was done to it; None before any run has measured it."""
    runs = runs_of(study, out, seeds)
    # A run of a model that was cut before it began measures that; it serves only where there is no other.
    for run in sorted(runs, key=lambda run: run.row.slicegpt_size is not None):
        for entry in Journal(run.folder / "journal.jsonl").entries():
            if entry.stage == "evaluate" and entry.cycle == 0:
                return entry.metrics
    return None


def collect(study: Study, out: Path, seeds: int) -> list[Line]:
    """A line per row of which at least one run is finished; compared where both rows have the same seeds."""
    found: dict[str, dict[int, _Final]] = {row.name: {} for row in study.rows}
    for run in runs_of(study, out, seeds):
        if final := _final(run):
            found[run.row.name][run.seed] = final
    original = original_metrics(study, out, seeds)
    reference = found.get(study.reference, {})
    lines = []
    for row in study.rows:
        finals = found[row.name]
        if not finals or original is None:
            continue
        means = _means(finals)
        low, high = accuracy_interval(list(means.values()))
        against = None
        if row.name != study.reference and reference and reference.keys() == finals.keys():
            others = _means(reference)
            shared = [name for name in others if name in means]
            against = paired([others[name] for name in shared], [means[name] for name in shared])
        metrics = [final.metrics for final in finals.values()]
        lines.append(
            Line(
                row=row,
                accuracies=[m["accuracy"] for m in metrics],
                mean=sum(m["accuracy"] for m in metrics) / len(metrics),
                low=low,
                high=high,
                original=original["accuracy"],
                parameters=metrics[0]["parameters"],
                flops_per_token=metrics[0]["flops_per_token"],
                tokens_per_answer=sum(m["tokens_per_answer"] for m in metrics) / len(metrics),
                steps=next(iter(finals.values())).steps,
                seconds=sum(final.seconds for final in finals.values()) / len(finals),
                against=against,
            )
        )
    return lines


def _means(finals: dict[int, _Final]) -> dict[str, float]:
    """Every test problem's result, averaged over seeds."""
    problems = set.intersection(*(set(final.correct) for final in finals.values()))
    return {name: sum(final.correct[name] for final in finals.values()) / len(finals) for name in sorted(problems)}


HEADINGS = (
    "row",
    "parameters",
    "FLOPs/token",
    "accuracy",
    "95 % interval",
    "of the original's",
    "each seed",
    "against the reference",
    "tokens/answer",
    "steps",
    "time",
)


def cells(line: Line, original: dict[str, Any], reference: str) -> list[str]:
    """A line as text, in the order of :data:`HEADINGS`."""
    if line.row.name == reference:
        against = "reference"
    elif line.against is None:
        against = ""
    else:
        against = f"{100 * line.against.difference:+.1f} points (p = {line.against.p_value:.2g})"
    return [
        line.row.label,
        f"{line.parameters:,} ({line.parameters / original['parameters']:.0%})",
        f"{line.flops_per_token / original['flops_per_token']:.0%}",
        f"{line.mean:.1%}",
        f"{line.low:.1%}-{line.high:.1%}",
        f"{line.mean / line.original:.3f}" if line.original else "",
        " / ".join(f"{100 * value:.1f}" for value in line.accuracies),
        against,
        f"{line.tokens_per_answer:.1f}",
        str(line.steps),
        f"{line.seconds:.0f} s",
    ]


def markdown(lines: list[Line], original: dict[str, Any], reference: str) -> str:
    """The table."""
    text = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    text += ["| " + " | ".join(cells(line, original, reference)) + " |" for line in lines]
    return "\n".join(text) + "\n"


def paragraph(study: Study, lines: list[Line], original: dict[str, Any], seeds: int) -> str:
    """What was measured, in sentences that follow from the numbers alone."""
    best = max(lines, key=lambda line: line.mean)
    said = [
        f"{study.question} {seeds} seeds, {original['problems']} test problems; the original solves "
        f"{original['accuracy']:.1%}. The highest mean is that of {best.row.label} with {best.mean:.1%} "
        f"({best.low:.1%} to {best.high:.1%})."
    ]
    reference = next((line for line in lines if line.row.name == study.reference), None)
    if reference is not None:
        clear = [line for line in lines if line.against and line.against.p_value < 0.05]
        better = [line.row.label for line in clear if line.against and line.against.difference > 0]
        worse = [line.row.label for line in clear if line.against and line.against.difference < 0]
        level = [line.row.label for line in lines if line.against and line.against.p_value >= 0.05]
        for names, what in ((better, "better than"), (worse, "worse than"), (level, "not told apart from")):
            if names:
                said.append(f"{'; '.join(names)}: {what} {reference.row.label} (paired over problems, 5 % level).")
    return " ".join(said + [f"Note: {note}." for note in study.notes])


def plot(study: Study, lines: list[Line], original: dict[str, Any], path: Path) -> None:
    """Accuracy with its interval for every row, and each seed's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.55 * len(lines) + 1.6), layout="constrained")
    axis = figure.add_subplot()
    places = range(len(lines))
    for place, line in zip(places, lines, strict=True):
        colour = "#1f4e8c" if line.row.name == study.reference else "#7a8699"
        # The mean over seeds may leave the interval of problems that all seeds share; then it has no arm on that side.
        arms = [[max(0.0, line.mean - line.low)], [max(0.0, line.high - line.mean)]]
        axis.errorbar([line.mean], [place], xerr=arms, fmt="o", color=colour, capsize=4)
        axis.plot(line.accuracies, [place] * len(line.accuracies), "|", color=colour, alpha=0.6, markersize=9)
    axis.axvline(original["accuracy"], color="#c44e52", linestyle="--", linewidth=1, label="original")
    axis.set_yticks(
        list(places),
        [f"{line.row.label}\n{line.parameters / original['parameters']:.0%} of parameters" for line in lines],
    )
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("greedy accuracy: mean, 95 % interval, and every seed")
    axis.set_title(study.question, fontsize=10)
    axis.legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=140)


def write(study: Study, out: Path, seeds: int, command: str) -> str | None:
    """Write table, figure and text of what is finished so far; returns the text, None if nothing is.

    Args:
        command: that makes this study, for its reader.
    """
    lines, original = collect(study, out, seeds), original_metrics(study, out, seeds)
    if not lines or original is None:
        return None
    table = markdown(lines, original, study.reference)
    text = f"# Study: {study.name}\n`{command}`\n\n{paragraph(study, lines, original, seeds)}\n\n{table}\n"
    (out / TABLE).write_text(table)
    (out / TEXT).write_text(text + f"![{study.question}]({FIGURE})\n")
    plot(study, lines, original, out / FIGURE)
    content = {
        "study": study.name,
        "command": command,
        "original": original,
        "rows": [_json(line) for line in lines],
    }
    (out / RESULTS).write_text(json.dumps(content, indent=2) + "\n")
    return text


def _json(line: Line) -> dict[str, Any]:
    values = {name: value for name, value in vars(line).items() if name not in ("row", "against")}
    return {
        "name": line.row.name,
        "label": line.row.label,
        **values,
        "against": None if line.against is None else vars(line.against),
    }
