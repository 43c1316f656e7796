"""The largest cut whose damage stays within a limit, found in few trials. Pure arithmetic."""

import math
from dataclasses import dataclass, field

CLOSE = 0.1
"""A search ends where the smallest width that fits and the largest that does not differ by this share of the former."""
STEEPNESS = 3.0
"""Taken at first: damage falls with this power of the width."""


@dataclass
class WidthSearch:
    """For the smallest width whose damage stays within a limit, in as few trials as may be.

    It is taken that a smaller width does more damage. Where damage is known on both sides, the next width is where a
    power law through both meets the limit.
    """

    widths: list[int]
    """Ascending; all that may be tried."""
    limit: float
    """Most damage, in nats a token."""
    low: int = -1
    """Place of the largest width that does too much."""
    high: int = field(init=False)
    """Place of the smallest one that fits; behind the last where none has yet."""
    damages: dict[int, float] = field(default_factory=dict)
    """By place."""

    def __post_init__(self) -> None:
        self.high = len(self.widths)

    def next(self) -> int | None:
        """Place of the width to be tried next; None where the search is over. The smallest first: often it fits."""
        between = self.high - self.low - 1
        if not between:
            return None
        if not self.damages:
            return 0
        if (
            self.high < len(self.widths)
            and self.widths[self.high] - self.widths[self.low] <= CLOSE * self.widths[self.high]
        ):
            return None
        low = math.log(self.widths[self.low]), math.log(self.damages[self.low])
        steepness = STEEPNESS
        if self.high in self.damages:
            high = math.log(self.widths[self.high]), math.log(self.damages[self.high])
            steepness = max((low[1] - high[1]) / (high[0] - low[0]), 1e-3)
        aim = math.exp(min(low[0] + (low[1] - math.log(self.limit)) / steepness, math.log(self.widths[-1])))
        place = min(range(len(self.widths)), key=lambda index: abs(self.widths[index] - aim))
        margin = between // 8  # so that what is left shrinks in any case
        return min(max(place, self.low + 1 + margin), self.high - 1 - margin)

    def found(self, place: int, damage: float) -> bool:
        """Take in what a trial has measured; gives whether it fits."""
        # None at all says little of where the limit lies, and would make the power law a cliff.
        self.damages[place] = min(max(damage, self.limit / 10), 1e9)
        fits = damage <= self.limit
        if fits:
            self.high = place
        else:
            self.low = place
        return fits
