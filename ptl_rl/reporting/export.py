"""``ptl export``: the final model of a run as a folder to keep, load and publish."""

import shutil
from pathlib import Path

from ptl_rl.checkpoints.companions import copy_companions, write_config
from ptl_rl.checkpoints.write import convert_weights
from ptl_rl.config import ConfigError
from ptl_rl.driver.run_folder import RunFolder
from ptl_rl.errors import check_new_folder, resolved
from ptl_rl.reporting.model_card import LICENCE, card, parent_card
from ptl_rl.reporting.run_data import RunData


def export_model(run_dir: Path, out: Path, *, name: str, licence: str | None = None, dtype: str | None = None) -> None:
    """Copy the last accepted checkpoint of a run to ``out``, with a card.

    Args:
        dtype: of the weights there. Default: ``model.dtype`` of the run, in which it generates and was evaluated;
            recovery keeps its own copy in float32.

    Raises:
        ConfigError: no run, no accepted cycle, or ``out`` holds something.
    """
    run, out = RunData(run_dir), resolved(out)
    if run.checkpoint is None:
        raise ConfigError(f"{run_dir}: no cycle was accepted, so there is no model but the original to export")
    if not (run.checkpoint / "config.json").exists():
        raise ConfigError(f"{run.checkpoint}: the journal names this checkpoint, but it is not there; put it back")
    for entry in run.entries:
        if entry.artefact and run.folder / entry.artefact == run.checkpoint:
            RunFolder(run.folder).check_unchanged(entry)
    check_new_folder(out)
    found = parent_card(run.config.model.parent or run.config.model.path)
    known = {"license": licence} if licence else {name: str(found[name]) for name in LICENCE if name in found}
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_companions(run.checkpoint, partial)
    dtype = dtype or run.config.model.dtype
    convert_weights(run.checkpoint, partial, dtype)
    write_config(run.checkpoint, partial, dtype)
    (partial / "README.md").write_text(card(run, name, known))
    if out.is_dir():
        out.rmdir()
    partial.replace(out)
