r"""Code reward: does the Python program in the response pass unit tests?

    reward: {path: code}                       # all tests or nothing
    reward: {path: code, name: partial_score}  # the share of tests passed

The program is what stands in the last closed fenced block (three backticks, `python` or nothing behind them). A
response without one earns 0: paying for bare text would teach a policy to drop the fences that tell its program
from its prose, and a block that was cut short is no program.

The program runs in limited processes (`reward.programs.sandbox`), which never hold the values that the tests expect
(`reward.programs.unit_tests`).
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

from reward.compute_score import FROM_VERL
from reward.programs.sandbox import Limits, Outcome, Sandbox
from reward.programs.unit_tests import GroundTruth, plan_tests

_LANGUAGES = ("", "python", "python3", "py")
# Longer than any answer to such a test: degenerate text.
_LONGEST_PROGRAM_CHARS = 200_000


def extract_program(text: str) -> str | None:
    """Return the content of the last closed block of Python in `text`, None if there is none.

    A block without a language counts as Python, others are passed over. A fence with a language inside a block
    begins a new one, for it cannot close the old.
    """
    found = None
    opening: tuple[int, str] | None = None
    indent = 0
    lines: list[str] = []
    for line in text.split("\n"):
        fence = _fence(line)
        if fence and (opening is None or fence[1]):
            opening, lines = fence, []
            indent = len(line) - len(line.lstrip(" "))
        elif fence and opening and fence[0] >= opening[0]:
            if opening[1] in _LANGUAGES:
                found = "\n".join(lines)
            opening = None
        else:
            # What stands in a list is indented as its fence is, at most.
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :] if indent else line)
    return found


def _fence(line: str) -> tuple[int, str] | None:
    """Return the number of backticks and the language of a fence, None for any other line."""
    stripped = line.strip()
    language = stripped.lstrip("`")
    ticks = len(stripped) - len(language)
    if ticks < 3 or "`" in language:
        return None
    return ticks, language.split()[0].lower() if language.strip() else ""


def code_reward(
    response: str, tests: GroundTruth, *, partial: bool = False, raw_code: bool = False, **limits: Any
) -> float:
    """Return 1.0 if the response's program passes all `tests` (see `unit_tests.plan_tests`), else 0.0.

    With `partial` the result is the share of tests passed, even if the program then ran into a limit. With
    `raw_code` a response without any fence is taken for a program. `limits` are those of `sandbox.Limits`, and
    `allow_weaker_limits`. Safe in any thread. Raises ValueError for malformed tests, and RuntimeError if programs
    cannot be run or confined on this machine.
    """
    outcome = _run(response, tests, raw_code, limits)
    return _score(outcome, partial)


def passes(program: str, tests: GroundTruth, **limits: Any) -> bool:
    """True if `program` itself, not a response that holds one, passes all `tests`; the rest as for `code_reward`."""
    plan = plan_tests(tests)
    if not program.strip() or len(program) > _LONGEST_PROGRAM_CHARS:
        return False
    return all(_sandbox(**limits).run(program, plan).passed)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: GroundTruth,
    extra_info: Mapping[str, Any] | None = None,
    *,
    partial: bool = False,
    raw_code: bool = False,
    **kwargs: Any,
) -> dict[str, float]:
    """Return `code_reward` as `score` in verl's signature, and numbers beside it that verl averages.

    `acc` is 1.0 if all tests passed, `passed` the share that did; `no_program`, `timeout` and `crashed` are 1.0 for
    a response without a program, one that ran out of time, and one that ended its process or asked for too much.
    Raises TypeError for a setting that does not exist, else what `code_reward` raises.
    """
    limits = {name: value for name, value in kwargs.items() if name not in FROM_VERL}
    outcome = _run(solution_str, ground_truth, raw_code, limits)
    ended = outcome.ended if outcome else "no_program"
    return {
        "score": _score(outcome, partial),
        "acc": _score(outcome, False),
        "passed": _score(outcome, True),
        "no_program": float(ended == "no_program"),
        "timeout": float(ended == "timeout"),
        "crashed": float(ended in ("died", "excess")),
    }


def partial_score(
    data_source: str,
    solution_str: str,
    ground_truth: GroundTruth,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """Return `compute_score` with `partial`, for a recipe, which names a function and no settings."""
    return compute_score(data_source, solution_str, ground_truth, extra_info, partial=True, **kwargs)


def _score(outcome: Outcome | None, partial: bool) -> float:
    if outcome is None:
        return 0.0
    share = sum(outcome.passed) / len(outcome.passed)
    return share if partial else float(share == 1.0)


def _run(response: str, tests: GroundTruth, raw_code: bool, limits: Mapping[str, Any]) -> Outcome | None:
    # First of all: tests that are malformed must not go unnoticed because a response has no program.
    plan = plan_tests(tests)
    sandbox = _sandbox(**limits)
    program = extract_program(response)
    if program is None and raw_code and "```" not in response:
        program = response
    if program is None or not program.strip() or len(program) > _LONGEST_PROGRAM_CHARS:
        return None
    return sandbox.run(program, plan)


@functools.lru_cache(maxsize=16)
def _sandbox(*, allow_weaker_limits: bool = False, workers: int | None = None, **limits: Any) -> Sandbox:
    """One sandbox per setting, for it bounds how many programs run at a time."""
    unknown = sorted(limits.keys() - set(Limits._fields))
    if unknown:
        raise TypeError(
            f"unknown reward settings {unknown}: there are partial, raw_code, allow_weaker_limits, workers and "
            f"{', '.join(Limits._fields)}"
        )
    return Sandbox(Limits(**limits), workers=workers, allow_weaker_limits=allow_weaker_limits)


# A forked child must not wait for slots that its parent's threads held.
os.register_at_fork(after_in_child=_sandbox.cache_clear)
