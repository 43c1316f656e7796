"""The governed trainer's bookkeeping, with verl's own parts (rollouts, updates, saving) replaced by stand-ins."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptl_rl.pruning.live import NoCutFits
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.recovery.in_place.cuts import CutRecord, Cuts, CutsLost
from ptl_rl.recovery.in_place.governor import Governor, NothingToKeep
from ptl_rl.recovery.in_place.shapes import Shapes
from ptl_rl.recovery.rl.learnable import Learnable
from ptl_rl.recovery.rl.outcome import Outcome

TARGET = 4
"""Channels of 6 that are to go; a cut takes 2."""


class Workers:
    """Writes nothing but a name."""

    def write_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights")


@pytest.fixture
def trainer_class(monkeypatch):
    """The trainer, above a parent that does nothing at a step's end and saves only a tracker."""
    governed = pytest.importorskip("ptl_rl.recovery.in_place.governed")
    from verl.trainer.ppo.v1 import PPOTrainerSync
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    def save(self) -> None:
        (Path(self.config.trainer.default_local_dir) / "tracker").write_text(str(self.global_steps))

    def load(self) -> None:
        tracker = Path(self.config.trainer.default_local_dir) / "tracker"
        self.global_steps = int(tracker.read_text()) if tracker.exists() else 0

    monkeypatch.setattr(PPOTrainer, "_save_checkpoint", save)
    monkeypatch.setattr(PPOTrainer, "_load_checkpoint", load)
    monkeypatch.setattr(PPOTrainer, "on_train_begin", lambda self: None)
    monkeypatch.setattr(PPOTrainerSync, "on_step_end", lambda self: None)
    monkeypatch.setattr(PPOTrainer, "_validate", lambda self: {"val-core/x/acc/mean@1": next(self.accuracies)})

    class Trainer(governed.GovernedTrainer):
        accuracies: Iterator[float]
        fits = True

        def __init__(self, folder: Path, accuracies: list[float], steps: int = 100) -> None:
            work = folder / ".recovered.work"
            (work / "checkpoints").mkdir(parents=True, exist_ok=True)
            schedule = SimpleNamespace(validate_every=2, channels_sum=TARGET, damages=[0.1], patience=6, recovered=0.9)
            schedule.rematerialise = "never"
            spec = SimpleNamespace(work=work, cuts=folder / "cuts", source=folder)
            config = SimpleNamespace(schedule=schedule, calibration=SimpleNamespace(source="both"))
            recovery = SimpleNamespace(learning_rate_schedule="constant")
            self.context = SimpleNamespace(spec=spec, config=config, recovery=recovery)  # type: ignore[assignment]
            self.config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(work / "checkpoints")))
            nothing = SimpleNamespace(sleep_replicas=lambda: None, update_weights=lambda step: None)
            self.checkpoint_manager, self.actor_rollout_wg = nothing, Workers()
            self.governor, self.cuts = Governor(share=0.9, patience=6), Cuts([], [])
            self.batch, self.save_asked, self.saved, self.saved_step = None, False, None, None
            self.shapes, self.aside = Shapes.load(work), 0.0
            self.allowed: list[float | None] = []
            self.timing_raw: dict = {}
            self.learnable, self.ended = Learnable(0.1, 2), False
            self.total_training_steps, self.accuracies = steps, iter(accuracies)
            self._load_checkpoint()

        def _rollouts(self, batch) -> list:
            return []

        @property
        def width(self) -> int:
            return 6 - 2 * len(self.cuts.made)

        def _cut(self, cut, rollouts, step: int, max_damage: float | None = None) -> None:
            assert cut.channels == self.left
            self.allowed.append(max_damage)
            if not self.fits:
                raise NoCutFits("the smallest cut does too much; raise schedule.max_damage")
            plan = PruningPlan(
                keep_channels=[list(range(self.width - 2))],
                keep_layers=[0],
                layer_order=[],
                source_intermediate_size=self.width,
                alignment=1,
                channel_criterion="obs",
                layer_criterion="leave_one_out",
                subset_hash="",
                source="",
            )
            self.cuts.made.append(CutRecord(after_step=step, plan=plan))
            self.learnable.begin_anew()

        def step(self, share: float) -> None:
            self.learnable.saw(share, reward=0.1)

        def run(self, until: int | None = None) -> list[int]:
            """Steps as verl makes them; gives the widths that they were made with."""
            if not self.global_steps:
                self._validate()
            self.global_steps += 1
            self.on_train_begin()
            widths = []
            while self.global_steps <= min(self.total_training_steps, until or 10**9):
                widths.append(self.width)
                self.on_step_end()
                self.global_steps += 1
            return widths

        def outcome(self) -> Outcome:
            found = Outcome.load(self.work)
            assert found is not None and (self.work / found.folder / "model.safetensors").exists()
            return found

        def kept(self) -> list[str]:
            return sorted(path.name for path in (self.work / "passed").glob("*"))

    return Trainer


