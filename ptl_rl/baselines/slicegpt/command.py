"""``ptl slicegpt``: a model with a narrower residual stream, as a folder.

vLLM and verl load it where this project is installed, transformers after :func:`ptl_rl.baselines.slicegpt.register`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ptl_rl.baselines.slicegpt.rotate import Basis, SliceGptError, check, slice_stream
from ptl_rl.config import ConfigError, ScoreConfig
from ptl_rl.data.corpora import DataError, load_corpus
from ptl_rl.data.encoding import encode_sequences
from ptl_rl.families import UnsupportedModelError, read_config_json, read_prunable_shape, read_shape
from ptl_rl.models import resolve_model
from ptl_rl.pruning.calibration import batches_for_rank
from ptl_rl.pruning.command import load_model
from ptl_rl.pruning.texts import texts_of

NOTE = "slicegpt.json"


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
        raise ConfigError(f"--remove {amount}: give a number of units, or a percentage as 25%") from None
    kept = int((width - gone) / alignment + 0.5) * alignment if gone else width
    if not 0 < kept <= width:
        raise ConfigError(f"--remove {amount}: the residual stream has {width} units, and {kept} would stay")
    return kept


def slice_with_slicegpt(
    model: str,
    out: Path,
    config: ScoreConfig,
    *,
    remove: str,
    alignment: int = 8,
    basis: Basis | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sliced:
    """Write the sliced model of ``model`` into the empty or new folder ``out``.

    Raises:
        ConfigError: a model, data set or amount that cannot be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder")
    try:
        folder = resolve_model(model, setting="MODEL")
        shape = read_prunable_shape(folder)
        hidden_size = sliced_size(remove, shape.hidden_size, alignment)
        records = load_corpus(config.data, config.seed, config.max_bad_fraction)
        texts = texts_of(records[: config.calibration.sequences], config.prompt_suffix)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        loaded = load_model(folder, getattr(torch, config.dtype))
        check(loaded.config)
    except (UnsupportedModelError, DataError, SliceGptError) as error:
        raise ConfigError(str(error)) from None
    sequences = encode_sequences(tokenizer, texts.questions, texts.solutions, config.calibration.max_tokens)
    device = next(loaded.parameters()).device
    batches = [
        batch._replace(ids_BT=batch.ids_BT.to(device), mask_BT=batch.mask_BT.to(device))
        for batch in batches_for_rank(sequences, config.calibration.batch_size, 0, 1, tokenizer.pad_token_id or 0, 1.0)
    ]
    sliced = slice_stream(loaded, batches, hidden_size, basis=basis, progress=progress)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    sliced.to(getattr(torch, read_dtype(folder))).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    made = Sliced(hidden_size, shape.hidden_size, read_shape(partial).parameters, shape.parameters)
    note = {"source": str(folder), "hidden_size": hidden_size, "source_hidden_size": shape.hidden_size}
    (partial / NOTE).write_text(json.dumps(note, indent=2) + "\n")
    if out.is_dir():
        out.rmdir()
    partial.replace(out)
    return made


def read_dtype(folder: Path) -> str:
    """What the weights of a checkpoint are saved in."""
    values = read_config_json(folder)
    return str(values.get("dtype") or values.get("torch_dtype") or "float32")
