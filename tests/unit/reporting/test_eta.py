"""The estimate is arithmetic on what stages took, and counts each cycle's own number of steps."""

import pytest

from ptl_rl.driver.journal import Entry
from ptl_rl.driver.state import Stage, State
from ptl_rl.planning.schedule import Cut
from ptl_rl.reporting.eta import StageProgress, remaining_seconds

CUTS = [Cut(64, 0, 0), Cut(32, 0, 1), Cut(16, 0, 2)]
STEPS = [2, 5, 10]


def entry(cycle: int, stage: str, seconds: float, **metrics) -> Entry:
    return Entry(cycle=cycle, stage=stage, round=0, seconds=seconds, metrics=metrics)


EARLIER = [
    entry(0, "evaluate", 11),
    entry(1, "score", 7),
    entry(1, "slice", 6),
    entry(1, "recover", 60, curve=[{"step": 0}, {"step": 1, "step_seconds": 8}, {"step": 2, "step_seconds": 12}]),
    entry(1, "evaluate", 9),
    entry(1, "gate", 0),
]
START_UP, PER_STEP, REST = 40, 10, 7 + 6 + 9


def remaining(entries, cuts, stage, elapsed=0.0, steps=()) -> float | None:
    state = State(cuts=list(cuts), alignment=16, cycle=stage.cycle)
    return remaining_seconds(
        entries,
        state,
        stage,
        StageProgress(elapsed, step_seconds=list(steps)),
        lambda planned, _: [("grpo", STEPS[planned])],
    )


def test_later_cycles_count_their_own_steps():
    assert remaining(EARLIER, CUTS[1:], Stage(2, "score"), 3) == (
        (7 - 3) + 6 + START_UP + 5 * PER_STEP + 9 + REST + START_UP + 10 * PER_STEP
    )


def test_steps_that_were_not_measured_are_made_all_the_same():
    state = State(cuts=CUTS[1:], alignment=16, cycle=2)
    now = StageProgress(100, done=4, step_seconds=[20.0])
    left = remaining_seconds(EARLIER, state, Stage(2, "recover"), now, lambda planned, _: [("grpo", STEPS[planned])])
    assert left == (5 - 4) * 20 + 9 + REST + START_UP + 10 * 20


def test_within_a_recovery_its_own_pace_counts():
    later = REST + START_UP + 10 * 20
    assert remaining(EARLIER, CUTS[1:], Stage(2, "recover"), 100, [20, 20]) == 3 * 20 + 9 + later


def test_the_first_recovery_gives_an_estimate_after_one_step():
    entries = EARLIER[:3]
    assert remaining(entries, CUTS, Stage(1, "recover"), 30) is None
    rest = [7 + 6 + 50 + steps * 4 + 11 for steps in STEPS[1:]]
    assert remaining(entries, CUTS, Stage(1, "recover"), 54, [4]) == 4 + 11 + sum(rest)


def test_a_stage_that_takes_longer_than_before_has_at_least_a_second_left():
    last = remaining(EARLIER, CUTS[2:], Stage(3, "evaluate"), 500)
    assert last == pytest.approx(1.0)


def test_nothing_is_said_before_anything_is_known():
    assert remaining([], CUTS, Stage(0, "evaluate")) is None
    assert remaining(EARLIER[:1], CUTS, Stage(1, "score")) is None


def test_each_way_of_recovery_has_its_own_pace():
    cpt = entry(1, "recover", 25, method="cpt", curve=[{"step": n, "step_seconds": 2} for n in (1, 2)])
    entries, cuts = [*EARLIER[:3], cpt, *EARLIER[3:]], CUTS[1:2]
    state = State(cuts=cuts, alignment=16, cycle=2)

    def seconds(stage, now, grpo_steps=5):
        ways = [("cpt", 10), ("grpo", grpo_steps)]
        return remaining_seconds(entries, state, stage, now, lambda planned, unlearnable: ways)

    whole = 7 + 6 + (21 + 10 * 2) + (START_UP + 5 * PER_STEP) + 9
    assert seconds(Stage(2, "score"), StageProgress()) == whole
    assert seconds(Stage(2, "recover"), StageProgress(30, step_seconds=[4, 4])) == 8 * 4 + START_UP + 5 * PER_STEP + 9
    assert seconds(Stage(2, "recover", part=1), StageProgress(60, step_seconds=[20])) == 4 * 20 + 9
