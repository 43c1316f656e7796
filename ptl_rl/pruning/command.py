"""Scoring and slicing of one model in one process, without Ray: ``ptl score`` and ``ptl slice``."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from ptl_rl.attention import without_flash
from ptl_rl.checkpoints.read import check_finite, checkpoint_hash
from ptl_rl.checkpoints.write import write_tensors
from ptl_rl.config import ConfigError, ScoreConfig
from ptl_rl.data.corpora import load_corpus
from ptl_rl.data.encoding import Sequence, encode_sequences
from ptl_rl.errors import check_new_folder, check_writable
from ptl_rl.families import UnsupportedModelError, read_config_json, read_prunable_shape, read_shape
from ptl_rl.models import check_readable, load_tokenizer, open_model, resolve_model
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose.choice import aligned, make_plan
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.score.texts import Texts, general_texts, texts_of
from ptl_rl.pruning.slice.slicing import slice_checkpoint
from ptl_rl.pruning.slice.verify import check_difference, logit_difference

SCORES, PLAN, NEW_WEIGHTS = "scores.safetensors", "plan.json", "new_weights"
"""What ``ptl score`` leaves in its folder."""
CHECK_TEXTS = [
    "Mia has 14 marbles. She buys 3 bags with 6 marbles each and gives 8 away. How many marbles has she now?",
    "The train leaves at noon; by then everybody who wanted a seat had found one, and the platform was empty.",
]
Progress = Callable[[int, int], None]


def load_model(folder: Path, dtype: torch.dtype | str = "auto"):
    """A model to be scored, on the GPU where there is one, frozen.

    Raises:
        UnsupportedModelError: its files cannot be read, or do not fit its configuration.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = without_flash(read_config_json(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, SafetensorError) as error:  # what transformers raises for files that do not fit
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{folder}: transformers cannot load it: {reason}") from error
    return model.to(device).eval().requires_grad_(False)


def channels_to_remove(amount: str, width: int) -> int:
    """``amount`` is a number of channels, or a percentage of ``width``.

    Raises:
        ConfigError: neither, or as many as there are.
    """
    try:
        count = round(width * float(amount[:-1]) / 100) if amount.endswith("%") else int(amount)
    except (ValueError, OverflowError):
        raise ConfigError(f"`remove_channels` {amount}: give a number of channels, or a percentage as 25%") from None
    if not 0 <= count < width:
        raise ConfigError(f"`remove_channels` {amount}: each block has {width} channels, so 0 to {width - 1} can go")
    return count


def _check(config: ScoreConfig, layers: int, remove_layers: int) -> None:
    if not 0 <= remove_layers < layers:
        raise ConfigError(
            f"`remove_layers` {remove_layers}: the model has {layers} blocks, so 0 to {layers - 1} can go"
        )
    ids = config.criterion.layer_ids
    if any(layer >= layers for layer in ids):
        raise ConfigError(f"criterion.layer_ids {ids}: the model's {layers} blocks are 0..{layers - 1}")
    if ids and len(ids) != remove_layers:
        raise ConfigError(f"criterion.layer_ids names {len(ids)} blocks, but `remove_layers` is {remove_layers}")


def score_model(
    model: str,
    out: Path,
    config: ScoreConfig,
    *,
    remove_channels: str,
    remove_layers: int,
    alignment: int,
    progress: Progress = lambda done, total: None,
) -> tuple[PruningPlan, engine.Losses]:
    """Write scores, plan and compensated weights of ``model`` into ``out``.

    A model of the hub is fetched once all else is known to be usable.

    Args:
        model: as :func:`ptl_rl.models.resolve_model` takes it.
        remove_channels: as :func:`channels_to_remove` takes it.
        progress: called with batches read and batches to read.

    Raises:
        UserError: a model, data or setting that cannot be used.
    """
    check_writable(out)
    shape = read_prunable_shape(resolve_model(model, weights=False, setting="model"))
    _check(config, shape.num_hidden_layers, remove_layers)
    cut = engine.Removal(channels_to_remove(remove_channels, shape.intermediate_size), remove_layers)
    possible, notes = aligned(shape.intermediate_size, cut.channels, alignment)
    if cut.channels and not possible:
        raise ConfigError(f"`remove_channels` {remove_channels}: {notes[0]}")
    records = load_corpus(config.data, config.seed, config.max_bad_fraction)
    texts = texts_of(records[: config.calibration.sequences], config.prompt_suffix)
    general = general_texts(config.criterion, config.seed, config.max_bad_fraction)
    model_folder, _ = open_model(model, prunable=True)
    check_readable(model_folder)
    check_finite(model_folder)
    prunable, sequences, general_sequences = _prunable(model_folder, config, texts, general)
    out.mkdir(parents=True, exist_ok=True)
    sensitivity = config.calibration.token_weights == "sensitivity"
    total = engine.batches_to_read(prunable, config.criterion, cut, sequences, general_sequences)
    if config.criterion.compensate != "none":
        total += engine.batches_to_compensate(prunable, remove_layers, sequences, sensitivity=sensitivity)
    prunable.report(progress, total)
    scores = engine.score(
        prunable,
        config.criterion,
        cut,
        sequences,
        general=general_sequences,
        sensitivity=sensitivity,
        seed=config.seed,
    )
    plan = make_plan(
        scores,
        config.criterion,
        remove_channels=cut.channels,
        alignment=alignment,
        subset_hash="",
        source=model_folder.resolve(),
    )
    (out / PLAN).unlink(missing_ok=True)  # an earlier one would not go with what is written now
    write_tensors(scores.tensors(), out / SCORES)
    losses = engine.Losses()
    if plan.compensate != "none":
        losses = engine.compensate(prunable, plan, sequences, out / NEW_WEIGHTS, sensitivity=sensitivity)
    plan.save(out / PLAN)
    return plan, losses


def _prunable(
    folder: Path, config: ScoreConfig, texts: Texts, general: Texts
) -> tuple[engine.PrunableModel, list[Sequence], list[Sequence]]:
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, getattr(torch, config.dtype))
    prunable = engine.PrunableModel(
        model=model,
        family=read_shape(folder).family,
        source=folder,
        device=model.device,
        batch_size=config.calibration.batch_size,
        pad_token_id=tokenizer.pad_token_id or 0,
        prompt_weight=config.calibration.prompt_weight,
        moments_gib=config.calibration.moments_gib,
    )
    longest = config.calibration.max_tokens
    sequences, of_general = (
        encode_sequences(tokenizer, part.questions, part.solutions, longest) for part in (texts, general)
    )
    return prunable, sequences, of_general


