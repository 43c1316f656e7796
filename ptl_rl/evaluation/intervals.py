"""How sure a measured accuracy is: bootstrap intervals, and a paired test for two models on the same problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

RESAMPLES = 10_000


def accuracy_interval(correct: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``correct`` (a value from 0 to 1 per problem).

    Of problems that are all right, or all wrong, it is that one point: resampling them shows no other.
    """
    import numpy

    return _interval(numpy.asarray(correct, dtype=float), numpy.random.default_rng(seed))


def _interval(values: "numpy.ndarray", rng: "numpy.random.Generator") -> tuple[float, float]:
    """Of the mean."""
    import numpy
    from scipy import stats

    if numpy.unique(values).size == 1:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,), numpy.mean, n_resamples=RESAMPLES, confidence_level=0.95, method="percentile", batch=500, rng=rng
    ).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Paired:
    """Two models on the same problems."""

    difference: float
    """Mean of the second less the first."""
    low: float
    high: float
    """Bootstrap interval of the difference, problems resampled in pairs."""
    p_value: float
    """Of the permutation test that swaps the two models' results problem by problem, two-sided."""
    gained: int
    """Problems that the second does better."""
    lost: int


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Compare per-problem results (0 to 1) of two models, in the same order.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    import numpy
    from scipy import stats

    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} results cannot be paired; both need the same problems")
    differences = numpy.asarray(second, dtype=float) - numpy.asarray(first, dtype=float)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    mean = float(differences.mean())
    if not gained and not lost:
        return Paired(mean, mean, mean, 1.0, 0, 0)
    rng = numpy.random.default_rng(seed)
    low, high = _interval(differences, rng)
    options = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": 500, "vectorized": True}
    test = stats.permutation_test((differences,), numpy.mean, rng=rng, **options)
    return Paired(mean, low, high, float(test.pvalue), gained, lost)
