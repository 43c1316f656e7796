"""Try a user's reward function once, before Ray starts and a GPU is reserved.

A misspelt name or a wrong signature otherwise shows after minutes of start-up, in a worker's log. The function is
loaded and called in a process of its own (`reward.calls`), as in the run: what it does to its folder, its process or
its own errors' text, it does there.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward.guard import BadReturn, Value, as_result, is_async, kinds_of
from reward.load import RewardError, text_of

__all__ = ["RewardError", "attempt", "check_loads", "check_reward_function", "reward_keys"]

_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def check_loads(path: str | Path, name: str) -> None:
    """Load the function `name` of the file `path`, without a call. Raises RewardError."""
    from reward.calls import FunctionProcess

    FunctionProcess(path, name).kill()


def check_reward_function(
    path: str | Path,
    name: str,
    sample: Mapping[str, Any],
    *,
    reward_kwargs: Mapping[str, Any] | None = None,
    limit_seconds: float = 60.0,
) -> None:
    """Load the function `name` of the file `path` and call it once, as verl will; return if all is well.

    `sample` holds `data_source`, `solution_str`, `ground_truth` and maybe `extra_info`; `reward_kwargs` are
    the recipe's own settings for the function. Raises RewardError, whose message names file, function and remedy.
    """
    _try_out(path, name, sample, reward_kwargs or {}, limit_seconds)


def reward_keys(
    path: str | Path,
    name: str,
    sample: Mapping[str, Any],
    *,
    reward_kwargs: Mapping[str, Any] | None = None,
    limit_seconds: float = 60.0,
) -> dict[str, str]:
    """Do what `check_reward_function` does, and return the keys beside `score` as {key: "number" | "text"}.

    Passed to verl as `reward_kwargs.user_keys`, they give every sample the same keys in every worker, failed
    samples included.
    """
    return kinds_of(_try_out(path, name, sample, reward_kwargs or {}, limit_seconds))


def _try_out(
    path: str | Path,
    name: str,
    sample: Mapping[str, Any],
    reward_kwargs: Mapping[str, Any],
    limit_seconds: float,
) -> dict[str, Value]:
    from reward.calls import CallStopped, FunctionProcess

    arguments = {key: sample.get(key) for key in _ARGUMENTS}
    arguments["extra_info"] = dict(arguments["extra_info"] or {})
    process = FunctionProcess(path, name)
    try:
        return process.call({**arguments, **reward_kwargs}, limit_seconds, is_trial=True)
    except CallStopped as error:
        raise RewardError(
            f"reward function {name!r} of {path} {error} on the sample: make it return a score in time"
        ) from None
    finally:
        process.kill()


def attempt(function: Callable[..., Any], label: str, arguments: Mapping[str, Any]) -> dict[str, Value]:
    """Call `function` in this thread, which is not the main one, as in verl. Raises RewardError, which says why not."""
    _check_signature(function, arguments, label)

    async def call_async() -> Any:
        return await function(**arguments)

    try:
        return as_result(asyncio.run(call_async()) if is_async(function) else function(**arguments))
    except BadReturn as problem:
        raise RewardError(
            f"{label} {problem}; it must return a finite number or a dict with a numeric 'score'"
        ) from problem
    except BaseException as error:
        raise RewardError(
            f"{label} raised {type(error).__name__} on the sample (data_source={arguments['data_source']!r}): "
            f"{text_of(error)}; mend the function, or the data if the sample is wrong"
        ) from error


def _check_signature(function: Callable[..., Any], arguments: Mapping[str, Any], label: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some C functions have none; the call will tell
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise RewardError(
            f"{label} has the signature {signature}, but verl calls it with the keyword arguments "
            f"{', '.join(arguments)} ({error}): accept these, or add **kwargs"
        ) from error
