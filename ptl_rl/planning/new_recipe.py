"""A first recipe for one's own model and data: what only this user can say, worked out.

What the recipe leaves out has a default. It is loaded as any recipe is before it takes its place, so that none is left
behind that ``ptl plan`` or ``ptl data`` would refuse.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ptl_rl.config import ConfigError, DataConfig, FieldMap, RewardConfig, RunConfig, SourceConfig
from ptl_rl.config.data import HUB, EvaluationSet, sister_split
from ptl_rl.config.recipe import load_config, named_source, parse_config
from ptl_rl.config.run import BOX_SUFFIX
from ptl_rl.data.columns import MBPP, TESTBED, Reading, read_columns
from ptl_rl.data.corpora import check_bad_rows
from ptl_rl.data.partition import partition
from ptl_rl.data.prepare import training_data
from ptl_rl.data.records import DataError, Progress, Record, no_progress
from ptl_rl.data.store import Store, open_store
from ptl_rl.errors import expanded
from ptl_rl.families import ModelShape
from ptl_rl.planning.first_settings import (
    CHARACTERS_PER_TOKEN,
    TESTBED_CHARACTERS_PER_TOKEN,
    Lengths,
    Workers,
    batches,
    engine_gpus,
    first_schedule,
    lengths,
    worker_share,
)
from ptl_rl.planning.hardware import gpus_of_this_machine
from ptl_rl.planning.model import PlannedModel, model_named
from ptl_rl.planning.recipe_text import Facts, Method, recipe_text
from ptl_rl.planning.schedule import planned_cuts
from ptl_rl.testbed import shipped_checkpoint

TESTBED_ROWS = 4096
SAMPLE = 500
"""Records whose lengths are looked at."""
ROLLOUTS: dict[Method, int] = {"grpo": 8, "distill": 1, "cpt": 1}
MOST: dict[Method, tuple[int, int]] = {"grpo": (128, 64), "distill": (128, 64), "cpt": (32, 2000)}
"""Rows of a step, and steps of a cycle."""
CPT_TOKENS = 1024
TEXT_LENGTHS = Lengths(prompt=512, response=1024)
"""Of the problems that a model is judged by while it reads plain text."""
TESTBED_LENGTHS = Lengths(prompt=144, response=120)
"""Of the test bed's own problems, with its own models."""
CALIBRATION_TOKENS = 2048
PROGRAMS = TESTBED + "programs-"


@dataclass(frozen=True)
class Wishes:
    """What ``ptl init`` is told."""

    model: str
    data: str
    recovery: Method = "grpo"
    remove: str = "50%"
    """Of each layer's FFN channels: a percentage or a number."""
    reward: str | None = None
    """A Python file, or one and its function as ``FILE:FUNCTION``, or ``code``."""
    gpus: int | None = None
    """Default: those of this machine."""
    fields: FieldMap | None = None
    """Default: by the names of the columns."""


def new_recipe(wishes: Wishes, progress: Progress = no_progress) -> str:
    """The text of a recipe; all that it names is looked at.

    Raises:
        ConfigError: a model, reward or amount that cannot be used.
        DataError: data that cannot be read, or do not do for what is wished.
    """
    model = model_named(wishes.model, setting="`model`")
    workers = _workers(wishes, model.shape)
    facts = _facts(wishes, model, workers, progress)
    draft = replace(facts, batches=batches(workers.share, workers.share, workers.share, 1))
    config = parse_config(yaml.safe_load(recipe_text(draft)), "the new recipe")
    data = training_data(config, progress)
    smallest = min(map(len, partition(data, facts.cycles))) if len(data) >= facts.cycles else 0
    _check_enough(wishes.data, len(data), smallest, facts.cycles, workers)
    sample = list(data[:SAMPLE])
    if facts.reward is not None:
        _try_reward(facts.reward, next((record for record in sample if record.answer), None))
    room = _lengths(wishes, model, facts, sample)
    sequences = 1 if sample[0].question else math.ceil(_mean_tokens(sample) / facts.max_tokens)
    found = batches(smallest * sequences, workers.share, *MOST[wishes.recovery])
    return recipe_text(replace(facts, rows=len(data), subset=smallest, batches=found, lengths=room))