def read_plan(path: Path) -> tuple[PruningPlan, Path]:
    """A plan, from its file or the folder that ``ptl score`` wrote, and where its compensated weights lie.

    Raises:
        ConfigError: no plan, or one whose weights are missing.
    """
    file = path / PLAN if path.is_dir() else path
    plan = PruningPlan.load(file)
    weights = file.parent / NEW_WEIGHTS
    if plan.compensate != "none" and not weights.is_dir():
        raise ConfigError(
            f"{file}: the plan compensates for what it removes, but {weights}, which `ptl score` writes beside it, is "
            "missing; score again, or set its compensate to none"
        )
    return plan, weights


def slice_model(
    model: str,
    plan_path: Path,
    out: Path,
    *,
    check: bool = True,
    progress: Progress = lambda done, total: None,
) -> float | None:
    """Write the sliced checkpoint; returns the largest relative difference from the masked original's logits.

    A model of the hub is fetched once the plan is known to be its own.

    Args:
        model: as :func:`ptl_rl.models.resolve_model` takes it.
        check: compare the logits, which loads both models in float32, one after the other.
        progress: called with tensors written and tensors to write.

    Raises:
        UserError: a plan that is not this model's, or a folder that is not empty.
        ExportError: the logits differ; a bug of this project.
    """
    plan, new_weights = read_plan(plan_path)
    check_new_folder(out)
    shape = read_prunable_shape(resolve_model(model, weights=False, setting="model"))
    found = (shape.num_hidden_layers, shape.intermediate_size)
    planned = (len(plan.keep_channels), plan.source_intermediate_size)
    if found != planned:
        raise ConfigError(
            f"{plan_path}: the plan is of a model with {planned[0]} blocks of {planned[1]} channels, but "
            f"{model} has {found[0]} of {found[1]}"
        )
    model_folder, _ = open_model(model, prunable=True)
    check_readable(model_folder)
    if plan.compensate != "none" and checkpoint_hash(model_folder) != plan.source_hash:
        raise ConfigError(
            f"{plan_path}: its compensated weights belong to {plan.source}, and {model} is another model; score "
            "that one"
        )
    tokenizer = load_tokenizer(model_folder)
    check_finite(model_folder)
    weights = new_weights if plan.compensate != "none" else None
    slice_checkpoint(model_folder, plan, out, new_weights=weights, progress=progress)
    plan.save(out / PLAN)
    if not check:
        return None
    difference = logit_difference(
        lambda folder: load_model(folder, torch.float32),
        shape.family,
        model_folder,
        plan,
        out,
        tokenizer,
        CHECK_TEXTS,
        weights,
    )
    check_difference(difference, out)
    return difference
