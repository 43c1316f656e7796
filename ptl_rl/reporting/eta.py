"""How long a run still takes, from how long its stages took so far. Cycles may train different numbers of steps."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ptl_rl.driver.journal import Entry
from ptl_rl.driver.state import CYCLE_STAGES, Stage, State


@dataclass
class StageProgress:
    """The stage at work."""

    elapsed_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    """Of every training step finished in it."""


def _fixed_seconds(entries: list[Entry]) -> dict[str, float]:
    """Stage name to what its last run took; the original model's evaluation stands in for the first of a cycle."""
    seconds = {e.stage: e.seconds for e in entries if e.stage != "recover"}
    return {**seconds, "gate": 0.0}


def _pace(entries: list[Entry], now: StageProgress) -> tuple[float, float] | None:
    """Seconds of start-up and seconds per step of a recovery."""
    for entry in reversed(entries):
        steps = [row["step_seconds"] for row in entry.metrics.get("curve", []) if "step_seconds" in row]
        if entry.stage == "recover" and steps:
            recent = now.step_seconds or steps
            return max(0.0, entry.seconds - sum(steps)), sum(recent) / len(recent)
    if now.step_seconds:
        total = sum(now.step_seconds)
        return max(0.0, now.elapsed_seconds - total), total / len(now.step_seconds)
    return None


def remaining_seconds(
    entries: list[Entry], state: State, stage: Stage, now: StageProgress, steps_of: Callable[[int], int]
) -> float | None:
    """Estimate for the whole run, gates that ask for more apart; None until every kind of stage has been seen.

    Args:
        steps_of: training steps of a planned cut.
    """
    fixed, pace = _fixed_seconds(entries), _pace(entries, now)
    if stage.cycle == 0 or pace is None or any(name not in fixed for name in CYCLE_STAGES if name != "recover"):
        return None
    start_up, per_step = pace

    def whole(name: str, planned: int) -> float:
        return start_up + steps_of(planned) * per_step if name == "recover" else fixed[name]

    cut, *later = state.cuts
    if stage.name == "recover" and now.step_seconds:
        left = (steps_of(cut.planned) - len(now.step_seconds)) * per_step
    else:
        left = max(1.0, whole(stage.name, cut.planned) - now.elapsed_seconds)
    left += sum(whole(name, cut.planned) for name in CYCLE_STAGES[CYCLE_STAGES.index(stage.name) + 1 :])
    return left + sum(whole(name, cut.planned) for cut in later for name in CYCLE_STAGES)