def write_recipe(text: str, out: Path, *, force: bool = False) -> RunConfig:
    """Load the recipe and put it at ``out``, whole or not at all; returns what it says.

    Raises:
        ConfigError: there is such a file, or none can be written there.
    """
    check_out(out, force=force)
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        unfinished.write_text(text)
        config = load_config(unfinished)
        check_out(out, force=force)
        unfinished.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return config


def check_out(out: Path, *, force: bool = False) -> None:
    """Raise :class:`ConfigError` where a recipe may not be written."""
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; name a file, as {out / 'recipe.yaml'}")
    if out.exists() and not force:
        raise ConfigError(f"{out}: exists; choose another name, or set `force` to replace it")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}")


def _workers(wishes: Wishes, shape: ModelShape) -> Workers:
    gpus = gpus_of_this_machine() if wishes.gpus is None else wishes.gpus
    count = gpus or 1
    trainers = count - 1 if wishes.recovery == "distill" and gpus else count  # one GPU serves the parent
    if not trainers:
        raise ConfigError("distill needs a GPU for the unpruned parent beside those that train, so two at least")
    share = worker_share(trainers, ROLLOUTS[wishes.recovery])
    return Workers(count, share, engine_gpus(shape, math.gcd(count, trainers)), on_gpus=bool(gpus))


