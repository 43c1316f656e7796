"""What a criterion of one's own imports (docs/criteria.md); all of it stands in ``score/``."""

from ptl_rl.pruning.score.criteria import (
    activation,
    fluctuation,
    magnitude,
    ptl_reference,
    random,
    reads,
    rms_contribution,
    taylor,
    wanda,
)
from ptl_rl.pruning.score.statistics import Statistics

__all__ = [
    "Statistics",
    "activation",
    "fluctuation",
    "magnitude",
    "ptl_reference",
    "random",
    "reads",
    "rms_contribution",
    "taylor",
    "wanda",
]
