"""The file that ptl-rl gives to verl: a user's reward function, or the built-in one, behind the guard.

    reward.custom_reward_function.path=<this file>
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.user_path=/path/to/my_reward.py
    +reward.custom_reward_function.reward_kwargs.user_name=my_function

verl fixes whether a reward function is awaited when it loads the file, before it knows the user's. Hence one
coroutine function that awaits an async user function, and runs any other in the event loop's thread pool,
which is where verl itself would run it. (verl's `remote` reward manager takes no coroutine functions; its
others do.)
"""

import asyncio
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

from reward import compute_score as builtin
from reward.guard import guard, is_async
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
    **kwargs: Any,
) -> dict[str, Any]:
    """Return the guarded result of the function `user_name` of the file `user_path`, loaded once per process.

    Without `user_path` the built-in reward is used. `user_keys` are the keys that the function returns (see
    `check.reward_keys`); all other keyword arguments are passed on. Raises RewardError if the file cannot be
    loaded; errors of the function itself become score 0.0 and `reward_error` 1.0.
    """
    function = _guarded(user_path, user_name, user_keys)
    call = functools.partial(function, data_source, solution_str, ground_truth, extra_info, **kwargs)
    if is_async(function):
        result = await call()
    else:
        result = await asyncio.get_running_loop().run_in_executor(None, call)
    return dict(result)


def _guarded(user_path: str | None, user_name: str, user_keys: Mapping[str, str] | None) -> Callable[..., Any]:
    wanted = (user_path, user_name, None if user_keys is None else tuple(sorted(user_keys.items())))
    with _loaded_lock:
        if wanted not in _loaded:
            if user_path is None:
                _loaded[wanted] = guard(builtin.compute_score, keys=builtin.KEYS)
            else:
                function = load_function(user_path, user_name)
                _loaded[wanted] = guard(function, name=f"{user_name} of {user_path}", keys=user_keys)
        return _loaded[wanted]
