"""``ptl export``: the final model of a run as a folder that says where it comes from."""

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from ptl_rl.config import ConfigError
from ptl_rl.reporting import summary
from ptl_rl.reporting.html import TEMPLATES
from ptl_rl.reporting.run_data import ACCEPTED, RunData

UNKNOWN = "unknown"
_OURS = ("verl_metrics.jsonl",)
"""Files of a checkpoint that are the run's, not the model's."""


def parent_card(parent: Path) -> dict[str, Any]:
    """The metadata on the card of the model that a run started from; nothing where it has none."""
    path = parent / "README.md"
    found = re.match(r"---\n(.*?)\n---", path.read_text(errors="replace"), re.DOTALL) if path.exists() else None
    try:
        values = yaml.safe_load(found.group(1)) if found else None
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, dict) else {}


def card(run: RunData, name: str, licence: str, parent: str) -> str:
    """The model card as markdown."""
    from jinja2 import Environment, FileSystemLoader

    first, final = run.rows[0], run.final
    interval = run.interval(final.cycle)
    cuts = [
        {
            "cycle": row.cycle,
            "layers": before.layers - row.layers,
            "channels": before.channels - row.channels,
            "recovery": ", ".join(_recoveries(run, row.cycle)),
            "accuracy": f"{row.accuracy:.1%}",
        }
        for before, row in _steps(run)
    ]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("model_card.md.j2").render(
        name=name,
        licence=licence,
        licence_unknown=licence == UNKNOWN,
        parent=parent,
        run=run,
        first=first,
        final=final,
        share=f"{final.parameters / first.parameters:.0%}",
        flops=f"{final.flops_per_token / first.flops_per_token:.0%}",
        interval=f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else "not known",
        problems=len(run.answers(final.cycle)),
        test=run.config.data.test.path,
        cuts=cuts,
        criterion=run.config.criterion,
        table=summary.markdown(run.entries),
    )


def _steps(run: RunData) -> list[tuple[summary.Row, summary.Row]]:
    """Accepted cycles, each with the row that it started from."""
    rows = [run.rows[0], *(row for row in run.rows[1:] if row.decision in ACCEPTED)]
    return list(itertools.pairwise(rows))


def _recoveries(run: RunData, cycle: int) -> list[str]:
    entries = [entry for entry in run.entries if entry.cycle == cycle and entry.stage == "recover"]
    return [f"{entry.metrics['steps']} steps of {entry.metrics.get('method', 'recovery').upper()}" for entry in entries]


def export_model(run_dir: Path, out: Path, *, name: str, licence: str | None = None) -> None:
    """Copy the last accepted checkpoint of a run to ``out``, with a card.

    Raises:
        ConfigError: no run, no accepted cycle, or ``out`` holds something.
    """
    run = RunData(run_dir)
    best = run.folder / "best"
    if not best.exists():
        raise ConfigError(f"{run_dir}: no cycle was accepted, so there is no model but the original to export")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder")
    from ptl_rl.models import resolve_model

    named = run.config.model.path
    try:
        known = parent_card(resolve_model(named, weights=False))
    except ConfigError:  # gone, or offline: the card then says so
        known = {}
    licence = licence or str(known.get("license") or UNKNOWN)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(best.resolve(), partial, ignore=shutil.ignore_patterns(*_OURS, "README.md"))
    (partial / "README.md").write_text(card(run, name, licence, named))
    if out.is_dir():
        out.rmdir()
    out.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, out)  # noqa: PTH105  (a folder)
