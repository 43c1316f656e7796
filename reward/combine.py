"""Combine named rewards into one score, refusing to guess.

A misspelt or forgotten part would otherwise train a policy on half of its reward without a word.
"""

import math
from collections.abc import Mapping


def weighted_sum(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the sum of `weights[name] * parts[name]`.

    Raises ValueError if the two do not name the same parts, or if a value is not a finite number.
    """
    if parts.keys() != weights.keys():
        unweighted = sorted(parts.keys() - weights.keys())
        missing = sorted(weights.keys() - parts.keys())
        raise ValueError(f"reward parts without a weight: {unweighted}; weights without a part: {missing}")
    for label, values in (("reward part", parts), ("weight", weights)):
        for name, value in values.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{label} {name!r} is {value!r}: it must be a finite number")
    return math.fsum(weights[name] * parts[name] for name in parts)