def test_a_cut_by_rollouts_alone_waits_for_the_first_of_them(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.8, 0.8])
    trainer.context.config.calibration.source = "rollouts"
    assert trainer.run(until=4) == [6, 4, 2, 2]
    assert [record.after_step for record in trainer.cuts.made] == [1, 2]  # after one step, and then as always
    again = trainer_class(tmp_path, [])
    assert (again.global_steps, len(again.cuts.made)) == (2, 2)  # each cut was followed by a checkpoint


def test_where_not_even_the_first_cut_by_rollouts_fits_nothing_is_called_done(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.8])
    trainer.context.config.calibration.source, trainer.fits = "rollouts", False
    with pytest.raises(NoCutFits, match="raise it, in a new run"):
        trainer.run()


def test_it_ends_with_the_smallest_that_passed_once_rewards_teach_nothing(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.76, 0.3, 0.2])
    widths = trainer.run(until=2)
    assert widths == [4] * 2 and len(trainer.cuts.made) == 2
    for share in (0.0, 0.0625):
        trainer.step(share)
    trainer.on_step_end()  # validated before it ends
    assert trainer.ended and trainer.total_training_steps == trainer.global_steps == 3
    assert not trainer.outcome().learns
    outcome = trainer.outcome()
    assert (outcome.folder, len(outcome.made), outcome.steps) == ("passed/000002", 1, 3)
    assert outcome.why.startswith(
        "rewards teach nothing any more: in 2 steps at most 6.2% of the prompts had answers with different rewards "
        "(min_learnable_fraction 0.1); answers earned 0.1 on average; the smallest that passed, of step 2"
    )


def test_where_nothing_is_left_to_learn_as_all_is_right_it_is_cut_and_goes_on(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.8, 0.3])
    trainer.context.config.schedule.validate_every = 100
    trainer.run(until=1)
    for _ in range(2):
        trainer.step(0.0)
    trainer.on_step_end()
    assert not trainer.ended and len(trainer.cuts.made) == 2 and Outcome.load(trainer.work) is None


def test_it_cuts_when_it_is_back_and_ends_with_the_best_at_the_target(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.5, 0.75, 0.7, 0.73, 0.76, 0.75, 0.74, 0.76])
    # Cuts before step 1 and after step 4; from then on the best is looked for, until six steps bring nothing.
    assert trainer.run() == [4] * 4 + [2] * 12
    outcome = trainer.outcome()
    assert (outcome.steps, len(outcome.made), outcome.folder) == (16, 2, "passed/000010")
    assert outcome.why == "6 steps brought nothing more; the target, of step 10, with 76.0% on validation"
    assert trainer.total_training_steps == 16
    assert sorted(path.name for path in (tmp_path / "cuts").iterdir()) == ["001", "002"]


def test_what_did_not_get_back_is_given_up_for_the_smallest_that_did(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.75, 0.1, 0.2, 0.15, 0.2, 0.1])
    assert trainer.run() == [4, 4] + [2] * 10
    outcome = trainer.outcome()
    assert (len(outcome.made), outcome.folder) == (1, "passed/000002")
    assert "the smallest that passed, of step 2, with 75.0%" in outcome.why
    assert "2 channels did not get back to 90% of the start's accuracy" in outcome.why


def test_where_none_gets_back_it_ends_with_the_last_and_says_so(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.1, 0.2, 0.1], steps=5)
    trainer.run()
    outcome = trainer.outcome()
    assert (outcome.folder, len(outcome.made), outcome.steps) == ("passed/last", 1, 5)
    assert outcome.why.startswith("the steps are spent; no model got back to 90% of the start's accuracy")


