"""How long a run still takes, from how long its stages took so far. Cycles may train different numbers of steps."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ptl_rl.driver.journal import Entry
from ptl_rl.driver.state import CYCLE_STAGES, Stage, State


@dataclass
class StageProgress:
    """The stage at work."""

    elapsed_seconds: float = 0.0
    done: int = 0
    """Training steps that are finished, by earlier attempts, too."""
    step_seconds: list[float] = field(default_factory=list)
    """Of the training steps that it has finished and measured."""


def _fixed_seconds(entries: list[Entry]) -> dict[str, float]:
    """Stage name to what its last run took; the original model's evaluation stands in for the first of a cycle."""
    seconds = {e.stage: e.seconds for e in entries if e.stage != "recover"}
    return {**seconds, "gate": 0.0}


def _pace(entries: list[Entry], method: str, now: StageProgress) -> tuple[float, float] | None:
    """Seconds of start-up and seconds per step of a way of recovery; ``now`` is it at work."""
    for entry in reversed(entries):
        steps = [row["step_seconds"] for row in entry.metrics.get("curve", []) if "step_seconds" in row]
        if entry.stage == "recover" and entry.metrics.get("method", "grpo") == method and steps:
            recent = now.step_seconds or steps
            return max(0.0, entry.seconds - sum(steps)), sum(recent) / len(recent)
    if now.step_seconds:
        total = sum(now.step_seconds)
        return max(0.0, now.elapsed_seconds - total), total / len(now.step_seconds)
    return None


class _Unknown(Exception):
    """How long something takes has not been seen yet."""


def remaining_seconds(
    entries: list[Entry],
    state: State,
    stage: Stage,
    now: StageProgress,
    recoveries: Callable[[int, bool], list[tuple[str, int]]],
) -> float | None:
    """Estimate for the whole run, gates that ask for more apart; None until every kind of stage has been seen.

    Args:
        recoveries: method and training steps of every recovery that follows a planned cut, and, where rewards taught
            nothing, once more.
    """
    if stage.cycle == 0:
        return None
    fixed, cut = _fixed_seconds(entries), state.cuts[0]
    own = recoveries(cut.planned, state.is_rescuing)
    at_work = own[stage.part][0] if stage.name == "recover" else None

    def seconds(name: str, recovery: tuple[str, int] | None = None) -> float:
        if recovery is None:
            if name not in fixed:
                raise _Unknown
            return fixed[name]
        method, steps = recovery
        pace = _pace(entries, method, now if method == at_work else StageProgress())
        if pace is None:
            raise _Unknown
        return pace[0] + steps * pace[1]

    def from_stage(first: str, part: int, recovery_list: list[tuple[str, int]]) -> list[float]:
        """Of all stages of a cycle from this one on."""
        found = []
        for name in CYCLE_STAGES[CYCLE_STAGES.index(first) :]:
            if name == "recover":
                skip = part if first == "recover" else 0
                found += [seconds(name, recovery) for recovery in recovery_list[skip:]]
            else:
                found.append(seconds(name))
        return found

    try:
        this, *rest = from_stage(stage.name, stage.part, own)
        later = [
            took
            for following in state.cuts[1:]
            for took in from_stage("score", 0, recoveries(following.planned, False))
        ]
    except _Unknown:
        return None
    if stage.name == "recover" and now.step_seconds:
        method, steps = own[stage.part]
        pace = _pace(entries, method, now)
        assert pace is not None
        left = (steps - max(now.done, len(now.step_seconds))) * pace[1]
    else:
        left = max(1.0, this - now.elapsed_seconds)
    return left + sum(rest) + sum(later)
