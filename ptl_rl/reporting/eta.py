"""How long a run still takes, from how long its stages took so far. Cycles may train different numbers of steps."""

from collections.abc import Callable, Sequence
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


def _pace(entries: list[Entry], part: int, now: StageProgress) -> tuple[float, float] | None:
    """Seconds of start-up and seconds per step of one of a round's recoveries; ``now`` is it at work."""
    for entry in reversed(entries):
        steps = [row["step_seconds"] for row in entry.metrics.get("curve", []) if "step_seconds" in row]
        if entry.stage == "recover" and entry.part == part and steps:
            recent = now.step_seconds or steps
            return max(0.0, entry.seconds - sum(steps)), sum(recent) / len(recent)
    if now.step_seconds:
        total = sum(now.step_seconds)
        return max(0.0, now.elapsed_seconds - total), total / len(now.step_seconds)
    return None


def remaining_seconds(
    entries: list[Entry], state: State, stage: Stage, now: StageProgress, steps_of: Sequence[Callable[[int], int]]
) -> float | None:
    """Estimate for the whole run, gates that ask for more apart; None until every kind of stage has been seen.

    Args:
        steps_of: training steps of a planned cut, for every recovery of a round.
    """
    fixed, paces = _fixed_seconds(entries), []
    for part in range(len(steps_of)):
        at_work = stage.name == "recover" and stage.part == part
        paces.append(_pace(entries, part, now if at_work else StageProgress()))
    known = [pace for pace in paces if pace is not None]
    if stage.cycle == 0 or len(known) < len(paces):
        return None
    if any(name not in fixed for name in CYCLE_STAGES if name != "recover"):
        return None

    def recovery(part: int, planned: int) -> float:
        start_up, per_step = known[part]
        return start_up + steps_of[part](planned) * per_step

    def from_stage(name: str, part: int, planned: int) -> list[float]:
        """Seconds of all stages of a cycle from this one on."""
        names = CYCLE_STAGES[CYCLE_STAGES.index(name) :]
        seconds = [recovery(p, planned) for p in range(part, len(known))] if "recover" in names else []
        before = [fixed[n] for n in names if n in ("score", "slice")]
        return before + seconds + [fixed[n] for n in names if n in ("evaluate", "gate")]

    cut, *later = state.cuts
    this, *rest = from_stage(stage.name, stage.part, cut.planned)
    if stage.name == "recover" and now.step_seconds:
        left = (steps_of[stage.part](cut.planned) - len(now.step_seconds)) * known[stage.part][1]
    else:
        left = max(1.0, this - now.elapsed_seconds)
    return left + sum(rest) + sum(sum(from_stage("score", 0, cut.planned)) for cut in later)
