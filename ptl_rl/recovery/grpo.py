"""The stage ``recover`` with GRPO: verl's own trainer on this cycle's data, ending in an ordinary checkpoint."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ptl_rl.data import rollouts
from ptl_rl.data.corpora import Record
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.data.prompts import opens_thinking, prompt_ids
from ptl_rl.families import read_shape
from ptl_rl.models import load_tokenizer
from ptl_rl.recovery.checkpoints import Checkpoints, hand_over
from ptl_rl.recovery.follow import MetricsFollower
from ptl_rl.recovery.rl.outcome import Outcome
from ptl_rl.recovery.verl_config import ROLLOUTS, compose, render
from ptl_rl.stage import StageContext, is_in_place

METRICS = {
    "reward": "critic/score/mean",
    "response_tokens": "response_length/mean",
    "truncated": "response_length/clip_ratio",
    "entropy": "actor/entropy",
    "kl": "actor/kl_loss",
    "distillation_loss": "actor/distillation/loss",
    "grad_norm": "actor/grad_norm",
    "step_seconds": "timing_s/step",
    "cut_seconds": "timing_s/cut",
    "intermediate_size": "pruning/intermediate_size",
    "damage": "pruning/damage",
    "patience_left": "pruning/patience_left",
    "learnable_fraction": "pruning/learnable_fraction",
    "tokens": "perf/total_num_tokens",
    "tokens_per_second": "perf/throughput",
}
"""Our names of what verl logs at every step."""


def write_prompts(records: Sequence[Record], suffix: str, path: Path) -> None:
    """A parquet file in verl's prompt schema."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "data_source": record.source,
            "prompt": [{"role": "user", "content": record.question + suffix}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": record.answer},
            "extra_info": {"index": index, "id": record.id},
        }
        for index, record in enumerate(records)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _select(data: dict[str, Any]) -> dict[str, float]:
    chosen = {name: float(data[key]) for name, key in METRICS.items() if key in data}
    if "cut_seconds" in chosen:  # a cut between two steps says nothing of how long the others will take
        chosen["step_seconds"] -= chosen["cut_seconds"]
    for key, value in data.items():
        if key.startswith("val-") and "/acc" in key and "mean@" in key:
            chosen["validation_accuracy"] = float(value)
    return chosen


def _prepare(context: StageContext) -> tuple[Sequence[Record], Path]:
    config, spec = context.config, context.spec
    records = partition(context.data.training(), spec.subsets)[spec.subset]
    validation = context.data.evaluation("validation")
    if not context.recovery.save_every_steps and not is_in_place(config, spec):
        shutil.rmtree(spec.work, ignore_errors=True)
    spec.work.mkdir(parents=True, exist_ok=True)
    write_prompts(records, config.prompt_suffix, spec.work / "train.parquet")
    write_prompts(validation, config.prompt_suffix, spec.work / "validation.parquet")
    return records, spec.work / "metrics.jsonl"


def _user_keys(context: StageContext, record: Record) -> dict[str, str] | None:
    """Keys that a user's reward returns beside the score, so that samples on which it raises have the same ones."""
    from reward.check import RewardError, reward_keys

    settings = context.config.reward
    if settings.file is None:
        return None
    try:
        sample = record.reward_sample()
        return reward_keys(settings.file, settings.name, sample, limit_seconds=settings.call_seconds)
    except RewardError as error:  # it worked when the run began: then every worker learns the keys as it goes
        print(f"the reward function fails on the first sample of this cycle: {error}")
        return None


def _keep_rollouts(context: StageContext, records: Sequence[Record]) -> None:
    """Leave the policy's latest rewarded responses beside its checkpoint, for the next cycle's scoring."""
    from transformers import AutoTokenizer

    config, spec = context.config, context.spec
    tokenizer = AutoTokenizer.from_pretrained(spec.source, trust_remote_code=config.model.trust_remote_code)

    def prompt_of(record: Record) -> str:
        ids = prompt_ids(tokenizer, record.question + config.prompt_suffix)
        return tokenizer.decode(ids, skip_special_tokens=True)

    def is_whole(response: str) -> bool:
        return len(tokenizer.encode(response, add_special_tokens=False)) < config.data.max_response_tokens

    try:
        kept = rollouts.keep_latest(spec.work / ROLLOUTS, records, prompt_of, is_whole, config.calibration.sequences)
    except (OSError, ValueError, KeyError) as error:  # what was trained counts more than what is scored on next
        print(f"the rollouts of this recovery cannot be kept, worked solutions take their place: {error!r}")
        return
    if not kept:
        print(
            "no rollout of this recovery was whole, rewarded and to a known prompt; worked solutions take their place"
        )
    rollouts.save(kept, spec.out)


def _train(records: Sequence[Record], context: StageContext, follower: MetricsFollower, more: dict[str, Any]) -> None:
    """Have verl train; ``more`` are verl keys beside those of the stage."""
    os.environ["VERL_FILE_LOGGER_PATH"] = str(follower.path)
    context.connect_ray()
    keys, shape = _user_keys(context, records[0]), read_shape(context.spec.source)
    opened = opens_thinking(load_tokenizer(context.spec.source, context.config.model.trust_remote_code))
    settings = render(context.config, context.spec, keys, shape, opened)
    verl_config = compose({**settings, **more})
    from verl.trainer.main_ppo import run_ppo

    from ptl_rl.recovery.rl.runner import Runner

    follower.start()
    try:
        run_ppo(verl_config, task_runner_class=Runner)
    finally:
        follower.finish()


def recover(context: StageContext) -> dict:
    """Train ``spec.steps`` GRPO steps from ``spec.source``; ``spec.out`` becomes the recovered checkpoint.

    The metrics hold one list entry per step (``curve``) and verl's validation accuracy before the first step.
    """
    spec = context.spec
    records, metrics_path = _prepare(context)
    follower = MetricsFollower(context, metrics_path, _select)
    facts: dict[str, Any] = {"notes": [], "steps": spec.steps}
    if is_in_place(context.config, spec):
        from ptl_rl.recovery.in_place.finish import slice_trained, train_in_place

        follower, outcome = train_in_place(context, follower, partial(_train, records), "actor")
        facts = facts | slice_trained(context, outcome)
    else:
        checkpoints = Checkpoints(spec.work / "checkpoints", spec.steps, "actor")
        if not checkpoints.are_finished() and Outcome.load(spec.work) is None:
            _train(records, context, follower, {})
        if (ended := Outcome.load(spec.work)) is not None:
            hand_over(spec.work / ended.folder, spec.out)
            facts |= {"steps": ended.steps, "notes": [ended.why], "learns": ended.learns}
        else:
            checkpoints.hand_over(spec.out)
    follower.save(spec.out / "verl_metrics.jsonl")
    if context.config.calibration.source != "corpus":
        _keep_rollouts(context, records)
    curve = [row for row in follower.curve if row["step"] <= facts["steps"]]
    before = next(
        (row["validation_accuracy"] for row in curve if row["step"] == 0 and "validation_accuracy" in row),
        None,
    )
    last = curve[-1] if curve else {}
    return {
        "method": context.recovery.method,
        "subset_hash": subset_hash(records),
        # In place it is measured before the first cut, and says nothing of what one costs.
        "validation_accuracy_before": None if is_in_place(context.config, spec) else before,
        "reward_last": last.get("reward"),
        "curve": curve,
        **facts,
        "notes": [*follower.gap(facts["steps"]), *facts["notes"]],
    }