def test_a_killed_training_goes_on_with_all_that_it_had_seen(trainer_class, tmp_path):
    accuracies = [0.8, 0.75, 0.3, 0.6]
    trainer_class(tmp_path, accuracies).run(until=6)
    again = trainer_class(tmp_path, [0.72, 0.7, 0.7, 0.7, 0.7])
    assert again.global_steps == 2 and again.governor.baseline == 0.8 and len(again.cuts.made) == 2
    assert again.governor.passed is not None and again.governor.passed.cuts == 1
    assert again.run() == [2] * 8  # from step 3 on
    assert again.outcome().folder == "passed/000004" and len(again.outcome().made) == 2


def test_a_folder_that_was_moved_keeps_its_models(trainer_class, tmp_path):
    trainer_class(tmp_path / "old", [0.8, 0.75, 0.3]).run(until=4)
    shutil.move(tmp_path / "old", tmp_path / "new")
    again = trainer_class(tmp_path / "new", [0.1] * 9)
    again.run()
    assert again.outcome().folder == "passed/000002"


def test_a_model_of_smaller_shapes_is_kept_with_the_cuts_that_are_sliced_off_of_it(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.76, 0.3, 0.2, 0.1, 0.1])
    trainer.shapes = Shapes(cuts=1)
    trainer.run()
    assert (trainer.outcome().sliced, len(trainer.outcome().made)) == (1, 1)
    passed = trainer_class(tmp_path, []).governor.passed
    assert passed is not None and passed.sliced == 1


def test_few_models_are_kept_at_a_time(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.75, *(0.73 + 0.001 * step for step in range(40))])
    trainer.run(until=60)
    assert trainer.kept() == ["000002", "000060"]  # of the last checkpoint, and of now
    trainer.save_asked = True
    trainer.global_steps = 61
    trainer.on_step_end()
    assert trainer.kept() == ["000060"]


def test_a_checkpoint_that_verl_asks_for_is_written_after_the_cut(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.75])
    trainer.run(until=1)
    trainer.global_steps = 2
    trainer._save_checkpoint()
    assert not list(trainer.work.glob("checkpoints/global_step_*"))
    trainer.on_step_end()
    written = Cuts([], [])
    written.load(trainer.work / "checkpoints/global_step_2/cuts.json")
    assert len(written.made) == 2


def test_rewards_that_are_dead_when_the_steps_are_spent_are_told(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.3, 0.3, 0.3, 0.3], steps=3)
    trainer.context.config.schedule.validate_every = 100
    trainer.run(until=2)
    for _ in range(2):
        trainer.step(0.0)
    trainer.on_step_end()
    assert trainer.outcome().why.startswith("the steps are spent; rewards teach nothing any more")
    assert not trainer.outcome().learns


def test_a_first_cut_may_do_more_damage_than_later_ones(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8] * 9)
    trainer.context.config.schedule.damages = [0.3, 0.1]
    trainer.run(until=4)
    assert trainer.allowed == [0.3, 0.1]
    trainer.fits = False
    with pytest.raises(NoCutFits):
        trainer._cut_as_far_as_it_goes([], 9)
    assert trainer.allowed == [0.3, 0.1, 0.1]


def test_where_no_cut_fits_any_more_the_model_is_trained_on(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.75, 0.78, 0.7, 0.7, 0.7, 0.7])  # tried after steps 2 and 4
    trainer.run(until=1)
    trainer.fits = False
    trainer.global_steps -= 1
    trainer.run()
    outcome = trainer.outcome()
    assert (outcome.folder, len(outcome.made)) == ("passed/000004", 1)
    assert "the smallest cut does too much; raise schedule.max_damage" in outcome.why


def test_where_not_even_the_first_cut_fits_the_setting_is_named(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8])
    trainer.fits = False
    with pytest.raises(NoCutFits, match=r"raise schedule\.max_damage; raise it, in a new run"):
        trainer.run()


def test_a_model_that_solves_nothing_is_refused(trainer_class, tmp_path):
    with pytest.raises(NothingToKeep, match=r"data\.validation, of which the uncut model solves nothing"):
        trainer_class(tmp_path, [0.0]).run()


def test_a_checkpoint_without_what_was_seen_is_refused(trainer_class, tmp_path):
    trainer = trainer_class(tmp_path, [0.8, 0.75, 0.3])
    trainer.run(until=4)
    (trainer.work / "checkpoints/global_step_2/governor.json").unlink()
    with pytest.raises(CutsLost, match=r"governor.json: .* or delete .*checkpoints, and the training begins anew"):
        trainer_class(tmp_path, [0.8])
