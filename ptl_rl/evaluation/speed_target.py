"""How many channels must go for a model to generate so many times as fast in vLLM: found by measuring, not by FLOPs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ptl_rl.checkpoints.companions import write_config
from ptl_rl.errors import UserError
from ptl_rl.evaluation.command import prepare_machine
from ptl_rl.evaluation.speed import SATURATED, Spread, measure, usual_loads
from ptl_rl.families import read_shape
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import config_changes

MOST_WIDTHS = 6
"""That are measured; every one costs a start of vLLM and of the original's beside it."""
MISSES = 3
"""Widths that were too slow after which the narrowest is measured, to see whether the target can be reached at all."""
ROUNDS = 3

MeasureSpeedup = Callable[[int], Spread]
"""Of a width, the speed beside the original's."""


class OutOfReach(UserError):
    """No width is as fast as that."""


def widest_as_fast(
    target: float, width: int, alignment: int, first: int, speedup: MeasureSpeedup
) -> tuple[int, dict[int, Spread]]:
    """The widest model that is found to be ``target`` times as fast as the original, and all that was measured.

    Each guess takes the time of a token to be linear in the width, between the widest model that is fast enough and the
    narrowest that is not. The search ends when no width lies between those two, or after :data:`MOST_WIDTHS` widths.

    Args:
        width: of the original.
        alignment: what every width is a multiple of.
        first: width to begin with; what its FLOPs promise, say.

    Raises:
        OutOfReach: even the narrowest is slower; names what it reaches.
    """
    found: dict[int, Spread] = {}
    times = {width: 1.0}  # of a token, as shares of the original's
    slow, fast, guess = width, 0, first
    while not fast or len(found) < MOST_WIDTHS:
        narrowest, widest = fast + alignment, (slow - 1) // alignment * alignment
        if narrowest > widest:
            break
        guess = min(max(guess // alignment * alignment, narrowest), widest)
        if not fast and len(found) >= MISSES:
            guess = narrowest
        found[guess] = speedup(guess)
        times[guess] = 1.0 / found[guess].median
        if found[guess].median >= target:
            fast = guess
        else:
            slow = guess
        upper, lower = (slow, fast) if fast else (width, slow)
        slope = (times[upper] - times[lower]) / (upper - lower)
        guess = int(upper - (times[upper] - 1.0 / target) / slope) if slope > 0 else (slow + fast) // 2
    if not fast:
        reached = found[min(found)].median if found else 1.0
        raise OutOfReach(
            f"{min(found, default=width)} channels, the fewest that may stay, are {reached:.2f} times as fast as "
            f"{width}; give less than {target:g}"
        )
    return fast, found


@contextmanager
def _same_environment() -> Iterator[None]:
    """vLLM is told of the machine by variables, which the run's own processes must not inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _with_width(model: Path, width: int, layers: int, out: Path) -> Path:
    """A folder with the ``config.json`` of a model of ``width`` channels and ``layers`` blocks fewer."""
    shape = read_shape(model)
    kept = shape.num_hidden_layers - layers
    plan = PruningPlan(
        keep_channels=[list(range(width))] * shape.num_hidden_layers,
        keep_layers=list(range(kept)),
        layer_order=list(range(kept, shape.num_hidden_layers)),
        source_intermediate_size=shape.intermediate_size,
        alignment=1,
        channel_criterion="none",
        layer_criterion="none",
        subset_hash="",
        source=str(model),
    )
    out.mkdir()
    write_config(model, out, **config_changes(model, plan))
    return out


def channels_for_speed(
    model: Path,
    target: float,
    first: int,
    *,
    layers: int,
    alignment: int,
    dtype: str,
    tensor_parallel_size: int,
    progress: Callable[[str, int, int], None],
    told: Callable[[str], None],
) -> int:
    """Channels that each layer loses so that the model is ``target`` times as fast under :data:`SATURATED` load.

    Args:
        first: channels to lose in the first model that is measured.
        layers: blocks that go besides.
        told: of every model that was measured, in words.

    Raises:
        OutOfReach: no width is as fast.
        ImportError: vLLM is not installed.
    """
    width = read_shape(model).intermediate_size
    load = [load for load in usual_loads() if load.name == SATURATED]
    with TemporaryDirectory(prefix="ptl-speed-") as place, _same_environment():
        prepare_machine()
        original = _with_width(model, width, 0, Path(place) / "original")

        def speedup(channels: int) -> Spread:
            narrow = _with_width(model, channels, layers, Path(place) / str(channels))
            what = f"speed of {channels} channels"
            found = measure(
                [original, narrow],
                load,
                rounds=ROUNDS,
                dtype=dtype,
                tensor_parallel_size=tensor_parallel_size,
                shapes_only=True,
                progress=lambda done, total: progress(what, done, total),
            )[1].speedup[SATURATED]
            told(f"{channels} of {width} channels: {found.median:.2f} times as fast ({found.low:.2f}-{found.high:.2f})")
            return found

        fast, _ = widest_as_fast(target, width, alignment, width - first, speedup)
    return width - fast
