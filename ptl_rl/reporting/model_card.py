"""The card of a run's final model: where it comes from, what was removed, what it can do, whose licence holds."""

import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import yaml

from ptl_rl.families import BASELINES
from ptl_rl.reporting import summary
from ptl_rl.reporting.html import TEMPLATES
from ptl_rl.reporting.run_data import ACCEPTED, RunData

LICENCE = ("license", "license_name", "license_link")


def parent_card(model: str) -> dict[str, Any]:
    """The metadata on the card of the model that a run started from; nothing where it has none, or cannot be had."""
    path = Path(model).expanduser() / "README.md"
    if not path.exists() and is_hub_id(model):
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(Exception):  # the hub client raises many kinds; without a card there is no licence
            path = Path(hf_hub_download(model, "README.md"))
    found = re.match(r"---\n(.*?)\n---", path.read_text(errors="replace"), re.DOTALL) if path.exists() else None
    try:
        values = yaml.safe_load(found.group(1)) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    return values if isinstance(values, dict) else {}


def is_hub_id(model: str) -> bool:
    """Whether a model is named as the hub names it."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).expanduser().exists()


def metadata(run: RunData, licence: dict[str, str], parent: str) -> str:
    """The card's YAML header, in the hub's terms."""
    values: dict[str, Any] = {name: licence[name] for name in LICENCE if name in licence}
    if is_hub_id(parent):
        values |= {"base_model": parent, "base_model_relation": "finetune"}
    pruned = ["pruned"] if _steps(run) and not run.config.schedule.recover_only else []
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return yaml.safe_dump(values | {"tags": ["ptl-rl", *pruned, "reasoning"]}, sort_keys=False)


def card(run: RunData, name: str, licence: dict[str, str]) -> str:
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
    start = run.config.model.parent or run.config.model.path
    metrics = [entry.metrics for entry in run.entries if entry.stage == "evaluate" and entry.cycle == final.cycle]
    return environment.get_template("model_card.md.j2").render(
        metadata=metadata(run, licence, start),
        name=name,
        licence=licence.get("license_name") or licence.get("license"),
        parent=start if is_hub_id(start) or start.startswith("testbed") else Path(start).name,
        cut_before=run.config.model.parent is not None,
        first=first,
        final=final,
        share=f"{final.parameters / first.parameters:.0%}",
        flops=f"{final.flops_per_token / first.flops_per_token:.0%}",
        interval=f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else None,
        problems=metrics[-1]["problems"],
        test=_test_name(run),
        cuts=cuts,
        channels_went=final.channels < first.channels,
        blocks_went=final.layers < first.layers,
        stock=_is_stock(run),
        criterion=run.config.criterion,
        table=summary.markdown(run.entries),
    )


def _test_name(run: RunData) -> str:
    """What the model was judged on, in Markdown."""
    source = run.config.evaluation_set("test")
    if source is not None:
        return f"`{_short(source.path)}`"
    _, sources = run.config.data.learnt(run.config.needs_answers)
    return f"{', '.join(f'`{_short(own.path)}`' for own in sources if not own.is_made)}, held out of training,"


def _short(path: str) -> str:
    return path if ":" in path else Path(path).name


def _is_stock(run: RunData) -> bool:
    """Whether plain transformers load the model."""
    assert run.checkpoint is not None
    model_type = json.loads((run.checkpoint / "config.json").read_text()).get("model_type")
    return model_type not in BASELINES


def _steps(run: RunData) -> list[tuple[summary.Row, summary.Row]]:
    """Accepted cycles, each with the row that it started from."""
    rows = [run.rows[0], *(row for row in run.rows[1:] if row.decision in ACCEPTED)]
    return list(itertools.pairwise(rows))


def _recoveries(run: RunData, cycle: int) -> list[str]:
    entries = [entry for entry in run.entries if entry.cycle == cycle and entry.stage == "recover"]
    return [f"{entry.metrics['steps']} steps of {entry.metrics.get('method', 'recovery').upper()}" for entry in entries]
