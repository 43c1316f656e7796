"""Whether rewards still teach: shares of prompts, steps in a row, and the settings that ask for it."""

from pathlib import Path

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.recovery.rl.learnable import Learnable, learnable_fraction

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def test_prompts_whose_answers_earned_different_rewards_count():
    rewards = [("a", 0.0), ("a", 1.0), ("b", 1.0), ("b", 1.0), ("c", 0.1), ("c", 0.1 + 1e-9), ("d", 0.1), ("d", 0.0)]
    assert learnable_fraction(rewards) == 0.5


def test_only_steps_in_a_row_end_a_training():
    learnable = Learnable(least=0.1, patience=3)
    for share in (0.0, 0.05, 0.1, 0.0, 0.0):
        learnable.saw(share, 0.2)
        assert learnable.why is None
    learnable.saw(0.0625, 0.5)
    assert learnable.why == (
        "rewards teach nothing any more: in 3 steps at most 6.2% of the prompts had answers with different rewards "
        "(min_learnable_fraction 0.1); answers earned 0.3 on average"
    )
    learnable.begin_anew()  # it was cut
    assert learnable.why is None
    learnable.saw(0.0, 0.2)
    learnable.saw(0.5, 0.2)
    assert learnable.why is None and learnable.below == []


def test_by_default_nothing_ends_it():
    learnable = Learnable(least=0.0, patience=1)
    learnable.saw(0.0, 0.0)
    assert learnable.why is None


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            "demo_restart_cpu",
            ["recovery.min_learnable_fraction=0.1", "verl={trainer.v1.trainer_mode: sync}"],
            "min_learnable_fraction needs this project's own trainer, but verl's trainer.v1.trainer_mode names another",
        ),
        (
            "demo_restart_cpu",
            ["recovery.kl_loss=0.1", "recovery.kl_to=parent", "verl={trainer.v1.trainer_mode: sync}"],
            "kl_to parent needs this project's own trainer, but verl's trainer.v1.trainer_mode names another",
        ),
        (
            "demo_restart_cpu",
            ["recovery.min_learnable_fraction=0.1", "verl={algorithm.filter_groups.enable: true}"],
            "would see only prompts that verl's algorithm.filter_groups.enable has left; leave one of them out",
        ),
        (
            "demo_grpo_cpu",
            ["recovery.verl={trainer.v1.trainer_mode: sync}"],
            "in_place has a trainer of its own; leave verl's trainer.v1.trainer_mode alone",
        ),
        (
            "demo_distill_cpu",
            ["recovery.min_learnable_fraction=0.1"],
            "min_learnable_fraction watches rewards, which distill learns from with rewards: true",
        ),
    ],
)
def test_what_nobody_would_watch_is_refused(recipe, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPES / f"{recipe}.yaml", changes)


def test_a_trainer_of_ones_own_may_recover(tmp_path):
    config = load_config(RECIPES / "demo_restart_cpu.yaml", ["verl={trainer.v1.trainer_mode: mine}"])
    assert config.verl == {"trainer.v1.trainer_mode": "mine"}


@pytest.mark.parametrize(("steps", "ends"), [(8, [8]), (9, [8])])
def test_a_training_that_is_dead_up_to_its_last_step_says_so_once(steps, ends, monkeypatch):
    """As the defaults have it: 8 steps, and a patience of 8."""
    watched = pytest.importorskip("ptl_rl.recovery.rl.watched")
    monkeypatch.setattr(watched.PPOTrainerSync, "on_step_end", lambda self: None)
    trainer, told = object.__new__(watched.WatchedTrainer), []

    def end(why: str) -> None:
        told.append(trainer.global_steps)
        trainer._make_last()

    trainer._end = end
    trainer.learnable, trainer.ended, trainer.total_training_steps = Learnable(0.1, 8), False, steps
    for trainer.global_steps in range(1, steps + 1):
        trainer.learnable.saw(0.0, 0.1)
        trainer.on_step_end()
    assert told == ends
