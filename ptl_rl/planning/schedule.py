"""From a schedule to the list of cuts that the cycles make, as pure arithmetic, checked before anything is cut."""

import itertools
from dataclasses import dataclass
from typing import Any

from ptl_rl.config import ConfigError, RunConfig, ScheduleConfig
from ptl_rl.config.pruning import TargetConfig
from ptl_rl.families.base import ModelShape

FLOPS_TARGETS = ("flops", "tokens_per_second")


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


def recovery_steps(config: RunConfig, planned: int, part: int = 0, round_: int = 0, unlearnable: bool = False) -> int:
    """Optimizer steps of one of the recoveries that follow a planned cut.

    In place they are those of the whole training, and, where the gate asks for more, those that follow its last cut; of
    a training that finds its own pace so many as it would have waited for.
    """
    recovery = config.recoveries(planned, unlearnable)[part]
    if unlearnable:
        last = 0 if config.schedule.pace == "governed" else len(config.schedule.cuts_in_order) - 1
        return recovery.steps_of(last if config.schedule.mode == "in_place" else planned)
    if config.schedule.pace == "governed" and round_:
        return config.schedule.patience
    if config.schedule.mode == "in_place":
        cuts = range(len(config.schedule.cuts_in_order))
        return recovery.steps_of(cuts[-1]) if round_ else sum(map(recovery.steps_of, cuts))
    return recovery.steps_of(planned)


def methods_and_steps(config: RunConfig, planned: int, unlearnable: bool = False) -> list[tuple[str, int]]:
    """Method and optimizer steps of every recovery that follows a planned cut."""
    return [
        (recovery.method, recovery_steps(config, planned, part, unlearnable=unlearnable))
        for part, recovery in enumerate(config.recoveries(planned, unlearnable))
    ]


def planned_cuts(schedule: ScheduleConfig) -> list[Cut]:
    """What the cycles cut, in the order that ``schedule.order`` asks for.

    With ``recover_only`` it is one cut that is empty; in place, one of all that goes, as there is one cycle.
    """
    if schedule.recover_only:
        return [Cut(channels=0, layers=0, planned=0)]
    if schedule.mode == "in_place":
        return [Cut(channels=schedule.channels_sum, layers=schedule.layers_total, planned=0)]
    return [Cut(channels=c, layers=n, planned=i) for i, (c, n) in enumerate(schedule.cuts_in_order)]


def settled(config: RunConfig, shape: ModelShape) -> RunConfig:
    """The same with a schedule that names its cuts, where it has left them to the model's shape.

    Raises:
        ConfigError: no cut reaches the target, or there are fewer widths than cuts.
    """
    schedule = config.schedule
    if not schedule.is_open:
        return config
    alignment = schedule.alignment * config.resources.tensor_parallel_size
    _check_removals(schedule.channels_total or 0, schedule.layers_total, shape, alignment)
    changes: dict[str, Any] = {"target": None, "channels_total": schedule.channels_total}
    if schedule.target is not None:
        changes["channels_total"] = channels_for(schedule.target, shape, schedule.layers_total, alignment)
    if schedule.pace == "geometric":
        assert schedule.cuts is not None
        steps = geometric(shape.intermediate_size, changes["channels_total"], schedule.cuts, alignment)
        if len(steps) < schedule.cuts and speed_wanted(schedule) is None:
            raise ConfigError(
                f"schedule.cuts: between {shape.intermediate_size} and "
                f"{shape.intermediate_size - changes['channels_total']} channels there are only {len(steps)} cuts of "
                f"equal shares whose widths are multiples of {alignment} (alignment x tensor_parallel_size)"
            )
        changes |= {"pace": "fixed", "cuts": None, "channels_per_cycle": steps, "channels_total": None}
    return config.model_copy(update={"schedule": type(schedule)(**(schedule.model_dump() | changes))})


