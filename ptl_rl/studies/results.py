"""What came of a study's runs: a table, a figure and a paragraph of plain statements."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.evaluation.intervals import Paired, accuracy_interval, paired
from ptl_rl.families import ModelShape
from ptl_rl.studies.design import Row, Study
from ptl_rl.studies.runner import StudyRun, runs_found
from ptl_rl.tables import Cells, markdown_table

RESULTS, TABLE, FIGURE, TEXT = "results.json", "table.md", "figure.png", "README.md"


@dataclass(frozen=True)
class Line:
    """One row with its seeds put together. Accuracies are means over seeds."""

    row: Row
    seeds: list[int]
    """Whose runs are finished."""
    accuracies: list[float]
    """Of each seed's final model."""
    mean: float
    low: float
    high: float
    """95 % bootstrap interval of the mean over the test problems; a problem's result is its mean over seeds."""
    parameters: int
    """Of the largest seed's model; seeds differ where a run finds its own size."""
    smallest: int
    """Parameters of the smallest one."""
    flops_per_token: int
    """Of the largest one."""
    tokens_per_answer: float
    steps: int
    """Of a run, on average."""
    seconds: float
    """Of a run, on average."""
    against: Paired | None = None
    """With the study's reference row as the first, on the seeds that both have."""
    adjusted_p: float | None = None
    """Its p-value, adjusted for the study's number of comparisons (Holm)."""


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


def original_metrics(study: Study, out: Path) -> dict[str, Any] | None:
    """Of the study's own model before anything was done to it; None before a run has measured it.

    A run of a model that was cut before it began measures another one.
    """
    for row in study.rows:
        for run in runs_found(row, out) if row.slicegpt_size is None else []:
            for entry in Journal(run.folder / "journal.jsonl").entries():
                if entry.stage == "evaluate" and entry.cycle == 0:
                    return entry.metrics
    return None


def collect(study: Study, out: Path) -> list[Line]:
    """A line per row of which at least one run is finished.

    Raises:
        ConfigError: runs of one row were evaluated on different problems.
    """
    found: dict[str, dict[int, _Final]] = {}
    for row in study.rows:
        finals = {run.seed: final for run in runs_found(row, out) if (final := _final(run))}
        if finals:
            found[row.name] = finals
    lines = []
    for row in study.rows:
        if row.name in found:
            finals = found[row.name]
            reference = found.get(study.reference, {}) if row.name != study.reference else {}
            lines.append(_line(row, finals, reference, out))
    return _adjusted(lines)


def _line(row: Row, finals: dict[int, _Final], reference: dict[int, _Final], out: Path) -> Line:
    correct = _means(finals, row, out)
    low, high = accuracy_interval(list(correct.values()))
    shared = sorted(finals.keys() & reference.keys())
    against = None
    if shared:
        first = _means({seed: reference[seed] for seed in shared}, row, out)
        second = _means({seed: finals[seed] for seed in shared}, row, out)
        if first.keys() == second.keys():
            against = paired(list(first.values()), [second[name] for name in first])
    metrics = [final.metrics for final in finals.values()]
    return Line(
        row=row,
        seeds=sorted(finals),
        accuracies=[m["accuracy"] for m in metrics],
        mean=sum(correct.values()) / len(correct),
        low=low,
        high=high,
        parameters=max(m["parameters"] for m in metrics),
        smallest=min(m["parameters"] for m in metrics),
        flops_per_token=max(m["flops_per_token"] for m in metrics),
        tokens_per_answer=sum(m["tokens_per_answer"] for m in metrics) / len(metrics),
        steps=round(sum(final.steps for final in finals.values()) / len(finals)),
        seconds=sum(final.seconds for final in finals.values()) / len(finals),
        against=against,
    )


def _means(finals: dict[int, _Final], row: Row, out: Path) -> dict[str, float]:
    """Every test problem's result, averaged over seeds."""
    problems = [set(final.correct) for final in finals.values()]
    if any(other != problems[0] for other in problems):
        raise ConfigError(f"{out}: the runs of {row.name} were evaluated on different problems; make them anew")
    return {name: sum(final.correct[name] for final in finals.values()) / len(finals) for name in sorted(problems[0])}


def _adjusted(lines: list[Line]) -> list[Line]:
    """With Holm's p-values: of k comparisons, the i-th smallest times k - i + 1, and none smaller than one before."""
    compared = sorted((line.against.p_value, place) for place, line in enumerate(lines) if line.against)
    largest = 0.0
    adjusted: dict[int, float] = {}
    for rank, (p_value, place) in enumerate(compared):
        largest = max(largest, min(1.0, p_value * (len(compared) - rank)))
        adjusted[place] = largest
    return [replace(line, adjusted_p=adjusted.get(place)) for place, line in enumerate(lines)]


