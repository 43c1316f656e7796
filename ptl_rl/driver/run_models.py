"""The models that a run began with: hashed into its folder once, and held against what lies there at every resume.

A name can mean other weights by then: a branch of a hub moves, a folder is written anew, this package ships others.
"""

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ptl_rl.checkpoints.companions import COMPANIONS
from ptl_rl.config import ConfigError
from ptl_rl.driver.journal import WHOLE_BYTES, fingerprint, sync_folder
from ptl_rl.driver.node_facts import weights_hash
from ptl_rl.driver.run_folder import RunFolder

WEIGHTS = ".safetensors"
READ = ("config.json", f"*{WEIGHTS}", *COMPANIONS)
"""What loading reads of a model's folder."""


class Model(BaseModel):
    """One of a run's models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    files: dict[str, str]
    """Hash of every file that loading reads, by name."""


class Models(BaseModel):
    """``models.json`` of a run, by setting."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, Model]


def _hash(path: Path) -> str:
    """Of every bit up to 64 MiB; of larger weights, of the header and samples."""
    large = path.suffix == WEIGHTS and path.stat().st_size > WHOLE_BYTES
    return weights_hash(str(path)) if large else fingerprint(path)


def _model(folder: Path) -> Model:
    read = sorted({path for pattern in READ for path in folder.glob(pattern) if path.is_file()})
    return Model(folder=str(folder.resolve()), files={path.name: _hash(path) for path in read})


def hold_models(folder: RunFolder, models: dict[str, Path], *, begun: bool) -> str | None:
    """Write down the files of ``models`` (setting to folder); where a run has begun with others, refuse.

    Args:
        begun: a stage has finished. Before that the record is made anew.

    Returns:
        What is to be said, of a run of an earlier version, which has no record: it gets one, and nothing was compared.

    Raises:
        ConfigError: a model is not what the run began with, or the record cannot be read.
    """
    found, record = Models(models={setting: _model(path) for setting, path in models.items()}), folder.models
    if not begun or not record.exists():
        unfinished = record.with_name(".models.tmp")
        with unfinished.open("w") as file:
            file.write(json.dumps(found.model_dump(), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(record)
        sync_folder(record.parent)
        if not begun:
            return None
        return "the run has no record of its models, so whether they are what it began with was not checked"
    try:
        before = Models.model_validate_json(record.read_bytes()).models
    except (OSError, ValidationError):
        raise ConfigError(
            f"{record}: cannot be read; delete it if the run's models are what they were, or start a new run"
        ) from None
    for setting, model in found.models.items():
        was = before.get(setting, Model(folder="none", files={}))
        if others := sorted(n for n in {*model.files, *was.files} if model.files.get(n) != was.files.get(n)):
            elsewhere = "" if was.folder == model.folder else f", and it was in {was.folder}"
            raise ConfigError(
                f"{folder.path}: {setting}: {model.folder} is not the model that this run began with "
                f"({', '.join(others)} changed since{elsewhere}); put it back as it was, or start a new run"
            )
    return None
