"""A training in place that goes on with a sliced model: when, from where, and what a kill in between leaves."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from plans import plan_keeping

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.config.verl_keys import PARENT
from ptl_rl.families import read_shape
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.recovery.in_place.cuts import IN_CHECKPOINT, CutRecord, Cuts
from ptl_rl.recovery.in_place.shapes import Shapes, checkpoints_of, seconds_saved, verl_settings, with_shapes
from ptl_rl.stage import StageContext, StageSpec

ROOT = Path(__file__).resolve().parents[3]
DEMO, MODEL = ROOT / "recipes/demo_restart_cpu.yaml", ROOT / "ptl_rl/testbed/checkpoints/qwen2"


def plan_of(width: int, keep: int) -> PruningPlan:
    return plan_keeping([list(range(keep))] * 4, width)


def context_of(work: Path, *changes: str) -> StageContext:
    config = load_config(DEMO, ["schedule.mode=in_place", *changes])
    spec = StageSpec.model_construct(
        name="recover", round=0, part=0, planned=0, work=work, source=MODEL, steps=16, device="cpu"
    )
    return StageContext(config, spec)


def test_only_a_training_in_place_is_sliced_on_the_way():
    with pytest.raises(ConfigError, match="rematerialise is when_it_pays, but mode is restart, which slices before"):
        load_config(DEMO, ["schedule.mode=restart", "schedule.rematerialise=when_it_pays"])


def test_the_shapes_that_a_training_has_outlive_it(tmp_path):
    context = context_of(tmp_path)
    assert Shapes.load(tmp_path).cuts == 0 and with_shapes(context) is context and verl_settings(context) == {}
    assert checkpoints_of(context, "actor").folder == tmp_path / "checkpoints"
    Shapes(cuts=1, why=["smaller"]).save(tmp_path)
    Shapes(cuts=2, why=["smaller", "smallest"]).save(tmp_path)
    assert with_shapes(context).spec.source == tmp_path / "sliced/002"
    assert checkpoints_of(context, "actor").folder == tmp_path / "checkpoints-002"
    settings = verl_settings(context)
    assert settings["trainer.default_local_dir"] == str(tmp_path / "checkpoints-002")
    assert settings["trainer.val_before_train"] is False


def test_what_a_kill_has_left_half_written_goes_and_what_training_goes_on_from_stays(tmp_path):
    for name in ("checkpoints", "checkpoints-001", "checkpoints-002", "sliced/001", "sliced/002", "passed/8"):
        (tmp_path / name).mkdir(parents=True)
    Shapes(cuts=1).save(tmp_path)  # killed while the second was written
    checkpoints_of(context_of(tmp_path), "actor")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/") if path.name != "sliced")
    assert left == ["checkpoints-001", "passed"] and [path.name for path in (tmp_path / "sliced").iterdir()] == ["001"]


@pytest.mark.parametrize(("kl", "to", "held"), [(0.01, "start", True), (0.0, "start", True), (0.01, "parent", False)])
def test_the_policy_stays_held_to_what_its_training_began_with(kl, to, held, tmp_path):
    Shapes(cuts=1).save(tmp_path)
    changes = [f"recovery.kl_loss={kl}", *([f"recovery.kl_to={to}"] if kl else [])]
    settings = verl_settings(context_of(tmp_path, *changes))
    assert settings.get(PARENT) == (str(MODEL) if held else None)  # the parent's folder is rendered as ever


def test_what_smaller_shapes_save_goes_with_the_flops():
    shape = read_shape(MODEL)
    half = shape.sliced(channels=shape.intermediate_size // 2)
    share = 1 - half.flops_per_token() / shape.flops_per_token()
    assert 0.2 < share < 0.5 and seconds_saved(shape, half, 10, 6.0) == pytest.approx(60 * share)
    assert seconds_saved(shape, shape, 10, 6.0) == 0


class Trained:
    """A trainer after some steps, with what a worker and verl would do noted down."""

    def __init__(self, work: Path, rematerialise: str, *, step: int, made: int, sliced: int = 0) -> None:
        trainers = pytest.importorskip("ptl_rl.recovery.in_place.trainer")
        self.trainer = trainer = object.__new__(trainers.InPlaceTrainer)
        self.told: list[tuple] = []
        trainer.context = context_of(work, f"schedule.rematerialise={rematerialise}")
        trainer.config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(work / "checkpoints")))
        trainer.cuts = Cuts.of(trainer.context.config)
        widths = [640, 384, 256, 128]
        trainer.cuts.made = [
            CutRecord(after_step=4 * number, plan=plan_of(widths[number], widths[number + 1])) for number in range(made)
        ]
        trainer.shapes, trainer.ended, trainer.total_training_steps = Shapes(cuts=sliced), False, 16
        trainer.global_steps, trainer.saved_step = step, None
        trainer.step_seconds, trainer.start_seconds, trainer.aside = [60.0, 9.0, 10.0, 11.0, 10.0], 40.0, 0.0
        trainer.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: self.told.append(("sleep",)))
        trainer.actor_rollout_wg = SimpleNamespace(write_sliced=self.write_sliced)
        trainer._save_checkpoint = self.save

    def save(self) -> None:
        self.told.append(("save",))
        folder = self.trainer._step_folder()
        (folder / "actor").mkdir(parents=True)
        (folder / "data.pt").write_text("position")
        self.trainer._write_state()

    def write_sliced(self, context, plan, folder, old, new) -> None:
        assert folder.is_dir() and new.is_dir() and old.is_dir()
        self.told.append((plan.source_intermediate_size, plan.intermediate_size, folder.name, new.parent.parent.name))


def test_where_the_steps_that_are_left_save_more_than_a_start_the_policy_is_sliced(tmp_path):
    """12 steps of 10 s with two fifths of the FLOPs gone save 40 s and more, the last step alone does not."""
    early = Trained(tmp_path, "when_it_pays", step=4, made=2)
    why = early.trainer._why_slice()
    assert why is not None and why.startswith("after step 4 training went on with 4 blocks of 256 channels: 12 steps")
    assert Trained(tmp_path, "when_it_pays", step=15, made=2).trainer._why_slice() is None
    assert Trained(tmp_path, "after_every_cut", step=15, made=2).trainer._why_slice() is not None
    assert Trained(tmp_path, "after_every_cut", step=16, made=2).trainer._why_slice() is None  # nothing is left to do
    assert Trained(tmp_path, "after_every_cut", step=15, made=0).trainer._why_slice() is None
    assert Trained(tmp_path, "never", step=4, made=2).trainer._why_slice() is None


def test_a_policy_is_sliced_once_for_every_cut_and_by_what_is_still_zero(tmp_path):
    assert Trained(tmp_path, "after_every_cut", step=8, made=2, sliced=2).trainer._why_slice() is None
    again = Trained(tmp_path, "after_every_cut", step=8, made=2, sliced=1)
    assert (again.trainer._plan.source_intermediate_size, again.trainer._plan.intermediate_size) == (384, 256)


def test_a_sliced_policy_is_there_whole_before_it_counts(tmp_path):
    made = Trained(tmp_path, "after_every_cut", step=4, made=2)
    stale = tmp_path / "checkpoints-002/global_step_4/actor/half"
    stale.parent.mkdir(parents=True)
    stale.touch()
    made.trainer._go_on_sliced("as it pays")
    assert made.told == [("save",), ("sleep",), (640, 256, "002", "checkpoints-002")]
    new = tmp_path / "checkpoints-002/global_step_4"
    assert (new / "data.pt").read_text() == "position" and not stale.exists()
    assert len(json.loads((new / IN_CHECKPOINT).read_text())) == 2
    assert (new.parent / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert Shapes.load(tmp_path) == Shapes(cuts=2, why=["as it pays"])
    assert made.trainer.ended and made.trainer.total_training_steps == 4

    def killed(*_) -> None:
        raise KeyboardInterrupt

    later = Trained(tmp_path, "after_every_cut", step=8, made=3, sliced=2)
    later.trainer.actor_rollout_wg.write_sliced = killed
    with pytest.raises(KeyboardInterrupt):
        later.trainer._go_on_sliced("again")
    assert Shapes.load(tmp_path).cuts == 2 and not later.trainer.ended


def test_what_a_later_start_has_not_is_no_part_of_a_start(tmp_path):
    """The first cut and the first validation come before the first step, and before that step alone."""
    trainer = Trained(tmp_path, "when_it_pays", step=0, made=1).trainer
    trainer.started, trainer.start_seconds, trainer.aside = time.monotonic() - 100, math.inf, 70.0
    trainer._step_begins()
    assert trainer.start_seconds == pytest.approx(30, abs=1)
    trainer.aside = 95.0
    trainer._step_begins()
    assert trainer.start_seconds == pytest.approx(30, abs=1)


def test_a_trainer_that_comes_back_early_without_a_result_is_told_as_that(tmp_path):
    finish = pytest.importorskip("ptl_rl.recovery.in_place.finish")
    with pytest.raises(RuntimeError, match="verl's trainer ended without making all of 16 steps"):
        finish.train_in_place(context_of(tmp_path), None, lambda context, follower, more: None, "actor")
