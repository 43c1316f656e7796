"""What a run amounts to, read from its journal alone: one row per cycle, as terminal table, markdown and PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ptl_rl.config.recipe import read_saved_config
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.tables import Cells, markdown_table, text_table


@dataclass(frozen=True)
class Row:
    """One cycle; cycle 0 is the original model. Shares are of the original model's numbers."""

    cycle: int
    layers: int
    channels: int
    parameters: int
    flops_per_token: int
    accuracy: float
    interval: tuple[float, float] | None
    """Of the accuracy, at 95 %; None in runs of earlier versions."""
    sliced_accuracy: float | None
    """After the cut and before recovery: on the same problems where that was measured, else on the validation split."""
    recovered: dict[str, Any] | None
    """What recovery added on the same problems: the fields of :class:`ptl_rl.evaluation.intervals.Paired`."""
    sliced_interval: tuple[float, float] | None
    tokens_per_answer: float
    tokens_per_second: float
    steps: int
    seconds: float
    decision: str


def rows(entries: list[Entry]) -> list[Row]:
    """A row per evaluated cycle; of several recovery rounds the last counts, their steps and seconds add up."""
    result = []
    for cycle in sorted({e.cycle for e in entries}):
        own = [e for e in entries if e.cycle == cycle]
        evaluations = [e for e in own if e.stage == "evaluate"]
        if not evaluations:
            continue
        m: dict[str, Any] = evaluations[-1].metrics
        after_cut = evaluations[0].metrics.get("after_cut")
        recoveries = [e for e in own if e.stage == "recover"]
        gates = [e for e in own if e.stage == "gate"]
        result.append(
            Row(
                cycle=cycle,
                layers=m["num_hidden_layers"],
                channels=m["intermediate_size"],
                parameters=m["parameters"],
                flops_per_token=m["flops_per_token"],
                accuracy=m["accuracy"],
                interval=m.get("interval"),
                sliced_accuracy=after_cut["accuracy"] if after_cut else _sliced_accuracy(recoveries),
                recovered=m.get("recovered"),
                sliced_interval=after_cut["interval"] if after_cut else None,
                tokens_per_answer=m["tokens_per_answer"],
                tokens_per_second=m["tokens_per_second"],
                steps=sum(e.metrics["steps"] for e in recoveries),
                seconds=sum(e.seconds for e in own),
                decision=gates[-1].metrics["decision"] if gates else "",
            )
        )
    return result


def _sliced_accuracy(recoveries: list[Entry]) -> float | None:
    """Only a cycle's first recovery starts from the sliced model, and only GRPO measures what it starts from."""
    return recoveries[0].metrics.get("validation_accuracy_before") if recoveries else None


def _after_cut(row: Row) -> str:
    """The accuracy before recovery, and the points that recovery added on the same problems, as far as known."""
    if row.sliced_accuracy is None:
        return ""
    if row.recovered is None:
        return f"{row.sliced_accuracy:.1%}"
    p = row.recovered["p_value"]
    sure = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{row.sliced_accuracy:.1%}, then {100 * row.recovered['difference']:+.1f} ({sure})"


PICTURE = "summary.png"


def cells(row: Row, first: Row, start: str = "original") -> Cells:
    """A row as text; ``start`` is what cycle 0 is called."""
    return {
        "cycle": str(row.cycle or start),
        "layers": str(row.layers),
        "channels": str(row.channels),
        "parameters": f"{row.parameters:,} ({row.parameters / first.parameters:.0%})",
        "FLOPs/token": f"{row.flops_per_token / first.flops_per_token:.0%}",
        "accuracy": f"{row.accuracy:.1%}",
        "after cut": _after_cut(row),
        "tokens/answer": f"{row.tokens_per_answer:.1f}",
        "tokens/s": f"{row.tokens_per_second:,.0f}",
        "steps": str(row.steps or ""),
        "time": f"{row.seconds:.0f} s",
        "gate": row.decision.replace("_", " "),
    }


def table(all_rows: list[Row]) -> Table:
    """The rows for a terminal."""
    return text_table([cells(row, all_rows[0]) for row in all_rows], left=("cycle", "gate"), title="cycles")


def markdown(entries: list[Entry]) -> str:
    """The rows as a markdown table."""
    all_rows = rows(entries)
    return markdown_table([cells(row, all_rows[0]) for row in all_rows])


