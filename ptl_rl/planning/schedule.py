"""From a schedule to the list of cuts that the cycles make, as pure arithmetic, checked before anything is cut."""

import itertools
from dataclasses import dataclass

from ptl_rl.config import ConfigError, RunConfig, ScheduleConfig
from ptl_rl.families.base import ModelShape


@dataclass(frozen=True)
class Cut:
    """What one cycle removes: channels from every block, and whole blocks. ``planned`` is its place in the plan."""

    channels: int
    layers: int
    planned: int

    @property
    def is_empty(self) -> bool:
        """Nothing goes: the cycle only recovers."""
        return not self.channels and not self.layers


def _channel_steps(schedule: ScheduleConfig) -> list[int]:
    if isinstance(schedule.channels_per_cycle, list):
        return list(schedule.channels_per_cycle)
    total, step = schedule.channels_sum, schedule.channels_per_cycle
    return [min(step, total - done) for done in range(0, total, step)] if step else []


def _layer_steps(schedule: ScheduleConfig) -> list[int]:
    total, step = schedule.layers_total, schedule.layers_per_cycle
    return [min(step, total - done) for done in range(0, total, step)]


@dataclass(frozen=True)
class CutInPlace:
    """One cut of a training that goes on."""

    channels: int
    """That every block loses."""
    after_step: int
    """Optimizer steps before it."""


def cuts_in_place(config: RunConfig) -> list[CutInPlace]:
    """The cuts within the one training of ``schedule.mode`` in_place, each before the steps that recover it."""
    found, steps = [], 0
    for planned, channels in enumerate(_channel_steps(config.schedule)):
        found.append(CutInPlace(channels, steps))
        steps += config.recovery[0].steps_of(planned)
    return found


def recovery_steps(config: RunConfig, planned: int, part: int = 0, round_: int = 0) -> int:
    """Optimizer steps of one of the recoveries that follow a planned cut.

    In place they are those of the whole training, and, where the gate asks for more, those that follow its last cut.
    """
    recovery = config.recoveries(planned)[part]
    if config.schedule.mode == "in_place":
        cuts = range(len(_channel_steps(config.schedule)))
        return recovery.steps_of(cuts[-1]) if round_ else sum(map(recovery.steps_of, cuts))
    return recovery.steps_of(planned)


def planned_cuts(schedule: ScheduleConfig) -> list[Cut]:
    """What the cycles cut, in the order that ``schedule.order`` asks for.

    With ``recover_only`` it is one cut that is empty; in place, one of all that goes, as there is one cycle.
    """
    if schedule.recover_only:
        return [Cut(channels=0, layers=0, planned=0)]
    if schedule.mode == "in_place":
        return [Cut(channels=schedule.channels_sum, layers=0, planned=0)]
    channels = [(step, 0) for step in _channel_steps(schedule)]
    layers = [(0, step) for step in _layer_steps(schedule)]
    if schedule.order == "channels_then_layers":
        pairs = channels + layers
    elif schedule.order == "layers_then_channels":
        pairs = layers + channels
    elif schedule.order == "together":
        both = itertools.zip_longest(_channel_steps(schedule), _layer_steps(schedule), fillvalue=0)
        pairs = list(both)
    else:
        pairs = [pair for both in zip(channels, layers, strict=False) for pair in both]
        shared = min(len(channels), len(layers))
        pairs += channels[shared:] + layers[shared:]
    return [Cut(channels=c, layers=n, planned=i) for i, (c, n) in enumerate(pairs)]


def check_schedule(schedule: ScheduleConfig, shape: ModelShape, alignment: int) -> None:
    """Refuse a schedule that removes more than there is, or leaves widths that engines do not take.

    Args:
        alignment: what every kept width must be a multiple of, tensor parallelism included.

    Raises:
        ConfigError: quoting both numbers.
    """
    if schedule.channels_sum >= shape.intermediate_size:
        raise ConfigError(
            f"schedule: removes {schedule.channels_sum} channels per layer, but intermediate_size is "
            f"{shape.intermediate_size}; at least {alignment} must stay"
        )
    if schedule.layers_total >= shape.num_hidden_layers:
        raise ConfigError(
            f"schedule: layers_total is {schedule.layers_total}, but num_hidden_layers is {shape.num_hidden_layers}; "
            "at least 1 must stay"
        )
    width, in_place = shape.intermediate_size, schedule.mode == "in_place"
    steps = _channel_steps(schedule) if in_place else [cut.channels for cut in planned_cuts(schedule)]
    for number, channels in enumerate(steps, 1):
        width -= channels
        if channels and width % alignment:
            lower = width - width % alignment
            raise ConfigError(
                f"schedule: {'cut' if in_place else 'cycle'} {number} leaves {width} channels per layer, which is not a multiple of "
                f"{alignment} (alignment x tensor_parallel_size); {lower} and {lower + alignment} are"
            )


def check_cuts(config: RunConfig, shape: ModelShape) -> None:
    """Check a recipe's cycles, and what they cut, against the model's shape."""
    cycles = len(planned_cuts(config.schedule))
    if beyond := [cycle for cycle in config.recovery_of_cycle if not 1 <= cycle <= cycles]:
        raise ConfigError(f"recovery_of_cycle: {beyond[0]}, but the schedule's cycles are 1 to {cycles}")
    check_schedule(config.schedule, shape, config.schedule.alignment * config.resources.tensor_parallel_size)


def halved(cut: Cut, alignment: int) -> list[Cut] | None:
    """Two cuts in place of one, each a multiple of ``alignment``; None if the cut cannot be divided.

    Of a cut of channels and blocks it does to divide one of them; what cannot be divided goes with the second.
    """
    first = cut.channels // 2 // alignment * alignment
    layers = cut.layers // 2
    if not first and not layers:
        return None
    return [Cut(first, layers, cut.planned), Cut(cut.channels - first, cut.layers - layers, cut.planned)]
