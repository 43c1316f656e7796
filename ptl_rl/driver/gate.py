"""Whether a cycle's model is good enough to go on from, and what happens if not. Pure: numbers in, decision out."""

from typing import Literal

from ptl_rl.config import GateConfig

Decision = Literal["accept", "extend", "retry", "accept_below", "stop"]
"""``extend``: recover again; ``retry``: take the cycle back and halve the cut; ``accept_below``: go on all the same."""


def decide(
    gate: GateConfig,
    *,
    accuracy: float,
    baseline: float,
    rounds: int,
    retries: int,
    divisible: bool,
) -> Decision:
    """The gate's decision.

    Args:
        accuracy: share of test problems solved after recovery.
        baseline: the same for the model that the run started from.
        rounds: recovery rounds that this cycle has had, at least 1.
        retries: cycles that this run has taken back so far.
        divisible: whether the cut can be halved.
    """
    # Equality counts, whatever the rounding of the product.
    if accuracy >= gate.min_accuracy_ratio * baseline - 1e-9:
        return "accept"
    if rounds <= gate.max_extensions:
        return "extend"
    if retries < gate.max_retries and divisible:
        return "retry"
    return "accept_below" if gate.on_failure == "continue" else "stop"
