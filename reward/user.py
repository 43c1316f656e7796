"""The file that ptl-rl gives to verl: a user's reward function, or the built-in one, behind the guard.

    reward.custom_reward_function.path=<this file>
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.user_path=/path/to/my_reward.py
    +reward.custom_reward_function.reward_kwargs.user_name=my_function

verl fixes whether a reward function is awaited when it loads the file, before it knows the user's. Hence one
coroutine function. It waits for the shipped functions, which bound themselves, in the event loop's thread pool, and
for a user's in a process of its own (`reward.calls`). (verl's `remote` reward manager takes no coroutine functions;
its others do.)
"""

import asyncio
import functools
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward import compute_score as builtin
from reward.calls import CALL_SECONDS, UserFunction
from reward.guard import guard
from reward.load import load_function

_loaded: dict[tuple[Any, ...], Callable[..., Any]] = {}
_loaded_lock = threading.Lock()


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    user_path: str | None = None,
    user_name: str = "compute_score",
    user_keys: Mapping[str, str] | None = None,
    user_seconds: float = CALL_SECONDS,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return the guarded result of the function `user_name` of the file `user_path`, loaded once per process.

    Without `user_path` the built-in reward is used. `user_keys` are the keys that the function returns (see
    `check.reward_keys`); all other keyword arguments are passed on. Raises RewardError if the file cannot be
    loaded; errors of the function itself, and calls that are given up after `user_seconds`, become score 0.0 and
    `reward_error` 1.0.
    """
    loop = asyncio.get_running_loop()
    function = await loop.run_in_executor(None, _guarded, user_path, user_name, user_keys, user_seconds)
    call = functools.partial(function, data_source, solution_str, ground_truth, extra_info, **kwargs)
    return dict(await (call() if isinstance(function, UserFunction) else loop.run_in_executor(None, call)))


def _guarded(
    user_path: str | None, user_name: str, user_keys: Mapping[str, str] | None, user_seconds: float = CALL_SECONDS
) -> Callable[..., Any]:
    wanted = (user_path, user_name, None if user_keys is None else tuple(sorted(user_keys.items())), user_seconds)
    with _loaded_lock:
        if wanted not in _loaded:
            if user_path is None:
                _loaded[wanted] = guard(builtin.compute_score, keys=builtin.KEYS)
            elif Path(user_path).resolve().is_relative_to(Path(__file__).resolve().parent):
                _loaded[wanted] = guard(load_function(user_path, user_name), name=user_name, keys=user_keys)
            else:
                _loaded[wanted] = UserFunction(user_path, user_name, user_keys, user_seconds)
        return _loaded[wanted]


def _forget_after_fork() -> None:
    """A forked child must not talk through its parent's pipes, nor inherit a lock that someone holds."""
    global _loaded_lock
    _loaded.clear()
    _loaded_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
