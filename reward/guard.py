"""Keep a user's reward function from ending a run that has cost days.

In verl an exception in one sample's reward fails the whole step, a NaN poisons the policy, and a value that
cannot be averaged breaks the next validation. The guard turns each of these into score 0.0 and
`reward_error` 1.0, names the sample once per distinct error, and gives every sample the same keys.
"""

import asyncio
import functools
import inspect
import json
import logging
import math
import numbers
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("reward")

ERRORS_VARIABLE = "PTL_REWARD_ERRORS"
_RESPONSE_CHARS = 200
# Not the reward function's own failures: someone wants this process or task to stop.
_NOT_OURS = (KeyboardInterrupt, GeneratorExit, asyncio.CancelledError)

Value = float | str | None


class BadReturn(TypeError):
    """A reward function returned something else than a finite number or a dict with such a `score`."""


def guard(
    user_function: Callable[..., Any], *, name: str | None = None, keys: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """Wrap a reward function so that it always returns a dict with `score` and `reward_error`.

    A sample fails if the function raises, or returns what `as_result` refuses: it then gets score 0.0 and
    `reward_error` 1.0. Each distinct error is logged once per process, with the sample, and appended as a
    JSON line to the file named by the environment variable PTL_REWARD_ERRORS. The wrapper is a coroutine
    function if `user_function` is one.

    `keys` lists the further keys of the dict as {key: "number" | "text"}, as `check.reward_keys` finds them.
    Every sample then has exactly these: 0.0 or "" in a failed sample, None (which verl leaves out of its
    means) where a good one lacks the key; other keys are dropped. Without `keys` they are learned from what
    the function returns, so that samples that fail before the first success have fewer keys. `name` is used
    in messages.
    """
    guarded = Guarded(user_function, name or str(getattr(user_function, "__qualname__", user_function)), keys)
    return guarded.as_coroutine_function() if is_async(user_function) else guarded.as_function()


def is_async(function: Callable[..., Any]) -> bool:
    """True for coroutine functions, partials of them, and objects whose `__call__` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


def as_result(value: Any) -> dict[str, Value]:
    """Return a reward function's value as a dict that verl can aggregate, `score` included.

    A number becomes `score` and `acc`, as in verl. In a dict, numbers (numpy's and bools too) become float,
    None and non-finite numbers None, all else text, which verl skips in its means. Raises BadReturn unless
    the score is a finite number.
    """
    if inspect.iscoroutine(value):
        value.close()
        raise BadReturn("returned a coroutine: declare the function itself with `async def`")
    if isinstance(value, Mapping):
        if "score" not in value:
            raise BadReturn("returned a dict without 'score'")
        return {
            "score": _score(value["score"]),
            **{str(k): _extra(v) for k, v in value.items() if k != "score"},
        }
    score = _score(value)
    return {"score": score, "acc": score}


def kinds_of(result: Mapping[str, Value]) -> dict[str, str]:
    """Return {key: "number" | "text"} for what a result holds beside `score`; a None counts as a number."""
    return {
        key: "text" if isinstance(value, str) else "number"
        for key, value in result.items()
        if key not in ("score", "reward_error")
    }


def _number(value: Any) -> float | None:
    """Return a scalar as float, or None; `item` reads scalars of numpy and torch without importing them."""
    if hasattr(value, "item") and not isinstance(value, numbers.Real):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # more than one element
            return None
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        return math.inf


def _score(value: Any) -> float:
    score = _number(value)
    if score is None:
        raise BadReturn(f"returned a {type(value).__name__} for a score: return a number or a dict with 'score'")
    if not math.isfinite(score):
        raise BadReturn(f"returned {score} for a score: it must be finite")
    return score


def _extra(value: Any) -> Value:
    number = _number(value)
    if number is not None:
        return number if math.isfinite(number) else None
    return None if value is None else str(value)


class Guarded:
    """The state of one guarded function: the keys known so far and the errors reported so far.

    `reward.calls` has the function in another process, and only `failure` here.
    """

    def __init__(self, function: Callable[..., Any] | None, name: str, keys: Mapping[str, str] | None) -> None:
        self.function: Callable[..., Any] = function or _nothing
        self.name = name
        self.fixed = keys is not None
        self.kinds = {key: kind for key, kind in (keys or {}).items() if key not in ("score", "reward_error")}
        self.reported: set[tuple[str, ...]] = set()
        self.lock = threading.Lock()

    def as_function(self) -> Callable[..., Any]:
        @functools.wraps(self.function)
        def guarded(
            data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None, **kwargs: Any
        ) -> dict[str, Value]:
            sample = _call_arguments(data_source, solution_str, ground_truth, extra_info)
            try:
                return self.success(self.function(**sample, **kwargs))
            except _NOT_OURS:
                raise
            # SystemExit too, and math-verify's TimeoutException, which is no Exception either.
            except BaseException as error:
                return self.failure(error, sample)

        return guarded

    def as_coroutine_function(self) -> Callable[..., Any]:
        @functools.wraps(self.function)
        async def guarded(
            data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any = None, **kwargs: Any
        ) -> dict[str, Value]:
            sample = _call_arguments(data_source, solution_str, ground_truth, extra_info)
            try:
                return self.success(await self.function(**sample, **kwargs))
            except _NOT_OURS:
                raise
            except BaseException as error:
                return self.failure(error, sample)

        return guarded

    def success(self, value: Any) -> dict[str, Value]:
        result = as_result(value)
        known = self.learn(result)
        extras = {key: _as_kind(result.get(key), kind) for key, kind in known.items()}
        return {"score": result["score"], **extras, "reward_error": 0.0}

    def learn(self, result: Mapping[str, Value]) -> dict[str, str]:
        """Return the kinds of keys that are known, `result`'s among them."""
        kinds = kinds_of(result)
        with self.lock:
            if not self.fixed:
                # A key that holds None says nothing about its kind yet; verl takes the key as absent.
                self.kinds = {k: v for k, v in kinds.items() if result[k] is not None} | self.kinds
            return dict(self.kinds)

    def failure(self, error: BaseException, sample: Mapping[str, Any], *, always: bool = False) -> dict[str, Value]:
        """Report an error, the first of its kind or `always`, and return what its sample gets."""
        place = _place(error)
        distinct = (type(error).__name__, str(error) if isinstance(error, BadReturn) else place)
        with self.lock:
            first_time = always or distinct not in self.reported
            self.reported.add(distinct)
            known = dict(self.kinds)
        if first_time:
            try:
                _report(self.name, error, place, sample)
            except BaseException:  # an error whose own __str__ fails, say, or exits
                logger.exception("cannot describe an error of reward function %s at %s", self.name, place)
        return {
            "score": 0.0,
            **{k: "" if v == "text" else 0.0 for k, v in known.items()},
            "reward_error": 1.0,
        }


def _nothing(**_: Any) -> None:
    """Stand for a function that is called elsewhere."""


def _call_arguments(data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Any) -> dict[str, Any]:
    return {
        "data_source": data_source,
        "solution_str": solution_str,
        "ground_truth": ground_truth,
        "extra_info": extra_info,
    }


def _as_kind(value: Value, kind: str) -> Value:
    """A key that is a number here and text there cannot be averaged: the first kind seen holds."""
    if value is None:
        return None
    if kind == "text":
        return str(value)
    return None if isinstance(value, str) else value


def _place(error: BaseException) -> str:
    """Return file:line of the innermost frame: with the type, it tells errors apart whatever they say."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"


def _report(name: str, error: BaseException, place: str, sample: Mapping[str, Any]) -> None:
    extra_info = sample["extra_info"]
    index = extra_info.get("index") if isinstance(extra_info, Mapping) else None
    record = {
        "time": time.time(),
        "pid": os.getpid(),
        "function": name,
        "error": f"{type(error).__name__}: {error}",
        "place": place,
        "data_source": sample["data_source"],
        "index": index,
        "response": str(sample["solution_str"])[:_RESPONSE_CHARS],
    }
    logger.error(
        "reward function %s failed on data_source=%s index=%s (score 0.0; further errors of this kind are "
        "counted in reward_error only): %s; response starts %r",
        *(name, record["data_source"], index, record["error"], record["response"]),
        exc_info=error,
    )
    path = os.environ.get(ERRORS_VARIABLE)
    if path:
        try:
            _append_line(Path(path), json.dumps(record, default=str) + "\n")
        except OSError as problem:
            logger.error("cannot append to %s=%s: %s", ERRORS_VARIABLE, path, problem)


def _append_line(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write with O_APPEND: many reward workers share the file.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
