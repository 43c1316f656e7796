"""Whether a cycle's model is good enough to go on from, and what happens if not. Pure: numbers in, decision out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ptl_rl.config import GateConfig, RunConfig

Decision = Literal["accept", "rescue", "extend", "retry", "accept_below", "stop"]
"""``rescue``: recover by what is for dead rewards; ``extend``: recover again; ``retry``: take the cycle back and halve
the cut; ``accept_below``: go on all the same."""


def decide(
    gate: GateConfig,
    *,
    accuracy: float,
    baseline: float,
    rounds: int,
    retries: int,
    divisible: bool,
    learns: bool = True,
    rescue: bool = False,
) -> Decision:
    """The gate's decision.

    Args:
        accuracy: share of test problems solved after recovery.
        baseline: the same for the model that the run started from.
        rounds: recovery rounds that this cycle has had, at least 1.
        retries: cycles that this run has taken back so far.
        divisible: whether the cut can be halved.
        rescue: whether there is a way for dead rewards that this cycle has not gone yet.
        learns: whether more steps of the same may bring more; false where a training ended as they would not.
    """
    # Equality counts, whatever the rounding of the product.
    if accuracy >= gate.min_accuracy_ratio * baseline - 1e-9:
        return "accept"
    if not learns and rescue:
        return "rescue"
    if learns and rounds <= gate.max_extensions:
        return "extend"
    if retries < gate.max_retries and divisible:
        return "retry"
    return "accept_below" if gate.on_failure == "continue" else "stop"


FEWEST_RIGHT = 10
"""Right answers of the original; of fewer one alone is more than a tenth."""


def can_judge(config: RunConfig, baseline: float) -> bool:
    """Whether a run may go on from what its first model solves: of nothing every model keeps all.

    One that another method has cut (``model.parent``) may solve nothing, as that is what is to be recovered.
    """
    return baseline > 0 or config.gate.min_accuracy_ratio == 0 or config.model.parent is not None


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


def low_baseline(config: RunConfig, evaluation: Mapping[str, Any]) -> str | None:
    """What is to be known where the first model solves so few problems that chance, or nothing, decides; else None."""
    problems = evaluation.get("problems", 0)
    right = evaluation["accuracy"] * problems
    if not right < FEWEST_RIGHT or not problems or config.gate.min_accuracy_ratio == 0:
        return None
    why = f"one answer is {1 / right:.0%} of that, and chance decides" if right > 0 else "every cycle keeps all of that"
    return (
        f"the original model solves {right:.3g} of {problems} problems, too few to judge a cycle by: {why}; give a "
        "larger data.test, or one that the model can solve"
    )
