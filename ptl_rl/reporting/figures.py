"""The pictures of a report, as SVG text: small, sharp at every size, and without a file of their own."""

import io
from typing import Any

from ptl_rl.reporting.run_data import Removed, RunData

BLUE, GREY = "#1f4e8c", "#d9dee7"
STAGE_COLOURS = {"score": "#7aa6c2", "slice": "#c9a227", "recover": "#1f4e8c", "evaluate": "#8a9a5b"}
STAYS = "#f2f4f7"
MOST_COLUMNS = 2048
WIDE, NARROW = 8.0, 4.2
"""Inches; the narrow ones are for telephones, where a wide one's text would be too small to read."""


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ptl", "font.size": 9}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def accuracy_by_size(runs: list[RunData], width: float = WIDE) -> str:
    """Accuracy with its interval against parameters and against FLOPs per token, a line per run."""
    beside = width >= WIDE
    figure = _figure(width, 3.2 if beside else 5.4)
    axes = figure.subplots(1, 2, sharey=True) if beside else figure.subplots(2, 1)
    alike = len({run.rows[0].parameters for run in runs}) == 1
    for number, run in enumerate(runs):
        colour = BLUE if len(runs) == 1 else f"C{number}"
        label = run.name.lstrip("_") or run.name  # what begins with _ has no place in a legend
        first = run.rows[0]
        rows = [row for row in run.rows if row.decision not in ("retry", "stop")]
        accuracy = [row.accuracy for row in rows]
        intervals = [run.interval(row.cycle) or (row.accuracy, row.accuracy) for row in rows]
        arms = [
            [max(0.0, value - low) for value, (low, _) in zip(accuracy, intervals, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(accuracy, intervals, strict=True)],
        ]
        units = (first.parameters, first.flops_per_token) if alike else (1e6, 1e6)
        sizes = (
            [row.parameters / units[0] for row in rows],
            [row.flops_per_token / units[1] for row in rows],
        )
        for axis, shares in zip(axes, sizes, strict=True):
            axis.errorbar(shares, accuracy, yerr=arms, fmt="o-", color=colour, capsize=3, label=label)
    for axis, what in zip(axes, ("parameters", "FLOPs per token"), strict=True):
        axis.set_xlabel(f"{what}, share of the start's" if alike else f"{what}, millions")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    for axis in axes[: 1 if beside else 2]:
        axis.set_ylabel("greedy accuracy, 95 % interval")
    if len(runs) > 1:
        axes[0].legend(fontsize=7)
    return _svg(figure)


def time_line(run: RunData, width: float = WIDE) -> str:
    """Stages one after the other, a bar per cycle."""
    cycles = sorted({cycle for cycle, _, _ in run.stage_seconds()})
    figure = _figure(width, 0.35 * len(cycles) + 1.0)
    axis = figure.add_subplot()
    start, seen = 0.0, set()
    for cycle, stage, seconds in run.stage_seconds():
        colour = STAGE_COLOURS.get(stage, GREY)
        label = None if stage in seen else stage
        axis.barh(cycles.index(cycle), seconds / 60, left=start / 60, color=colour, label=label)
        seen.add(stage)
        start += seconds
    axis.set_yticks(range(len(cycles)), [f"cycle {cycle}" if cycle else "original" for cycle in cycles])
    axis.invert_yaxis()
    axis.set_xlabel("minutes of finished stages, one after the other")
    figure.legend(ncols=4, fontsize=7, loc="outside upper center", frameon=False, columnspacing=1.0)
    return _svg(figure)


def recovery_curves(run: RunData, width: float = WIDE) -> str | None:
    """Reward or loss of every step of every recovery; None if none was noted."""
    curves = run.curves()
    if not curves:
        return None
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in curves))
    figure = _figure(width, 2.6 * len(kinds))
    axes = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for axis, kind in zip(axes, kinds, strict=True):
        start = 0
        for number, (label, drawn, steps, values) in enumerate(curves):
            if drawn != kind:
                continue
            axis.plot([start + step for step in steps], values, color=f"C{number}", label=label, linewidth=1.3)
            start += max(steps)
        for step, left in run.cuts_in_place():
            axis.axvline(step + 0.5, color=GREY, linewidth=1.0, zorder=0)
            axis.annotate(left, (step + 0.5, 1.01), xycoords=("data", "axes fraction"), fontsize=7)
        axis.set_ylabel(kind.replace("_", " "))
        axis.set_xlabel("recovery steps, one cycle after the other")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return _svg(figure)


def removal_map(removed: Removed, width: float = WIDE) -> str:
    """Blocks by channels: in which cycle each went.

    Of a model wider than :data:`MOST_COLUMNS` each block's channels are sorted by cycle, so that every cycle has its
    share of the row.
    """
    import matplotlib
    import numpy
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shown, in_order = removal_image(removed)
    last = max(1, int(shown.max()))
    gone = matplotlib.colormaps["viridis_r"](numpy.linspace(0.15, 1.0, last))
    figure = _figure(width, min(9.0, 0.22 * len(shown) + 1.2))
    axis = figure.add_subplot()
    image = axis.imshow(
        shown,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap([STAYS, *gone]),
        norm=BoundaryNorm(numpy.arange(-0.5, last + 1), last + 1),
        extent=(0, len(removed.channels[0]), len(shown) - 0.5, -0.5),
    )
    unit = removed.unit
    axis.set_xlabel("FFN channel of the original" if in_order else f"FFN channels of the block, sorted by {unit}")
    axis.set_ylabel("block")
    bar = figure.colorbar(image, ax=axis, ticks=range(last + 1))
    bar.ax.set_yticklabels(["stays", *(f"{unit} {number}" for number in range(1, last + 1))], fontsize=7)
    return _svg(figure)


def removal_image(removed: Removed) -> tuple[Any, bool]:
    """What the map shows: (blocks, columns) of cycles, 0 for what stays; and whether columns are channels in order."""
    import numpy

    cycles = numpy.asarray(removed.channels)
    for block, cycle in enumerate(removed.layers):
        if cycle:
            cycles[block] = numpy.where(cycles[block] == 0, cycle, cycles[block])
    width = cycles.shape[1]
    if width <= MOST_COLUMNS:
        return cycles, True
    places = ((numpy.arange(MOST_COLUMNS) + 0.5) * width / MOST_COLUMNS).astype(int)
    return numpy.sort(cycles, axis=1)[:, places], False
