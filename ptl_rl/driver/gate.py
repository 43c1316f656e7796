"""Whether a cycle's model is good enough to go on from, and what happens if not. Pure: numbers in, decision out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ptl_rl.config import GateConfig, RunConfig

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


FEWEST_RIGHT = 10
"""Right answers of the original; of fewer one alone is more than a tenth."""


def can_judge(gate: GateConfig, baseline: float) -> bool:
    """Whether a share of the original's accuracy says anything: of nothing every model keeps all."""
    return baseline > 0 or gate.min_accuracy_ratio == 0


def why_nothing_is_right(config: RunConfig, evaluation: Mapping[str, Any], samples: Path) -> str:
    """What a user reads whose run ends after cycle 0: how many answers were cut off, where they are, what to mend."""
    problems, cut = evaluation.get("problems", "all"), evaluation.get("truncated", 0)
    longest = config.evaluation.max_response_tokens or config.data.max_response_tokens
    judge = "their box" if config.evaluation.judge == "boxed" else "reward.path"
    return (
        f"data.test: the model solves none of {problems} problems before anything is cut, and by that no cycle can be "
        f"judged; {cut} of its answers were cut off at {longest} tokens (evaluation.max_response_tokens). Read them in "
        f"{samples}: either the known answers cannot be right (data.test.fields, data.prompt_suffix; judged by "
        f"{judge}), or responses need more room, or the chat template is not the model's. Mend it and start a new run; "
        "gate.min_accuracy_ratio: 0 goes on without judging"
    )


def low_baseline(gate: GateConfig, evaluation: Mapping[str, Any]) -> str | None:
    """What is to be known where the original solves so few problems that chance decides; else None."""
    right = round(evaluation["accuracy"] * evaluation.get("problems", 0))
    if not 0 < right < FEWEST_RIGHT or gate.min_accuracy_ratio == 0:
        return None
    return (
        f"the original model solves {right} of {evaluation['problems']} problems, too few to judge a cycle by: one "
        f"answer is {1 / right:.0%} of that, and chance decides at the gate; give a larger data.test, or one that the "
        "model can solve"
    )