def write(folder: Path) -> list[Entry]:
    """``summary.md`` and ``summary.png`` of a run, in its folder; returns its journal.

    Raises:
        UserError: its configuration or journal cannot be read.
    """
    entries = Journal(folder / "journal.jsonl").entries()
    name = read_saved_config(folder / "config.json").name
    (folder / "summary.md").write_text(markdown(entries))
    by_cycle = "" if _cuts_in_place(entries) else ", cycle by cycle"
    plot(entries, folder / PICTURE, f"{name}: accuracy and size{by_cycle}")
    return entries


def left_by(cuts: list[dict[str, Any]], layers: int) -> list[str]:
    """What each cut within a training left: channels of every block, and before them the blocks, if any went.

    Args:
        cuts: as a recovery journals them.
        layers: blocks of the original.
    """
    blocks = [cut.get("num_hidden_layers", layers) for cut in cuts]
    widths = [str(cut["intermediate_size"]) for cut in cuts]
    if set(blocks) <= {layers}:
        return widths
    return [f"{count} blocks x {width}" for count, width in zip(blocks, widths, strict=True)]


def _cuts_in_place(entries: list[Entry]) -> dict[int, str]:
    """For a cycle with cuts within its training, what they left."""
    found = {}
    for entry in entries:
        if left := left_by(entry.metrics.get("cuts", []), entries[0].metrics.get("num_hidden_layers", 0)):
            told = left if len(left) < 5 else [*left[:2], "...", left[-1]]
            times = "once" if len(left) == 1 else f"{len(left)} times"
            found[entry.cycle] = f"cut {times} within one training,\nto {', '.join(told)} channels"
    return found


def plot(entries: list[Entry], path: Path, title: str) -> None:
    """PNG: accuracy against cycle, with what each cut left, their intervals, and parameters behind them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    all_rows = rows(entries)
    cycles = [row.cycle for row in all_rows]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    accuracy_axis = figure.add_subplot()
    size_axis = accuracy_axis.twinx()
    shares = [row.parameters / all_rows[0].parameters for row in all_rows]
    size_axis.bar(cycles, shares, width=0.55, color="#d9dee7", zorder=0)
    size_axis.set_ylim(0, 1.15)
    size_axis.set_ylabel("parameters, share of the original")
    for row, share in zip(all_rows, shares, strict=True):
        size_axis.text(row.cycle, 0.02, f"{row.parameters / 1e6:.3g} M\n{share:.0%}", ha="center", fontsize=8)
    accuracy_axis.set_zorder(size_axis.get_zorder() + 1)
    accuracy_axis.patch.set_visible(False)
    cut = [row for row in all_rows if row.sliced_accuracy is not None]
    same = all(row.sliced_interval for row in cut)
    if cut:
        values = [(row.sliced_accuracy or 0.0, row.sliced_interval) for row in cut]
        which = "last cut" if any(entry.stage == "cut" for entry in entries) else "cut"
        label = f"right after the {which}" if same else f"right after the {which} (validation)"
        # A little to the left, so that a line from what the cut left leads up to what recovery made of it.
        places = [row.cycle - (0.12 if same else 0) for row in cut]
        _with_intervals(accuracy_axis, places, values, fmt="v", color="#c44e52", label=label)
        for place, row, (left, _) in zip(places, cut, values, strict=True):
            if same:
                accuracy_axis.plot([place, row.cycle], [left, row.accuracy], ":", color="#c44e52")
    label = "after recovery, same problems" if cut and same else "after recovery (test)"
    values = [(row.accuracy, row.interval) for row in all_rows]
    _with_intervals(accuracy_axis, cycles, values, fmt="o-", color="#1f4e8c", label=label)
    accuracy_axis.set_ylim(0, 1.15)
    in_place = _cuts_in_place(entries)
    accuracy_axis.set_xticks(cycles, ["original", *(in_place.get(cycle, str(cycle)) for cycle in cycles[1:])])
    if not in_place:
        accuracy_axis.set_xlabel("cycle")
    accuracy_axis.set_ylabel("greedy accuracy")
    accuracy_axis.set_title(title)
    accuracy_axis.legend(loc="upper right", fontsize=8, framealpha=1)
    figure.savefig(path, dpi=140)


def _with_intervals(
    axis: Any, places: Sequence[float], values: Sequence[tuple[float, tuple[float, float] | None]], **look: Any
) -> None:
    """Points with their 95 % intervals, as far as these are known."""
    arms = [[value - (known or (value, value))[0] for value, known in values]]
    arms += [[(known or (value, value))[1] - value for value, known in values]]
    shown = [[max(0.0, arm) for arm in side] for side in arms]
    axis.errorbar(places, [value for value, _ in values], yerr=shown, capsize=3, **look)
