"""The stage ``recover`` with continued pre-training: verl's SFT trainer on this cycle's worked solutions."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from ptl_rl.attention import FLASH, without_flash
from ptl_rl.config import ConfigError, CptConfig
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.families import read_config_json
from ptl_rl.recovery.checkpoints import Checkpoints
from ptl_rl.recovery.follow import MetricsFollower
from ptl_rl.recovery.in_place.cuts import steps_with_cuts
from ptl_rl.recovery.sequences import Counts, write_sequences
from ptl_rl.recovery.sft_config import compose_sft, render_sft
from ptl_rl.stage import StageContext, is_in_place

METRICS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/lr",
    "tokens": "train/global_tokens",
    "parent_kl": "parent_kl",
}
"""Our names of what verl logs at every step."""


def _select(data: dict[str, Any]) -> dict[str, float]:
    return {name: _mean(data[key]) for name, key in METRICS.items() if key in data}


def _mean(value: Any) -> float:
    """verl logs some metrics as lists, of micro-batches and of workers."""
    if not isinstance(value, list):
        return float(value)
    return sum(map(_mean, value)) / len(value) if value else 0.0


def _parent_loss(context: StageContext, recovery: CptConfig):
    from ptl_rl.recovery.parent import ParentLoss

    model = context.config.model
    attention = context.spec.attention
    if attention == "sdpa":  # which suits the policy; the parent may have a soft cap of its own
        attention = without_flash(read_config_json(context.spec.parent))
    return ParentLoss(context.spec.parent, recovery.parent_kl, recovery.cross_entropy, attention, model.dtype)


def batch_sequences(recovery: CptConfig, counts: Counts, workers: int, rows: int = 1) -> int:
    """Sequences of a step, a multiple of ``workers``.

    Args:
        rows: most padded rows of a micro-batch; a batch in tokens is rounded so that they divide a worker's part.

    Raises:
        ConfigError: the subset has fewer.
    """
    batch = recovery.sequences_per_step
    if recovery.tokens_per_step is not None:
        mean = counts.tokens / max(1, counts.sequences)
        of_worker = recovery.tokens_per_step / mean / workers
        batch = max(1, round(of_worker / rows) * rows if of_worker >= rows else round(of_worker)) * workers
    if counts.sequences < batch:
        raise ConfigError(
            f"recovery: a step reads {batch} sequences, but this cycle's subset has {counts.sequences}; give more "
            "data, fewer cycles or smaller steps"
        )
    return batch


def _prepare(context: StageContext, recovery: CptConfig) -> tuple[Path, Counts, str]:
    from transformers import AutoTokenizer

    config, spec = context.config, context.spec
    if not recovery.save_every_steps and not is_in_place(config, spec):
        shutil.rmtree(spec.work, ignore_errors=True)
    spec.work.mkdir(parents=True, exist_ok=True)
    records = partition(context.data.worked_solutions(), spec.subsets)[spec.subset]
    tokenizer = AutoTokenizer.from_pretrained(spec.source, trust_remote_code=config.model.trust_remote_code)
    path = spec.work / "sequences.arrow"
    counts = write_sequences(
        records,
        tokenizer,
        path,
        suffix=config.prompt_suffix,
        max_tokens=recovery.max_tokens,
        response_only=recovery.loss == "response",
    )
    return path, counts, subset_hash(records)


def _train(sequences: Path, batch: int, context: StageContext, follower: MetricsFollower, more: dict[str, Any]) -> None:
    """Have verl train; ``more`` are verl keys beside those of the stage."""
    recovery = context.recovery
    assert isinstance(recovery, CptConfig)
    os.environ["VERL_FILE_LOGGER_PATH"] = str(follower.path)
    context.connect_ray()
    verl_config = compose_sft({**render_sft(context.config, recovery, context.spec, sequences, batch), **more})
    loss = _parent_loss(context, recovery) if recovery.parent_kl else None
    follower.start()
    try:
        if is_in_place(context.config, context.spec):
            from ptl_rl.recovery.in_place.supervised import CuttingSequenceTrainer

            CuttingSequenceTrainer(verl_config, context, loss).fit()
        else:
            from ptl_rl.recovery.trainer import SequenceTrainer

            SequenceTrainer(verl_config, loss).fit()
    finally:
        follower.finish()


def recover(context: StageContext) -> dict:
    """Train ``spec.steps`` steps from ``spec.source``; ``spec.out`` becomes the recovered checkpoint.

    The metrics hold one list entry per step (``curve``) and what was read.
    """
    config, spec, recovery = context.config, context.spec, context.recovery
    assert isinstance(recovery, CptConfig)
    path, counts, data_hash = _prepare(context, recovery)
    padded = max(1, recovery.micro_batch_tokens // recovery.max_tokens)
    rows = 1 if spec.attention == FLASH else padded
    batch = batch_sequences(recovery, counts, config.resources.workers, rows)
    in_place = is_in_place(config, spec)
    counts_alone = (lambda step: step - 1 not in steps_with_cuts(spec.cuts)) if in_place else (lambda step: True)
    follower = MetricsFollower(context, spec.work / "metrics.jsonl", _select, timed=True, counts=counts_alone)
    train = partial(_train, path, batch)
    facts: dict[str, Any] = {"notes": []}
    if in_place:
        from ptl_rl.recovery.in_place.finish import slice_trained, train_in_place

        follower, outcome = train_in_place(context, follower, train)
        facts = slice_trained(context, outcome)
    else:
        checkpoints = Checkpoints(spec.work / "checkpoints", spec.steps)
        if not checkpoints.are_finished():
            train(context, follower, {})
        checkpoints.hand_over(spec.out)
    follower.save(spec.out / "verl_metrics.jsonl")
    curve = follower.curve
    notes = [f"{counts.cut} of {counts.documents} solutions were cut at max_tokens"] if counts.cut else []
    notes += [*follower.gap(), *facts["notes"]]
    return {
        "method": recovery.method,
        "steps": spec.steps,
        "subset_hash": data_hash,
        "sequences": counts.sequences,
        "sequences_per_step": batch,
        "epochs": spec.steps * batch / counts.sequences,
        "tokens": sum(row.get("tokens", 0.0) for row in curve),
        "loss_first": curve[0].get("loss") if curve else None,
        "loss_last": curve[-1].get("loss") if curve else None,
        "curve": curve,
        **facts,
        "notes": notes,
    }
