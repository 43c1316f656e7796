"""The run's state, folded from its journal, and the one function that says what comes next.

Pure: the same journal and configuration always give the same next stage, which is all that resuming needs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from ptl_rl.config import RunConfig
from ptl_rl.driver.gate import can_judge
from ptl_rl.driver.journal import Entry
from ptl_rl.planning.schedule import Cut, halved, planned_cuts

CYCLE_STAGES = ("score", "slice", "recover", "evaluate", "gate")
ORIGINAL = "original"
"""Stands for the unpruned model wherever a checkpoint of the run is meant."""


@dataclass(frozen=True)
class Stage:
    """One piece of work. Cycle 0 only evaluates the original model."""

    cycle: int
    name: str
    round: int = 0
    """How often the cycle's recoveries were asked for again before."""
    part: int = 0
    """Which of the recipe's recoveries it is, from 0."""

    @property
    def suffix(self) -> str:
        """Tells apart what the stages of one name in one cycle leave."""
        return (f"-{self.round}" if self.round else "") + (f"-part{self.part + 1}" if self.part else "")

    @property
    def label(self) -> str:
        return f"{self.cycle:03d}-{self.name}{self.suffix}"


def stage_of(entry: Entry) -> Stage:
    """What ``entry`` says is finished."""
    return Stage(entry.cycle, entry.stage, entry.round, entry.part)


@dataclass
class State:
    """What the journal amounts to."""

    cuts: list[Cut]
    """Cuts still to be made, the current cycle's first."""
    alignment: int
    parts_of: Callable[[int, bool], int] = lambda planned, unlearnable: 1
    """How many recoveries follow a planned cut, and, where rewards taught nothing, once more."""
    cycle: int = 0
    """The cycle in progress, or the last one."""
    round: int = 0
    done: set[Stage] = field(default_factory=set)
    """Of the cycle in progress."""
    source: str = ORIGINAL
    """Checkpoint that the cycle in progress starts from, relative to the run folder."""
    recovered: str | None = None
    baseline: float | None = None
    accuracy: float | None = None
    retries: int = 0
    removed_layers: int = 0
    in_place: bool = False
    """Whether the recovery cuts, too."""
    learns: bool = True
    """Whether another round of the cycle's last recovery might bring more."""
    rescue_round: int | None = None
    """Of the cycle in progress, the round whose recoveries are those for dead rewards."""
    stopped: bool = False

    @property
    def is_rescuing(self) -> bool:
        """Whether the round in progress is that one."""
        return self.rescue_round == self.round

    @property
    def rounds(self) -> int:
        """Of recovery that the cycle in progress has had or is having, the one for dead rewards apart."""
        return self.round + 1 - (self.rescue_round is not None)


def _apply_gate(state: State, decision: str) -> None:
    if decision in ("extend", "rescue"):
        state.round += 1
        if decision == "rescue":
            state.rescue_round = state.round
        return
    cut = state.cuts.pop(0)
    if decision in ("accept", "accept_below"):
        state.source = state.recovered or state.source
        state.removed_layers += cut.layers
    elif decision == "retry":
        state.retries += 1
        state.cuts = (halved(cut, state.alignment) or []) + state.cuts
    else:
        state.stopped = True
    state.cycle += 1
    state.round, state.done, state.recovered, state.rescue_round = 0, set(), None, None


def fold(config: RunConfig, entries: list[Entry]) -> State:
    """The state after ``entries``."""
    alignment = config.schedule.alignment * config.resources.tensor_parallel_size
    state = State(cuts=planned_cuts(config.schedule), alignment=alignment)
    state.in_place = config.schedule.mode == "in_place"
    state.parts_of = lambda planned, unlearnable: len(config.recoveries(planned, unlearnable))
    for entry in entries:
        state.done.add(stage_of(entry))
        if entry.stage == "recover":
            state.recovered = entry.artefact
            # Of several recoveries one whose rewards taught nothing is enough: the same again would bring it again.
            state.learns = bool(entry.metrics.get("learns", True)) and (entry.part == 0 or state.learns)
        elif entry.stage == "evaluate":
            state.accuracy = float(entry.metrics["accuracy"])
            if entry.cycle == 0:
                state.baseline, state.cycle, state.done = state.accuracy, 1, set()
                state.stopped = not can_judge(config, state.accuracy)
        elif entry.stage == "gate":
            _apply_gate(state, entry.metrics["decision"])
    return state


def next_stage(state: State) -> Stage | None:
    """What to do next; None when the run is complete."""
    if state.baseline is None:
        return Stage(0, "evaluate")
    if state.stopped or not state.cuts:
        return None
    for name in CYCLE_STAGES[2 * (state.cuts[0].is_empty or state.in_place) :]:
        round_ = state.round if name in ("recover", "evaluate", "gate") else 0
        parts = state.parts_of(state.cuts[0].planned, state.is_rescuing) if name == "recover" else 1
        for part in range(parts):
            stage = Stage(state.cycle, name, round_, part)
            if stage not in state.done:
                return stage
    raise AssertionError(f"cycle {state.cycle} has no open stage")  # the gate entry always closes a round


def data_subsets(config: RunConfig) -> int:
    """Into how many disjoint subsets the training data is split: one for every cycle that the run may need.

    A cycle that is taken back has used its subset, and two cycles with half its cut follow.
    """
    return len(planned_cuts(config.schedule)) + 2 * config.gate.max_retries