def _facts(wishes: Wishes, model: PlannedModel, workers: Workers, progress: Progress) -> Facts:
    """All but what the rows' number and lengths decide."""
    schedule = first_schedule(model.shape, wishes.remove, workers.parallel)
    cycles = len(planned_cuts(schedule))
    reading, store = _reading(wishes, progress)
    _check_enough(wishes.data, len(store.records), len(store.records) // cycles, cycles, workers)
    answered = bool(store.has("answer").any())
    reward = _reward(wishes, reading.source)
    programs = reward is not None and reward.path == "code"
    is_testbed = shipped_checkpoint(wishes.model) is not None
    evaluation, why = _evaluation(wishes.data, answered)
    positions = model.values.get("max_position_embeddings") or CALIBRATION_TOKENS
    return Facts(
        name=_name(wishes),
        model=wishes.model if is_testbed else _absolute(wishes.model),
        is_testbed=is_testbed,
        width=model.shape.intermediate_size,
        schedule=schedule,
        cycles=cycles,
        data=Path(wishes.data).name,
        train=_train(reading.source),
        noticed=reading.noticed,
        evaluation=evaluation,
        evaluation_why=why,
        recovery=wishes.recovery,
        max_tokens=min(CPT_TOKENS, positions),
        calibration_tokens=positions if positions < CALIBRATION_TOKENS else None,
        suffix="" if is_testbed or programs else BOX_SUFFIX,
        reward=reward,
        workers=workers,
    )


def _reading(wishes: Wishes, progress: Progress) -> tuple[Reading, Store]:
    """How the data are read, and their rows, which have answers if the recovery needs them."""
    reading = read_columns(named_source(wishes.data, "`data`").path, wishes.fields)
    if wishes.data.startswith(TESTBED):
        reading = replace(reading, source=SourceConfig(path=wishes.data, rows=TESTBED_ROWS))
    store = open_store(reading.source, 0, progress)
    check_bad_rows(store, DataConfig().max_bad_fraction)
    if not store.has("answer").any() and wishes.recovery != "cpt":
        there = f" among {', '.join(reading.columns)}" if reading.columns else ""
        fields = reading.source.fields or FieldMap()
        if fields.text is not None:
            fields = FieldMap(question="COLUMN", solution="COLUMN")
        raise DataError(
            f"{wishes.data}: no answers{there}, and without them no response can be judged, so RL "
            f"({wishes.recovery}) is impossible; continued pre-training needs none: `recovery` cpt. If a column holds "
            f"them, name it: `fields` '{{question: {fields.question}, solution: {fields.solution}, answer: COLUMN}}'"
        )
    return reading, store


def _train(source: SourceConfig) -> dict[str, Any]:
    train: dict[str, Any] = source.model_dump(exclude_defaults=True) | {"path": _absolute(source.path)}
    if source.fields is not None:
        train["fields"] = source.fields.model_dump(exclude_defaults=True)
    return train


def _absolute(name: str) -> str:
    """A path of this machine in full, as a run may be resumed from another folder; any other name as it is."""
    path = expanded(name)
    return name if name.startswith((HUB, TESTBED)) or not path.exists() else str(path.absolute())


def _name(wishes: Wishes) -> str:
    data = Path(wishes.data.removeprefix(TESTBED)).name
    for ending in (".jsonl", ".parquet", ".arrow"):
        data = data.removesuffix(ending)
    parts = [Path(wishes.model).name, data]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-") or "run"


def _evaluation(data: str, answered: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """Sources of validation and test for data that cannot give rows of their own, and why."""
    rows: dict[EvaluationSet, int] = {"validation": 128, "test": 500}
    sets: dict[str, dict[str, Any]] = {
        name: {"path": sister_split(data, name), "rows": count} for name, count in rows.items()
    }
    if data.startswith(TESTBED):
        return sets, "The test bed's own problems, none of which is in its other splits."
    if not answered:
        return (
            sets,
            "Your data have no answers to be judged by. These are made-up word problems: name problems of your own.",
        )
    return {}, ""


def _reward(wishes: Wishes, source: SourceConfig) -> RewardConfig | None:
    """The reward that is asked for, or that programs need."""
    asked = wishes.reward
    if asked is None:
        is_code = source.layout == MBPP or source.path == HUB + MBPP or source.path.startswith(PROGRAMS)
        return RewardConfig(path="code") if is_code else None
    file, colon, function = asked.rpartition(":")
    if not colon or expanded(asked).is_file():
        return RewardConfig(path=asked)
    if not function.isidentifier():
        raise ConfigError(f"reward {asked}: {function!r} is not the name of a function; write FILE.py:FUNCTION")
    return RewardConfig(path=file, name=function)


def _try_reward(reward: RewardConfig, sample: Record | None) -> None:
    """Load the function and, where a record has an answer, call it once."""
    from reward.check import RewardError, check_loads, check_reward_function

    assert reward.file is not None
    try:
        if sample is None:
            check_loads(reward.file, reward.name)
        else:
            check_reward_function(reward.file, reward.name, sample.reward_sample())
    except RewardError as error:
        raise ConfigError(f"reward: {error}") from None


def _lengths(wishes: Wishes, model: PlannedModel, facts: Facts, sample: list[Record]) -> Lengths:
    """Tokens of questions and responses."""
    is_text = not sample[0].question
    if facts.is_testbed and (is_text or wishes.data.startswith(TESTBED)):
        return TESTBED_LENGTHS
    if is_text:
        return TEXT_LENGTHS
    per_token = TESTBED_CHARACTERS_PER_TOKEN if facts.is_testbed else CHARACTERS_PER_TOKEN
    return lengths(sample, per_token, facts.suffix, model.values.get("max_position_embeddings"))


def _mean_tokens(sample: list[Record]) -> float:
    return sum(len(record.solution) for record in sample) / len(sample) / CHARACTERS_PER_TOKEN


def _check_enough(data: str, rows: int, smallest: int, cycles: int, workers: Workers) -> None:
    """Raise :class:`DataError` for fewer rows than each cycle needs for one step."""
    if smallest < workers.share:
        raise DataError(
            f"{data}: the number of rows that can be used is {rows}, but each of {cycles} cycles needs at least "
            f"{workers.share} of its own; give more rows, or remove less"
        )