def channels_for(target: TargetConfig, shape: ModelShape, layers: int, alignment: int) -> int:
    """Fewest channels whose loss, and that of ``layers`` blocks, makes the model as small as the target says.

    A speed is taken to be what the FLOPs promise; :mod:`ptl_rl.evaluation.speed_target` measures it.

    Raises:
        ConfigError: none are enough, or none need to go.
    """
    name, value = target.measure

    def size(of: ModelShape) -> int:
        return of.flops_per_token() if name in FLOPS_TARGETS else getattr(of, name)

    is_speed = name == "tokens_per_second"
    wanted = size(shape) / value if is_speed else value * size(shape) if value <= 1 else value
    width, smallest = shape.intermediate_size, size(shape.sliced(shape.intermediate_size - alignment, layers))
    removals = [width - left for left in range(width - width % alignment, 0, -alignment)]
    if is_speed:  # measuring decides: some channels go, and as many as may where FLOPs promise too little
        removals = [gone for gone in removals if gone]
    enough = (gone for gone in removals if size(shape.sliced(gone, layers)) <= wanted)
    found = next(enough, removals[-1] if is_speed and removals else None)
    blocks = f" and {layers} blocks fewer" if layers else ""
    if found is None:
        raise ConfigError(
            f"schedule.target.{name} is {value:g}, but with {alignment} channels a layer, the fewest that may stay,"
            f"{blocks} it is {smallest:,} ({smallest / size(shape):.1%} of {size(shape):,})"
        )
    if not found:
        raise ConfigError(
            f"schedule.target.{name} is {value:g}, which the model has{blocks and ' with' + blocks[4:]} without losing "
            "any channels; leave target out"
        )
    return found


def speed_wanted(schedule: ScheduleConfig) -> float | None:
    """Where what goes is still to be measured, the speed, beside the original's; until then the cuts are a guess."""
    return schedule.target.tokens_per_second if schedule.target is not None else None


def geometric(width: int, total: int, count: int, alignment: int) -> list[int]:
    """Channels that each of ``count`` cuts takes, so that each leaves nearly the same share of what is there.

    Fewer cuts, where a width between two would be no multiple of ``alignment``.
    """
    exact = [width * ((width - total) / width) ** (number / count) for number in range(1, count)]
    widths = [width, *(round(value / alignment) * alignment for value in exact), width - total]
    steps = [before - after for before, after in itertools.pairwise(widths)]
    return [step for step in steps if step > 0]


def check_schedule(schedule: ScheduleConfig, shape: ModelShape, alignment: int) -> None:
    """Refuse a schedule that removes more than there is, or leaves widths that engines do not take.

    Args:
        alignment: what every kept width must be a multiple of, tensor parallelism included.

    Raises:
        ConfigError: quoting both numbers.
    """
    _check_removals(schedule.channels_sum, schedule.layers_total, shape, alignment)
    width, in_place = shape.intermediate_size, schedule.mode == "in_place"
    if in_place and schedule.layers_total and (shape.attention_bias or shape.mlp_bias):
        raise ConfigError(
            "schedule: removes blocks in place, but the model has biases behind its projections, which would go on "
            "learning in a block that is gone; set schedule.mode to restart"
        )
    for number, (channels, _) in enumerate([] if schedule.recover_only else schedule.cuts_in_order, 1):
        width -= channels
        if channels and width % alignment:
            lower = width - width % alignment
            raise ConfigError(
                f"schedule: {'cut' if in_place else 'cycle'} {number} leaves {width} channels per layer, which is not "
                f"a multiple of {alignment} (alignment x tensor_parallel_size); {lower} and {lower + alignment} are"
            )


def _check_removals(channels: int, layers: int, shape: ModelShape, alignment: int) -> None:
    if channels >= shape.intermediate_size or alignment > shape.intermediate_size:
        raise ConfigError(
            f"schedule: removes {channels} channels per layer, but intermediate_size is {shape.intermediate_size}; at "
            f"least {alignment} must stay"
        )
    if layers >= shape.num_hidden_layers:
        raise ConfigError(
            f"schedule: layers_total is {layers}, but num_hidden_layers is {shape.num_hidden_layers}; at least 1 must "
            "stay"
        )


def check_cuts(config: RunConfig, shape: ModelShape) -> None:
    """Check a recipe's cycles, and what they cut, against the model's shape."""
    guessed, config = speed_wanted(config.schedule) is not None, settled(config, shape)
    cycles = len(planned_cuts(config.schedule))
    if not guessed and (beyond := [cycle for cycle in config.recovery_of_cycle if not 1 <= cycle <= cycles]):
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
