"""Is an answer right? By its boxed result, or by the run's own reward function."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ptl_rl.config import RunConfig
from ptl_rl.data.records import Record
from ptl_rl.errors import UserError

AT_ONCE = 32
"""Calls of the reward function that run side by side."""


class JudgeError(UserError, ValueError):
    """Answers that cannot be judged; the message names setting and remedy."""


@dataclass(frozen=True)
class Verdicts:
    """How right each answer is, and how many could not be judged."""

    correct: list[float]
    """From 0 to 1, in the order of the answers."""
    failed: int = 0
    """Answers on which the reward function raised; they count as wrong."""


def judge(
    config: RunConfig, records: Sequence[Record], answers: Sequence[str], progress: Callable[[], None] = lambda: None
) -> Verdicts:
    """Judge ``answers`` to ``records`` as ``evaluation.judge`` says.

    Args:
        progress: called after every answer that the reward function has judged.

    Raises:
        JudgeError: the reward function raised on every answer, or gave one what is no number from 0 to 1.
    """
    if config.evaluation.judge == "reward":
        return asyncio.run(_by_reward(config, records, answers, progress))
    from reward.accuracy import accuracy_reward

    return Verdicts([accuracy_reward(answer, record.answer) for answer, record in zip(answers, records, strict=True)])


async def _by_reward(
    config: RunConfig, records: Sequence[Record], answers: Sequence[str], progress: Callable[[], None]
) -> Verdicts:
    from reward.user import compute_score

    free = asyncio.Semaphore(AT_ONCE)

    async def result(index: int, record: Record, answer: str) -> dict[str, Any]:
        async with free:
            arguments = record.reward_sample() | {"solution_str": answer}
            arguments["extra_info"] |= {"index": index}
            found = await compute_score(
                **arguments,
                user_path=config.reward.file,
                user_name=config.reward.name,
                user_seconds=config.reward.call_seconds,
            )
            progress()
            return found

    tasks = [result(i, *pair) for i, pair in enumerate(zip(records, answers, strict=True))]
    results = await asyncio.gather(*tasks)
    failed = sum(bool(found["reward_error"]) for found in results)
    if results and failed == len(results):
        raise JudgeError(
            "evaluation.judge: the reward function raised on every answer; "
            "logs/reward_errors.jsonl in the run folder says why"
        )
    correct = [0.0 if found["reward_error"] else _share(found) for found in results]
    return Verdicts(correct, failed)


def _share(found: dict[str, Any]) -> float:
    """``acc``, or ``score`` of an answer that the reward function gave none."""
    value = found["score"] if found.get("acc") is None else found["acc"]
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise JudgeError(
            f"evaluation.judge: the reward function gave an answer {value!r}, which is no share of being right; "
            "return a dict with a number 'acc' from 0 to 1 beside 'score', or set evaluation.judge to boxed"
        )
    return value
