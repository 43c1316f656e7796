"""The cuts of ``schedule.mode`` in_place, and the steps between them; imports neither torch nor ray."""

from dataclasses import dataclass

from ptl_rl.config.run import RunConfig

HELD_OUT = 8
"""Where damage decides, it is measured on every so-many-th sequence, and compensation is fitted to the others."""
TRIAL_SEQUENCES = 128
"""Most sequences that compensation is fitted to while a cut is searched for; that of the cut that is made reads all."""


@dataclass(frozen=True)
class CutInPlace:
    """One cut of a training that goes on."""

    channels: int
    """That every block loses."""
    layers: int
    """Blocks that go."""
    after_step: int
    """Optimizer steps before it."""


def cuts_in_place(config: RunConfig) -> list[CutInPlace]:
    """The cuts within the one training of ``schedule.mode`` in_place, each before the steps that recover it."""
    found, steps = [], 0
    for planned, (channels, layers) in enumerate(config.schedule.cuts_in_order):
        found.append(CutInPlace(channels, layers, steps))
        steps += config.recovery[0].steps_of(planned)
    return found
