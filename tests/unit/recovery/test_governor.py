"""The pace: a cut once validation is back, patience while it is not, at the end the smallest model that passed."""

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import parse_config
from ptl_rl.recovery.in_place.cuts import CutRecord
from ptl_rl.recovery.in_place.governor import Governor, Passed
from ptl_rl.recovery.rl.outcome import Outcome

GRPO = {"recovery": [{"grpo": {"steps": 40}}]}


def schedule(**fields):
    return {"mode": "in_place", "pace": "governed", "channels_total": 512, **fields}


def test_a_cut_waits_until_validation_is_back():
    governor = Governor(share=0.9, patience=8, baseline=0.8)
    governor.has_cut(0)
    found = [governor.judge(step, accuracy, False) for step, accuracy in ((2, 0.1), (4, 0.5), (6, 0.719), (8, 0.72))]
    assert found == ["go on", "go on", "go on", "cut"]
    governor.has_cut(8)
    assert governor.judge(10, 0.3, False) == "go on"  # worse than before the cut, and yet the best since


def test_patience_counts_from_the_last_gain():
    governor = Governor(share=0.9, patience=6, baseline=0.8)
    governor.has_cut(10)
    accuracies = [(12, 0.2), (14, 0.4), (16, 0.4), (18, 0.39)]
    assert [governor.judge(step, accuracy, False) for step, accuracy in accuracies] == ["go on"] * 4
    assert governor.judge(20, 0.4, False) == "end"


@pytest.mark.parametrize("why", ["at the target", "no cut fits"])
def test_where_nothing_more_can_go_the_steps_that_are_left_improve_what_is_there(why):
    governor = Governor(share=0.9, patience=6, baseline=0.8)
    governor.has_cut(0)
    if why == "no cut fits":
        governor.is_stuck("so", 0.8)
    at_target = why == "at the target"
    found = [governor.judge(step, accuracy, at_target) for step, accuracy in ((2, 0.75), (6, 0.8), (10, 0.79))]
    assert found == ["go on"] * 3 and governor.judge(12, 0.8, at_target) == "end"


def test_a_better_model_may_have_room_for_a_cut_that_did_not_fit():
    governor = Governor(share=0.9, patience=20, baseline=0.8)
    governor.is_stuck("so", 0.75)
    assert [governor.judge(2, accuracy, False) for accuracy in (0.74, 0.75, 0.76)] == ["go on", "go on", "cut"]
    governor.is_stuck("so", 0.76)
    assert governor.judge(4, 0.76, False) == "go on"
    governor.has_cut(6)
    assert governor.stuck == "" and governor.judge(8, 0.72, False) == "cut"


def test_the_smallest_that_passed_is_kept_and_of_its_size_the_best():
    governor = Governor(share=0.9, patience=6, baseline=0.8)
    assert not governor.is_better(0.71, 1) and governor.is_better(0.72, 1)
    governor.passed = Passed(folder="a", cuts=1, step=2, accuracy=0.8)
    assert not governor.is_better(0.79, 1) and governor.is_better(0.81, 1)
    assert governor.is_better(0.72, 2) and not governor.is_better(0.5, 2)  # smaller, but it is not back


def test_what_it_has_seen_and_ended_with_is_read_again(tmp_path):
    governor = Governor(share=0.9, patience=6, baseline=0.8, passed=Passed(folder="a", cuts=1, step=2, accuracy=0.8))
    assert Governor.model_validate_json(governor.model_dump_json()) == governor
    assert Outcome.load(tmp_path) is None
    outcome = Outcome(folder="a", made=list[CutRecord](), steps=7, why="so")
    outcome.save(tmp_path)
    assert Outcome.load(tmp_path) == outcome and [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"schedule": schedule(mode="restart")}, "pace governed needs mode in_place"),
        ({"schedule": schedule(channels_total=None)}, "finds the cuts itself: set channels_total or target, and no"),
        ({"schedule": schedule(channels_per_cycle=128)}, "finds the cuts itself: set channels_total or target, and no"),
        (
            {"schedule": schedule(), "recovery": [{"grpo": {"steps": [4, 8]}}]},
            "governed has one number of steps, all that it may make, but recovery.steps is a list",
        ),
        (
            {
                "schedule": schedule(),
                "calibration": {"source": "rollouts"},
                "recovery": [{"grpo": {"steps": 1}}],
            },
            "makes its first cut by rollouts, after a step; set recovery.steps to 2 or more",
        ),
    ],
)
def test_settings_that_say_two_things_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**GRPO, **sections})


def test_one_that_says_what_is_needed_is_accepted():
    config = parse_config({**GRPO, "schedule": schedule()})
    assert config.schedule.channel_steps == [512] and config.schedule.channels_sum == 512
