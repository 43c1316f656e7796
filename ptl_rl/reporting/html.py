"""One self-contained page about one run or several: nothing in it is fetched from anywhere."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl_rl.reporting import figures, summary
from ptl_rl.reporting.compare import comparison
from ptl_rl.reporting.run_data import Example, RunData

TEMPLATES = Path(__file__).parent / "templates"
MOST_CHARACTERS = 1500
COLOURS = {"broken": "bad", "gained": "good"}


def _source(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _sources(draw: Callable[[float], str | None]) -> dict[str, str] | None:
    """A figure for wide and for narrow windows; None if there is nothing to draw."""
    drawn = {"wide": draw(figures.WIDE), "narrow": draw(figures.NARROW)}
    found = {name: _source(svg) for name, svg in drawn.items() if svg is not None}
    return found or None


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " […]"


def _example(example: Example) -> dict[str, str]:
    return {
        "kind": example.kind,
        "colour": COLOURS.get(example.kind, "soft"),
        "question": _cut(example.original.question),
        "expected": _cut(example.original.expected),
        "original": _cut(example.original.text),
        "final": _cut(example.final.text),
    }


def _cards(run: RunData) -> list[dict[str, str]]:
    first, final = run.rows[0], run.final
    low_high = run.interval(final.cycle)
    against = run.against_original(final.cycle)
    cards = [
        ("accuracy", f"{final.accuracy:.1%}", f"{low_high[0]:.1%} to {low_high[1]:.1%}" if low_high else ""),
        (f"accuracy of the {run.start}", f"{first.accuracy:.1%}", ""),
        ("of the parameters", f"{final.parameters / first.parameters:.0%}", f"{final.parameters:,}"),
        ("of the FLOPs per token", f"{final.flops_per_token / first.flops_per_token:.0%}", ""),
        ("tokens per second", f"{final.tokens_per_second / first.tokens_per_second:.2f}x", "while evaluating"),
    ]
    if against is not None:
        note = f"p = {against.p_value:.2g}; {against.gained} gained, {against.lost} lost"
        cards.append(("points, paired", f"{100 * against.difference:+.1f}", note))
    return [{"label": label, "value": value, "note": note} for label, value, note in cards]


def _run(run: RunData) -> dict[str, Any]:
    removed = run.removed
    drawn = [
        ("Accuracy against size, cycle by cycle", _sources(lambda width: figures.accuracy_by_size([run], width))),
        ("How long each stage took", _sources(lambda width: figures.time_line(run, width))),
        ("Recovery, step by step", _sources(lambda width: figures.recovery_curves(run, width))),
        (
            "Which channels and blocks of the original went, and in which cycle",
            _sources(lambda width: figures.removal_map(removed, width)) if removed else None,
        ),
    ]
    return {
        "name": run.name,
        "model": run.config.model.path,
        "recoveries": ", ".join(method.upper() for method in run.methods),
        "start": run.start,
        "cards": _cards(run),
        "table": [summary.cells(row, run.rows[0], run.start) for row in run.rows],
        "figures": [{"caption": caption} | sources for caption, sources in drawn if sources],
        "notes": run.notes,
        "examples": [_example(example) for example in run.examples()],
        "config": [(key, "" if value is None else str(value)) for key, value in run.flat_config()],
        "versions": sorted(run.versions.items()),
    }


def page(runs: list[RunData]) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    title = f"{runs[0].config.name}: report" if len(runs) == 1 else f"{len(runs)} runs compared"
    compared = None
    if len(runs) > 1:
        figure = _sources(lambda width: figures.accuracy_by_size(runs, width))
        compared = {"rows": comparison(runs), "figure": figure}
    template = environment.get_template("report.html.j2")
    return template.render(title=title, runs=[_run(run) for run in runs], compared=compared)
