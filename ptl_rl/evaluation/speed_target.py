"""How many channels must go for a model to generate so many times as fast in vLLM: found by measuring, not by FLOPs.

Engines are started by a process of its own, ``python -m ptl_rl.evaluation.speed_target``, so that nothing of them stays
in the one that asks.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ptl_rl.checkpoints.companions import copy_companions, write_config
from ptl_rl.errors import UserError
from ptl_rl.evaluation.speed import SATURATED, Spread, end_with, measure, usual_loads
from ptl_rl.families import read_shape
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import config_changes

MOST_WIDTHS = 6
"""That are measured; every one costs a start of vLLM and of the original's beside it."""
MISSES = 3
"""Widths that were too slow after which the narrowest is measured, to see whether the target can be reached at all."""
ROUNDS = 3


EXCEPTION = re.compile(r"(\w+\.)*\w*(Error|Exception|Pool)\b: ")


class OutOfReach(UserError):
    """No width is as fast as that, or no channels need to go for it."""


class NotMeasured(UserError):
    """vLLM could not be timed; says why, as far as is known."""


@dataclass(frozen=True)
class Wanted:
    """What is to be found."""

    model: str
    target: float
    """Times the original's speed."""
    first: int
    """Width to begin with; what its FLOPs promise, say."""
    layers: int
    """Blocks that go besides."""
    alignment: int
    """What every width is a multiple of."""
    dtype: str
    tensor_parallel_size: int


def widest_as_fast(
    target: float, width: int, alignment: int, first: int, speedup: Callable[[int], Spread], fewer_blocks: bool = False
) -> tuple[int, dict[int, Spread]]:
    """The widest model that was measured to be ``target`` times as fast as the original in every round.

    Each guess takes the time of a token to be linear in the width, between the widest model that is fast enough and the
    narrowest that is not. The search ends when no width lies between those two, or after :data:`MOST_WIDTHS` widths.

    Args:
        width: of the original.
        speedup: measures a width.
        fewer_blocks: what is measured has fewer blocks than the original, too, and so is faster at its width.

    Returns:
        the width, and all that was measured.

    Raises:
        OutOfReach: even the narrowest is slower, or the original's width is as fast with fewer blocks.
    """
    found: dict[int, Spread] = {}
    times = {width: 1.0}  # of a token, as shares of the original's

    def measured(guess: int) -> bool:
        found[guess] = speedup(guess)
        times[guess] = 1.0 / found[guess].low
        return found[guess].low >= target

    if fewer_blocks and measured(width):
        raise OutOfReach(f"with fewer blocks it is {found[width].low:.2f} times as fast already; leave target out")
    slow, fast, guess = width, 0, first
    while not fast or len(found) < MOST_WIDTHS:
        narrowest, widest = fast + alignment, (slow - 1) // alignment * alignment
        if narrowest > widest:
            break
        guess = min(max(guess // alignment * alignment, narrowest), widest)
        if not fast and len(found) >= MISSES:
            guess = narrowest
        if measured(guess):
            fast = guess
        else:
            slow = guess
        upper, lower = (slow, fast) if fast else (width, slow)
        slope = (times[upper] - times[lower]) / (upper - lower)
        guess = int(upper - (times[upper] - 1.0 / target) / slope) if slope > 0 else (slow + fast) // 2
    if not fast:
        best = max([1.0, *(spread.low for spread in found.values())])
        raise OutOfReach(
            f"no width down to {min([width, *found])} channels, of {width}, is so fast; what was measured reached "
            f"{best:.2f}, so give at most that"
        )
    return fast, found


def with_width(model: Path, width: int, layers: int, out: Path) -> Path:
    """A folder with config and tokenizer of a model of ``width`` channels and ``layers`` blocks fewer; no weights."""
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
    copy_companions(model, out)
    return out


def search(wanted: Wanted, place: Path, tell: Callable[..., None]) -> int:
    """Find the width by measuring in this process; see :func:`channels_for_speed`.

    Args:
        place: for folders of models without weights.
        tell: takes keywords, of progress and of what was found.
    """
    model = Path(wanted.model)
    width = read_shape(model).intermediate_size
    load = [load for load in usual_loads() if load.name == SATURATED]
    original = with_width(model, width, 0, place / "original")

    def speedup(channels: int) -> Spread:
        found = measure(
            [original, with_width(model, channels, wanted.layers, place / str(channels))],
            load,
            rounds=ROUNDS,
            dtype=wanted.dtype,
            tensor_parallel_size=wanted.tensor_parallel_size,
            shapes_only=True,
            progress=lambda done, total: tell(what=f"speed of {channels} channels", done=done, total=total),
        )[1].speedup[SATURATED]
        tell(channels=channels, **asdict(found))
        return found

    fewer = wanted.layers > 0
    return widest_as_fast(wanted.target, width, wanted.alignment, wanted.first, speedup, fewer_blocks=fewer)[0]


def channels_for_speed(
    wanted: Wanted, progress: Callable[[str, int, int], None], told: Callable[[int, Spread], None]
) -> int:
    """Channels that each layer loses so that the model is ``wanted.target`` times as fast under full load.

    Models have random weights. Whoever interrupts this ends the engines, too.

    Args:
        told: of every width that was measured.

    Raises:
        OutOfReach: see :func:`widest_as_fast`.
        NotMeasured: vLLM is missing, does not start, or ends.
    """
    with TemporaryDirectory(prefix="ptl-speed-") as place, (Path(place) / "log").open("w+") as log:
        asked = [sys.executable, "-m", __name__, json.dumps(asdict(wanted)), place]
        with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            assert process.stdout is not None
            last: dict[str, Any] = {}
            try:
                for line in process.stdout:
                    if not line.startswith('{"'):
                        continue  # a library's own word
                    last = json.loads(line)
                    if "what" in last:
                        progress(last["what"], last["done"], last["total"])
                    elif "channels" in last:
                        told(last["channels"], Spread(last["median"], last["low"], last["high"]))
            finally:
                process.terminate()
        if "width" in last:
            return read_shape(Path(wanted.model)).intermediate_size - int(last["width"])
        if "out_of_reach" in last:
            raise OutOfReach(last["out_of_reach"])
        log.seek(0)
        raise NotMeasured(f"vLLM could not be timed here: {_reason(log.read().splitlines(), process.returncode)}")


def _reason(lines: list[str], status: int) -> str:
    """Of a process that ended without a result: the last exception in its log, which other words may follow."""
    said = [line.strip() for line in lines if line.strip()]
    named = [line for line in said if EXCEPTION.match(line)]
    return (named or said or [f"it ended with status {status}"])[-1][:300]


def main(wanted: str, place: str) -> None:
    """Of the process that :func:`channels_for_speed` starts; what it says are lines of JSON."""
    from ptl_rl.evaluation.command import prepare_machine, quieten_libraries

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    quieten_libraries()
    prepare_machine()

    def tell(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    try:
        tell(width=search(Wanted(**json.loads(wanted)), Path(place), tell))
    except OutOfReach as error:
        tell(out_of_reach=str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
