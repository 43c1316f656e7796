"""Try a user's reward function once, before Ray starts and a GPU is reserved.

A misspelt name or a wrong signature otherwise shows after minutes of start-up, in a worker's log.
"""

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward.guard import BadReturn, Value, as_result, is_async, kinds_of
from reward.load import RewardError, load_function

__all__ = ["RewardError", "check_reward_function", "reward_keys"]


class _TooSlow(Exception):
    """The call still runs: not to be confused with a TimeoutError that the function itself raised."""


_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


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
    the recipe's own settings for the function. The call runs in a thread that is not the main one, as in
    verl. Raises RewardError, whose message names the file, the function and the remedy.
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
    function = load_function(path, name)
    label = f"reward function {name!r} of {path}"
    arguments = {key: sample.get(key) for key in _ARGUMENTS}
    arguments["extra_info"] = dict(arguments["extra_info"] or {})
    _check_signature(function, {**arguments, **reward_kwargs}, label)
    returned, error = _call_in_thread(function, {**arguments, **reward_kwargs}, limit_seconds)
    if isinstance(error, _TooSlow):
        raise RewardError(f"{label} did not return within {limit_seconds:g} s on the sample: make it faster")
    if error is not None:
        raise RewardError(
            f"{label} raised {type(error).__name__} on the sample "
            f"(data_source={arguments['data_source']!r}): {error}; "
            "mend the function, or the data if the sample is wrong"
        ) from error
    try:
        return as_result(returned[0])
    except BadReturn as problem:
        raise RewardError(
            f"{label} {problem}; it must return a finite number or a dict with a numeric 'score'"
        ) from problem


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


def _call_in_thread(
    function: Callable[..., Any], arguments: Mapping[str, Any], limit_seconds: float
) -> tuple[list[Any], BaseException | None]:
    returned: list[Any] = []
    raised: list[BaseException] = []

    async def call_async() -> Any:
        return await function(**arguments)

    def call() -> None:
        try:
            returned.append(asyncio.run(call_async()) if is_async(function) else function(**arguments))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, name="reward-check", daemon=True)
    thread.start()
    thread.join(limit_seconds)
    if thread.is_alive():
        return [], _TooSlow()
    return returned, raised[0] if raised else None
