"""``ptl slicegpt``: a model with a narrower residual stream, as a folder.

vLLM and verl load it where this project is installed, transformers after :func:`ptl_rl.baselines.slicegpt.register`.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ptl_rl.baselines.slicegpt import NOTE
from ptl_rl.baselines.slicegpt.rotate import check, slice_stream
from ptl_rl.checkpoints.companions import copy_companions
from ptl_rl.checkpoints.read import check_finite
from ptl_rl.config import CalibrationConfig, ConfigError, ScoreConfig
from ptl_rl.data.corpora import load_corpus
from ptl_rl.data.encoding import encode_sequences
from ptl_rl.data.records import Record
from ptl_rl.errors import check_new_folder
from ptl_rl.families import read_config_json, read_prunable_shape, read_shape
from ptl_rl.models import check_readable, load_tokenizer, open_model, resolve_model
from ptl_rl.pruning.command import load_model
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.streaming import on_device
from ptl_rl.pruning.score.texts import texts_of


@dataclass(frozen=True)
class Sliced:
    """What came of it."""

    hidden_size: int
    source_hidden_size: int
    parameters: int
    source_parameters: int


def sliced_size(amount: str, width: int, alignment: int) -> int:
    """Units that stay of ``width``: ``amount`` is how many go, or a percentage; rounded to a multiple of ``alignment``.

    Raises:
        ConfigError: neither, or nothing would stay.
    """
    try:
        gone = width * float(amount[:-1]) / 100 if amount.endswith("%") else int(amount)
    except ValueError:
        raise ConfigError(f"`remove` {amount}: give a number of units, or a percentage as 25%") from None
    kept = int((width - gone) / alignment + 0.5) * alignment if gone else width
    if not 0 < kept <= width:
        raise ConfigError(f"`remove` {amount}: the residual stream has {width} units, and {kept} would stay")
    return kept


def slice_with_slicegpt(
    model: str,
    out: Path,
    config: ScoreConfig,
    *,
    remove: str,
    alignment: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sliced:
    """Write the sliced model of ``model`` into the empty or new folder ``out``.

    Raises:
        ConfigError: a model, data set or amount that cannot be used.
    """
    width = read_prunable_shape(resolve_model(model, weights=False, setting="model")).hidden_size
    hidden_size = sliced_size(remove, width, alignment)
    records = load_corpus(config.data, config.seed, config.max_bad_fraction)
    return slice_records(
        model,
        out,
        records,
        config.calibration,
        hidden_size=hidden_size,
        dtype=config.dtype,
        prompt_suffix=config.prompt_suffix,
        progress=progress,
    )


def slice_records(
    model: str,
    out: Path,
    records: Sequence[Record],
    calibration: CalibrationConfig,
    *,
    hidden_size: int,
    dtype: str,
    prompt_suffix: str = "",
    note: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sliced:
    """The same on records that are read already.

    Args:
        calibration: its sequences, max_tokens and batch_size.
        dtype: of the forward passes; the result has the checkpoint's own.
        note: goes into the folder's ``slicegpt.json``.
    """
    check_new_folder(out)
    folder, shape = open_model(model, prunable=True)
    check_readable(folder)
    check(AutoConfig.from_pretrained(folder))
    tokenizer = load_tokenizer(folder)
    check_finite(folder)
    loaded = load_model(folder, getattr(torch, dtype))
    texts = texts_of(records[: calibration.sequences], prompt_suffix)
    sequences = encode_sequences(tokenizer, texts.questions, texts.solutions, calibration.max_tokens)
    batches = batches_for_rank(sequences, calibration.batch_size, 0, 1, tokenizer.pad_token_id or 0, 1.0)
    sliced = slice_stream(loaded, list(on_device(batches, loaded.device)), hidden_size, progress=progress)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    sliced.to(getattr(torch, read_dtype(folder))).save_pretrained(partial)
    copy_companions(folder, partial)
    made = Sliced(hidden_size, shape.hidden_size, read_shape(partial).parameters, shape.parameters)
    facts = {"source": str(folder), "hidden_size": hidden_size, "source_hidden_size": shape.hidden_size}
    (partial / NOTE).write_text(json.dumps({**facts, **(note or {})}, indent=2) + "\n")
    if out.is_dir():
        out.rmdir()
    partial.replace(out)
    return made


def read_dtype(folder: Path) -> str:
    """What the weights of a checkpoint are saved in."""
    values = read_config_json(folder)
    return str(values.get("dtype") or values.get("torch_dtype") or "float32")