def cells(line: Line, shape: ModelShape, original: dict[str, Any] | None, reference: str) -> Cells:
    """A line as text."""
    if line.row.name == reference:
        against = "reference"
    elif line.against is None:
        against = ""
    else:
        against = f"{100 * line.against.difference:+.1f} points (p = {line.adjusted_p:.2g})"
    start = original["accuracy"] if original else 0.0
    size = f"{line.parameters:,} ({line.parameters / shape.parameters:.0%})"
    if line.smallest < line.parameters:
        size = f"{line.smallest:,} ({line.smallest / shape.parameters:.0%}) to {size}"
    return {
        "row": line.row.label,
        "parameters": size,
        "FLOPs/token": f"{line.flops_per_token / shape.flops_per_token():.0%}",
        "accuracy": f"{line.mean:.1%}",
        "95 % interval": f"{line.low:.1%}-{line.high:.1%}",
        "of the original's": f"{line.mean / start:.3f}" if start else "",
        "each seed": " / ".join(f"{100 * value:.1f}" for value in line.accuracies),
        "against the reference": against,
        "tokens/answer": f"{line.tokens_per_answer:.1f}",
        "steps": str(line.steps),
        "time": f"{line.seconds:.0f} s",
    }


def paragraph(study: Study, lines: list[Line], original: dict[str, Any] | None) -> str:
    """What was measured, in sentences that follow from the numbers alone."""
    most = max(len(line.seeds) for line in lines)
    whole = [line for line in lines if len(line.seeds) == most]
    best = max(whole, key=lambda line: line.mean)
    start = (
        f" The original solves {original['accuracy']:.1%} of {original['problems']} test problems." if original else ""
    )
    said = [
        f"{study.question}{start} Of the {len(whole)} rows with {most} {'seeds' if most > 1 else 'seed'}, the highest "
        f"mean is that of {best.row.label} with {best.mean:.1%} ({best.low:.1%} to {best.high:.1%})."
    ]
    few = [f"{line.row.label} ({len(line.seeds)})" for line in lines if len(line.seeds) < most]
    if few:
        said.append(f"Rows with fewer finished seeds: {'; '.join(few)}.")
    reference = next((line for line in lines if line.row.name == study.reference), None)
    if reference is not None:
        groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
        for line in lines:
            if line.against is not None and line.adjusted_p is not None:
                clear = "better than" if line.against.difference > 0 else "worse than"
                groups[clear if line.adjusted_p < 0.05 else "not told apart from"].append(line.row.label)
        for what, names in groups.items():
            if names:
                said.append(f"{'; '.join(names)}: {what} {reference.row.label}.")
        if any(groups.values()):
            said.append(
                "Comparisons are paired over problems, adjusted for their number (Holm, 5 % level), and hold for the "
                "models that these seeds made: how much a method differs from seed to seed, the column of seeds shows."
            )
    return " ".join(said + [f"Note: {note}." for note in study.notes])


def plot(study: Study, lines: list[Line], shape: ModelShape, original: dict[str, Any] | None, path: Path) -> None:
    """Accuracy with its interval for every row, and each seed's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.55 * len(lines) + 1.6), layout="constrained")
    axis = figure.add_subplot()
    for place, line in enumerate(lines):
        colour = "#1f4e8c" if line.row.name == study.reference else "#7a8699"
        arms = [[max(0.0, line.mean - line.low)], [max(0.0, line.high - line.mean)]]
        axis.errorbar(
            [line.mean],
            [place],
            xerr=arms,
            fmt="o",
            color=colour,
            capsize=4,
        )
        axis.plot(line.accuracies, [place] * len(line.accuracies), "|", color=colour, alpha=0.6, markersize=9)
    if original:
        axis.axvline(original["accuracy"], color="#c44e52", linestyle="--", linewidth=1, label="original")
        figure.legend(loc="outside lower left", fontsize=8)
    labels = [f"{line.row.label}\n{line.parameters / shape.parameters:.0%} of parameters" for line in lines]
    axis.set_yticks(range(len(lines)), labels)
    axis.set_ylim(len(lines) - 0.5, -0.5)  # the first row on top
    axis.set_xlim(0, 1)
    axis.set_xlabel("greedy accuracy: mean, 95 % interval, and every seed")
    axis.set_title(study.question, fontsize=10)
    figure.savefig(path, dpi=140)


def write(study: Study, out: Path, shape: ModelShape, command: str) -> str | None:
    """Write table, figure and text of all that is finished so far; returns the text, None if nothing is.

    Args:
        shape: of the model that the study starts from.
        command: that makes this study, for its reader; the number of seeds found is added.
    """
    lines, original = collect(study, out), original_metrics(study, out)
    if not lines:
        return None
    command += f" --seeds {1 + max(seed for line in lines for seed in line.seeds)}"
    table = markdown_table([cells(line, shape, original, study.reference) for line in lines])
    text = f"# Study: {study.name}\n`{command}`\n\n{paragraph(study, lines, original)}\n\n{table}\n"
    (out / TABLE).write_text(table)
    (out / TEXT).write_text(text + f"![{study.question}]({FIGURE})\n")
    plot(study, lines, shape, original, out / FIGURE)
    content = {"study": study.name, "command": command, "original": original, "rows": [_json(line) for line in lines]}
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
