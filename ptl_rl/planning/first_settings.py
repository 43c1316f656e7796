"""Numbers for a first recipe by arithmetic alone: from a model's shape, the rows that there are, and the GPUs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ptl_rl.config import ConfigError, ScheduleConfig
from ptl_rl.data.records import Record
from ptl_rl.families import ModelShape
from ptl_rl.planning.hardware import GIB
from ptl_rl.planning.schedule import check_schedule

WIDEST_ALIGNMENT = 128
FEWEST_UNITS = 8
"""A width of fewer multiples of the alignment leaves too little choice of where to stop."""
SHARE_PER_CYCLE = 0.1
"""Of all FFN channels: small enough that a short recovery makes up for the cut."""
ENGINE_GIB = 32
"""Most weights of one vLLM engine, in bfloat16: they and a cache fit in its share of a GPU of 80 GB."""
STEPS_PER_CYCLE = 8
"""Fewer rows than so many full batches make the batches smaller, not the steps fewer."""
CHARACTERS_PER_TOKEN = 2.5
"""Fewer than most texts have, mathematics included, so that what is worked out from it is enough."""
TESTBED_CHARACTERS_PER_TOKEN = 1.3
"""Of texts that are not the test bed's own, with its vocabulary of 512."""
TEMPLATE_TOKENS = 64
"""For the chat template around a question."""


def channels_of(amount: str, width: int) -> float:
    """How many of ``width`` channels ``amount`` means: a percentage, or a number of them.

    Raises:
        ConfigError: neither, or nothing, or all.
    """
    try:
        share = amount.strip().endswith("%")
        count = width * float(amount.strip()[:-1]) / 100 if share else float(int(amount))
    except ValueError:
        raise ConfigError(f"`remove` {amount}: give a percentage as 50%, or a number of channels") from None
    if not 0 < count < width:
        raise ConfigError(
            f"`remove` {amount}: each layer has {width} FFN channels; more than none and fewer than all can go"
        )
    return count


def engine_gpus(shape: ModelShape, workers: int) -> int:
    """GPUs that share one vLLM engine: as few as hold the weights, of those numbers that divide ``workers``."""
    gib = 2 * shape.parameters / GIB
    possible = [n for n in (1, 2, 4, 8) if workers % n == 0 and shape.num_key_value_heads % n == 0]
    return next((n for n in possible if gib / n <= ENGINE_GIB), possible[-1])


def first_schedule(shape: ModelShape, remove: str, parallel: int) -> ScheduleConfig:
    """Cuts of about a tenth of the channels each, which come to ``remove`` as nearly as whole multiples can.

    Args:
        remove: as :func:`channels_of` takes it.
        parallel: GPUs that share one vLLM engine.

    Raises:
        ConfigError: not so many can go.
    """
    width = shape.intermediate_size
    wanted = channels_of(remove, width)
    alignments = [2**power for power in range(WIDEST_ALIGNMENT.bit_length() - 1, -1, -1)]
    whole = [alignment for alignment in alignments if width % (alignment * parallel) == 0]
    if not whole:
        raise ConfigError(f"{width} FFN channels per layer cannot be shared equally by {parallel} GPUs of an engine")
    alignment = next((a for a in whole if width // (a * parallel) >= FEWEST_UNITS), whole[-1])
    unit = alignment * parallel
    units = width // unit
    if units < 2:
        raise ConfigError(f"{width} FFN channels per layer are too few to remove any in multiples of {unit}")
    total = min(max(1, round(wanted / unit)), units - 1)
    step = max(1, round(SHARE_PER_CYCLE * units))
    step = math.ceil(total / max(1, round(total / step)))  # rather a little more than one cycle for a small rest
    schedule = ScheduleConfig(channels_per_cycle=step * unit, channels_total=total * unit, alignment=alignment)
    check_schedule(schedule, shape, unit)
    return schedule


@dataclass(frozen=True)
class Batches:
    """One pass over a cycle's rows."""

    per_step: int
    steps: int
    whole_pass: int
    """Steps that all rows would give; more than ``steps`` where these are bounded."""


def batches(rows: int, share: int, most_per_step: int, most_steps: int) -> Batches:
    """Divide ``rows`` into steps, of a power of two of rows where ``share`` allows.

    Args:
        share: what a step's rows must be a multiple of, so that workers share them equally; at most ``rows``.
    """
    wanted = min(most_per_step, max(1, rows // STEPS_PER_CYCLE))
    per_step = max(share, 2 ** int(math.log2(wanted)) // share * share)
    steps = rows // per_step
    return Batches(per_step, min(steps, most_steps), steps)


@dataclass(frozen=True)
class Workers:
    """Who shares the work."""

    count: int
    share: int
    """What the rows of a step must be a multiple of."""
    parallel: int
    """Of them, that share a vLLM engine."""
    on_gpus: bool


def worker_share(workers: int, rollouts: int) -> int:
    """Prompts of a step must be a multiple of this for their rollouts to be shared equally."""
    return workers // math.gcd(workers, rollouts)


@dataclass(frozen=True)
class Lengths:
    """Tokens that questions and responses may have."""

    prompt: int
    response: int


def lengths(records: Iterable[Record], characters_per_token: float, suffix: str, positions: int | None) -> Lengths:
    """Room for the longest of ``records``, and for responses twice as long as their solutions.

    Args:
        positions: that the model has, where it is known.
    """
    questions, solutions = zip(*((len(r.question), len(r.solution)) for r in records), strict=True)
    prompt = _rounded((max(questions) + len(suffix)) / characters_per_token + TEMPLATE_TOKENS, 128)
    response = _rounded(2 * max(solutions) / characters_per_token, 256)
    prompt, response = min(prompt, 4096), min(max(response, 512), 3072)
    if positions is not None:
        prompt = min(prompt, positions // 2)
        response = min(response, positions - prompt)
    return Lengths(prompt, response)


def _rounded(tokens: float, to: int) -> int:
    return math.ceil(tokens / to) * to
