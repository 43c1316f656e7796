"""The models that a run began with: hashed into its folder once, and held against what lies there at every resume.

A name can mean other weights by then: a branch of a hub moves, a folder is written anew, this package ships others.
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ptl_rl.config import ConfigError
from ptl_rl.driver.node_facts import model_files
from ptl_rl.driver.run_folder import RunFolder

REMEDY = "put it back as it was, or start a new run"


class Models(BaseModel):
    """``models.json`` of a run: by setting, every file of the model with its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[str, dict[str, str]]


def hold_models(folder: RunFolder, models: dict[str, Path]) -> None:
    """Write down the files of ``models`` (setting to folder); where that was done before, compare.

    Weights are told apart without being read whole. A run of an earlier version gets its record when it is resumed.

    Raises:
        ConfigError: a model is not what the run began with, or the record cannot be read.
    """
    found = Models(files={setting: model_files(str(path)) for setting, path in models.items()})
    record = folder.models
    if not record.exists():
        unfinished = record.with_name(".models.tmp")
        unfinished.write_text(json.dumps(found.model_dump(), indent=1) + "\n")
        unfinished.replace(record)
        return
    try:
        begun = Models.model_validate_json(record.read_bytes())
    except (OSError, ValidationError):
        raise ConfigError(f"{record}: cannot be read; {REMEDY}") from None
    for setting, files in found.files.items():
        before = begun.files.get(setting, {})
        if others := sorted(name for name in {*files, *before} if files.get(name) != before.get(name)):
            raise ConfigError(
                f"{folder.path}: {setting}: {models[setting]} is not the model that this run began with "
                f"({', '.join(others)} changed since); {REMEDY}"
            )
