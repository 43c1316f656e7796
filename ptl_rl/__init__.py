"""Compact reasoning language models gradually: prune a little, recover with RL, check, repeat.

``import ptl_rl`` costs next to nothing: what stands in ``__all__`` is imported from :mod:`ptl_rl.api` when it is first
asked for, and torch, ray and verl when a function is called. ``docs/python-api.md`` has examples.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptl_rl.api import RunResult, ScoreResult, evaluate, load_recipe, report, resume, run, score, slice
    from ptl_rl.errors import UserError

__all__ = [
    "RunResult",
    "ScoreResult",
    "UserError",
    "evaluate",
    "load_recipe",
    "report",
    "resume",
    "run",
    "score",
    "slice",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ptl_rl import api, errors

    found = getattr(errors if name == "UserError" else api, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
