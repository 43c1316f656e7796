"""The cuts of ``schedule.mode`` in_place, and the steps between them; imports neither torch nor ray."""

from dataclasses import dataclass

from ptl_rl.config.run import RunConfig


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
    for planned, channels in enumerate(config.schedule.channel_steps):
        found.append(CutInPlace(channels, steps))
        steps += config.recovery[0].steps_of(planned)
    return found
