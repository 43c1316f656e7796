"""Cuts within one training: when they are due, what is kept of them, and what verl is told."""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plans import plan_keeping

from ptl_rl.config import ConfigError
from ptl_rl.config.in_place import CutInPlace, cuts_in_place
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.driver.journal import Entry
from ptl_rl.driver.state import Stage, fold, next_stage
from ptl_rl.families import read_shape
from ptl_rl.planning.schedule import (
    check_cuts,
    methods_and_steps,
    planned_cuts,
    recovery_steps,
)
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.recovery.in_place.cuts import CutRecord, Cuts, CutsLost, as_it_was_cut, publish
from ptl_rl.recovery.rl.outcome import Outcome
from ptl_rl.stage import StageSpec

DEMO = Path(__file__).resolve().parents[3] / "recipes/demo_restart_cpu.yaml"


def config_of(*changes: str):
    return load_config(DEMO, ["schedule.mode=in_place", *changes])


def plan_of(width: int, keep: list[int]) -> PruningPlan:
    return plan_keeping([keep, keep], width)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "schedule={mode: in_place, pace: governed, channels_total: 64, layers_total: 1}",
            "pace governed finds widths only, but layers_total is 1; use pace fixed or geometric",
        ),
        ("recovery=[{grpo: {}}, {grpo: {}}]", "in_place cuts within one recovery, but recovery is grpo, grpo"),
        ("recovery_of_cycle={1: [{grpo: {}}]}", "in_place has one training, but recovery_of_cycle names several"),
        ("schedule={mode: in_place, recover_only: true}", "recover_only cuts nothing, but mode is in_place"),
        (
            "schedule={mode: in_place, pace: governed, channels_total: 64}",
            "governed does not know its last cut; set recovery.learning_rate_schedule to constant",
        ),
        (
            "recovery.verl={actor_rollout_ref.actor.optim.lr_scheduler_type: cosine}",
            "in_place lets the learning rate fall itself with cosine_after_cuts; leave verl's actor_rollout_ref.actor",
        ),
        ("schedule.mode=restart", "learning_rate_schedule cosine_after_cuts is of a training with several cuts; set"),
    ],
)
def test_what_cannot_be_in_place_is_refused(change, message):
    falls = ["recovery.learning_rate_schedule=cosine_after_cuts"] if "rate" in message else []
    with pytest.raises(ConfigError, match=message):
        config_of(change, *falls)


@pytest.mark.parametrize(
    ("changes", "mode", "rematerialise"),
    [
        ([], "in_place", "when_it_pays"),
        (["schedule.rematerialise=after_every_cut"], "in_place", "after_every_cut"),
        (["schedule.rematerialise=never"], "in_place", "never"),
        (["recovery=[{cpt: {}}]"], "in_place", "when_it_pays"),
        (["gate.max_retries=1"], "restart", "never"),  # a cycle may be taken back
        (["recovery=[{cpt: {}}, {grpo: {}}]"], "restart", "never"),
        (["recovery_of_cycle={1: [{grpo: {}}]}"], "restart", "never"),
        (["schedule={mode: auto, recover_only: true}"], "restart", "never"),
        (["schedule={mode: auto, pace: governed, channels_total: 64}", "recovery.steps=9"], "in_place", "when_it_pays"),
    ],
)
def test_auto_is_in_place_where_the_recipe_can_be(changes, mode, rematerialise):
    schedule = config_of("schedule.mode=auto", *changes).schedule
    assert (schedule.mode, schedule.rematerialise) == (mode, rematerialise)


def test_what_follows_dead_rewards_is_no_part_of_the_training_in_place():
    rescue = "recovery_if_unlearnable=[{cpt: {verl: {engine.ulysses_sequence_parallel_size: 2}}}]"
    changes = ["recovery.min_learnable_fraction=0.1", "gate.min_accuracy_ratio=0.9", rescue]
    assert config_of("schedule.mode=auto", *changes).schedule.mode == "in_place"
    assert config_of(*changes).recovery_if_unlearnable[0].method == "cpt"


def test_auto_with_a_pace_that_only_one_mode_has_says_what_is_in_its_way():
    with pytest.raises(ConfigError, match="pace governed judges by the policy's own answers, but recovery is cpt"):
        config_of("schedule={mode: auto, pace: governed, channels_total: 64}", "recovery=[{cpt: {}}]")


@pytest.mark.parametrize("damage", ["0", "[]", "[0.3, -1]", ".inf"])
def test_a_damage_that_no_cut_can_have_is_refused(damage):
    with pytest.raises(ConfigError, match=r"max_damage .* give one number or several, each above 0 and finite"):
        config_of(f"schedule={{mode: in_place, pace: governed, channels_total: 64, max_damage: {damage}}}")


def test_cpt_is_cut_in_place_at_a_fixed_pace_only():
    found = config_of("recovery=[{cpt: {steps: [3, 5]}}]")
    assert recovery_steps(found, 0) == 8 and [cut.after_step for cut in cuts_in_place(found)] == [0, 3]
    with pytest.raises(ConfigError, match="pace governed judges by the policy's own answers, but recovery is cpt"):
        config_of("schedule={mode: in_place, pace: governed, channels_total: 64}", "recovery=[{cpt: {}}]")


def test_every_cut_comes_before_its_steps():
    config = config_of("schedule.channels_per_cycle=[256,64,64]", "recovery.steps=[4,24]")
    assert cuts_in_place(config) == [CutInPlace(256, 0, 0), CutInPlace(64, 0, 4), CutInPlace(64, 0, 28)]
    assert [(cut.channels, cut.layers) for cut in planned_cuts(config.schedule)] == [(384, 0)]
    assert recovery_steps(config, 0) == 52 and methods_and_steps(config, 0) == [("grpo", 52)]
    assert recovery_steps(config, 0, round_=1) == 24  # those of the last cut, where the gate asks for more


@pytest.mark.parametrize(
    ("order", "cuts"),
    [
        ("channels_then_layers", [(256, 0, 0), (128, 0, 4), (0, 1, 28)]),
        ("together", [(256, 1, 0), (128, 0, 4)]),
        ("alternating", [(256, 0, 0), (0, 1, 4), (128, 0, 28)]),
    ],
)
def test_blocks_go_in_the_order_that_cycles_have(order, cuts):
    config = config_of("schedule.layers_total=1", f"schedule.order={order}", "recovery.steps=[4,24]")
    assert cuts_in_place(config) == [CutInPlace(*cut) for cut in cuts]
    assert [(cut.channels, cut.layers) for cut in planned_cuts(config.schedule)] == [(384, 1)]
    assert recovery_steps(config, 0) == 4 + 24 * (len(cuts) - 1)


def test_blocks_with_biases_that_would_go_on_learning_are_refused_before_the_run():
    shape = read_shape(DEMO.parents[1] / "ptl_rl/testbed/checkpoints/qwen2")
    config = config_of("schedule.layers_total=1")
    check_cuts(config, shape)
    for field in ("attention_bias", "mlp_bias"):
        with pytest.raises(ConfigError, match=r"removes blocks in place, .* biases .* set schedule.mode to restart"):
            check_cuts(config, replace(shape, **{field: True}))
        check_cuts(config_of(), replace(shape, **{field: True}))


def test_a_cut_in_the_middle_must_leave_an_aligned_width():
    config = config_of("schedule.channels_per_cycle=[250,134]")
    with pytest.raises(ConfigError, match="cut 1 leaves 390 channels per layer, which is not a multiple of 16"):
        check_cuts(config, read_shape(DEMO.parents[1] / "ptl_rl/testbed/checkpoints/qwen2"))


def test_a_run_is_one_cycle_that_neither_scores_nor_slices():
    config, entries, stages = config_of("gate.max_extensions=1", "gate.max_retries=1"), [], []
    for metrics in ({"accuracy": 0.8}, {}, {"accuracy": 0.1}, {"decision": "extend"}, {}, {"accuracy": 0.8}):
        stage = next_stage(fold(config, entries))
        assert stage is not None
        stages.append(stage.label)
        finished = Entry(cycle=stage.cycle, stage=stage.name, round=stage.round, artefact="cycles/x", metrics=metrics)
        entries.append(finished)
        if stage == Stage(1, "recover"):
            entries.insert(-1, Entry(cycle=1, stage="cut", part=1, artefact="cycles/001/cuts/001"))
    assert stages == ["000-evaluate", "001-recover", "001-evaluate", "001-gate", "001-recover-1", "001-evaluate-1"]
    entries.append(Entry(cycle=1, stage="gate", round=1, metrics={"decision": "accept"}))
    assert next_stage(fold(config, entries)) is None


def test_cuts_are_due_once(tmp_path):
    cuts = Cuts.of(config_of())
    assert cuts.due(0) == CutInPlace(256, 0, 0)
    cuts.made.append(CutRecord(after_step=0, plan=plan_of(6, [0, 2, 3, 5])))
    assert cuts.due(0) is None and cuts.due(3) is None and cuts.due(4) == CutInPlace(128, 0, 4)
    assert cuts.due(7) == CutInPlace(128, 0, 4)  # of a training that was resumed with other steps
    cuts.made.append(CutRecord(after_step=4, plan=plan_of(4, [1, 3]), facts={"loss": 0.5}))
    assert cuts.due(100) is None
    cuts.save(tmp_path / "global_step_4/cuts.json")
    again = Cuts.of(config_of())
    again.load(tmp_path / "global_step_4/cuts.json")
    assert again.made == cuts.made


@pytest.mark.parametrize("content", [None, "[{", '[{"after_step": 1}]'])
def test_a_checkpoint_that_does_not_say_what_was_cut_is_refused(content, tmp_path):
    path = tmp_path / "cuts.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CutsLost, match="cannot go on without knowing what it has cut"):
        Cuts.of(config_of()).load(path)


def test_every_cut_has_a_folder_that_stays(tmp_path):
    records = [CutRecord(after_step=0, plan=plan_of(6, [0, 2, 3, 5]), facts={"intermediate_size": 4})]
    publish(tmp_path, records)
    written = (tmp_path / "001/plan.json").stat().st_mtime_ns
    publish(tmp_path, [*records, CutRecord(after_step=4, plan=plan_of(4, [1, 3]))])
    assert (tmp_path / "001/plan.json").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "001/cut.json").read_text()) == {"after_step": 0, "intermediate_size": 4}
    assert PruningPlan.load(tmp_path / "002/plan.json") == plan_of(4, [1, 3])
    publish(tmp_path, [CutRecord(after_step=0, plan=plan_of(6, [1, 2, 3, 5]), facts={"intermediate_size": 4.5})])
    assert PruningPlan.load(tmp_path / "001/plan.json").keep_channels[0] == [1, 2, 3, 5]  # cut again after a kill
    assert sorted(path.name for path in tmp_path.iterdir()) == ["001", "002"]


def test_a_training_whose_rewards_teach_nothing_makes_its_planned_cuts_all_the_same():
    """They teach nothing where everything is right, too, and then the next cut is what is missing."""
    trainers = pytest.importorskip("ptl_rl.recovery.in_place.trainer")
    trainer = object.__new__(trainers.InPlaceTrainer)
    trainer.cuts = Cuts.of(config_of())
    for _ in trainer.cuts.planned:
        assert not trainer.may_end
        trainer.cuts.made.append(CutRecord(after_step=0, plan=plan_of(6, [0, 2, 3, 5])))
    assert trainer.may_end


def test_the_policy_is_written_as_each_cut_leaves_it_and_the_last_three_stay(tmp_path):
    trainers = pytest.importorskip("ptl_rl.recovery.in_place.trainer")
    trainer = object.__new__(trainers.InPlaceTrainer)
    trainer.context = SimpleNamespace(spec=SimpleNamespace(work=tmp_path))
    trainer.cuts = Cuts.of(config_of())
    written = []

    def write(folder: Path) -> None:
        written.append(folder.name)
        (folder / "model.safetensors").touch()

    trainer.actor_rollout_wg = SimpleNamespace(write_weights=write)
    for _ in range(5):
        trainer.cuts.made.append(CutRecord(after_step=0, plan=plan_of(6, [0, 2, 3, 5])))
        trainer._keep_as_cut()
    assert written == ["001", "002", "003", "004", "005"]
    assert sorted(path.name for path in as_it_was_cut(tmp_path, 1).parent.iterdir()) == ["003", "004", "005"]


class Scheduled:
    """AdamW and a warm-up of two steps, as a worker has them, told when the last of the cuts comes."""

    def __init__(self, last_cut: int, steps: int) -> None:
        actor = pytest.importorskip("ptl_rl.recovery.in_place.worker").PruningActor
        parameter = torch.nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.AdamW([parameter], lr=2.0)
        warm = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda done: min(1.0, (done + 1) / 2))
        engine = SimpleNamespace(lr_scheduler=warm)
        actor.decay_after(SimpleNamespace(policy=engine), last_cut, steps)
        self.scheduler = engine.lr_scheduler

    def rates(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.scheduler.step()
        return found


def test_the_learning_rate_is_constant_until_the_last_cut_and_falls_after_it():
    whole = Scheduled(3, 8).rates(9)
    assert whole == pytest.approx(
        [1, 2, 2, 2, *(1 + math.cos(math.pi * share) for share in (0.2, 0.4, 0.6, 0.8)), 0], abs=1e-9
    )
    first, second = Scheduled(3, 8), Scheduled(3, 8)
    assert first.rates(5) == whole[:5]
    for name in ("optimizer", "scheduler"):  # as a checkpoint keeps them
        getattr(second, name).load_state_dict(getattr(first, name).state_dict())
    assert second.rates(4) == pytest.approx(whole[5:])
    assert Scheduled(0, 4).rates(4)[-1] == pytest.approx(1 + math.cos(math.pi * 0.75))
    assert Scheduled(8, 8).rates(9)[2:] == [2] * 6 + [2]  # a last cut that no step follows


@pytest.mark.parametrize("falls", [True, False])
def test_the_workers_are_told_when_the_last_cut_comes(falls, monkeypatch):
    trainers = pytest.importorskip("ptl_rl.recovery.in_place.trainer")
    monkeypatch.setattr(trainers.WatchedTrainer, "on_train_begin", lambda self: None)
    schedule = "cosine_after_cuts" if falls else "cosine"
    trainer, told = object.__new__(trainers.InPlaceTrainer), []
    config = config_of(f"recovery.learning_rate_schedule={schedule}")
    trainer.context = SimpleNamespace(recovery=config.recovery[0])
    trainer.cuts, trainer.global_steps, trainer.total_training_steps = Cuts.of(config), 9, 16
    trainer.context.config = config
    trainer.cuts.made = [CutRecord(after_step=step, plan=plan_of(6, [0, 2, 3, 5])) for step in (0, 4)]
    trainer.actor_rollout_wg = SimpleNamespace(decay_after=lambda *steps: told.append(steps))
    trainer.on_train_begin()
    assert told == ([(4, 16)] if falls else [])


@pytest.fixture
def slice_told(tmp_path, monkeypatch):
    """Factory: ends a training with so many of three cuts; gives what was sliced and what the journal is told."""
    finish = pytest.importorskip("ptl_rl.recovery.in_place.finish")
    sliced: list[tuple[int, str, str]] = []
    widths: list[int] = []
    """Of what was sliced."""

    class Workers:
        def slice(self, plan, source=None, out=None) -> None:
            sliced.append((plan.intermediate_size, *(path.name if path else "" for path in (source, out))))
            widths.append(plan.source_intermediate_size)

        def verify(self, plan, texts) -> list[float]:
            return [0.0]

    monkeypatch.setattr(finish, "worker_group", lambda context: Workers())
    monkeypatch.setattr(finish.ray, "shutdown", lambda: None)
    spec = StageSpec.model_construct(work=tmp_path, out=tmp_path / "out", progress=tmp_path / "progress")

    @dataclass
    class Context:
        spec: StageSpec
        config: SimpleNamespace
        data = SimpleNamespace(worked_solutions=lambda: [])
        reports = 0

        def connect_ray(self) -> None:
            pass

        def report(self, *_: int) -> None:
            self.reports += 1

    def told(cuts: int, *, wanted: bool = True, off: int = 0, off_before_the_last: int = 0):
        """``off`` cuts are sliced off of the model, and ``off_before_the_last`` were when the last cut was made."""
        sliced.clear()
        widths.clear()
        shutil.rmtree(spec.out, ignore_errors=True)
        spec.out.mkdir()
        made = [
            CutRecord(after_step=n, plan=plan_of(6 - n, list(range(5 - n))), sliced=off_before_the_last)
            for n in range(cuts)
        ]
        context = Context(spec, SimpleNamespace(evaluation=SimpleNamespace(after_cut=wanted)))
        monkeypatch.setattr(finish, "nothing_cut", lambda source: plan_of(6, list(range(6))))
        outcome = Outcome(folder="passed/8", made=made, sliced=off, steps=8, why="spent")
        metrics = finish.slice_trained(context, outcome)
        metrics["widths"] = list(widths)
        metrics["plan"] = PruningPlan.load(spec.out / "plan.json")
        assert context.reports >= 2  # slicing starts workers, and takes as long as it takes
        return list(sliced), metrics

    for number in (1, 2, 3):
        as_it_was_cut(tmp_path, number).mkdir(parents=True)
    return told


def test_of_the_policies_as_cut_that_of_the_models_own_last_cut_is_sliced(slice_told, tmp_path):
    assert slice_told(2)[0] == [(4, "", ""), (4, "002", "after_cut")]  # the third cut did not get back
    assert slice_told(3)[0] == [(3, "", ""), (3, "003", "after_cut")]
    assert slice_told(2, wanted=False)[0] == [(4, "", "")]
    assert slice_told(0)[0] == [(6, "", "")]  # there was no cut to make
    assert slice_told(2)[1]["notes"] == ["spent"]


def test_what_was_sliced_on_the_way_is_not_sliced_again(slice_told):
    """The model by what is still zero of it, that right after the last cut by what was zero then, the plan by all."""
    _, metrics = slice_told(3, off=2, off_before_the_last=1)
    assert metrics["widths"] == [4, 5] and metrics["intermediate_size"] == 3
    assert (metrics["plan"].source_intermediate_size, metrics["plan"].intermediate_size) == (6, 3)
    _, metrics = slice_told(3, off=3, off_before_the_last=2)
    assert metrics["widths"] == [6, 4]  # nothing is left to slice, of whatever shape (a stand-in says 6 here)


def test_a_policy_as_cut_that_is_gone_is_told(slice_told, tmp_path):
    shutil.rmtree(as_it_was_cut(tmp_path, 2))
    sliced, metrics = slice_told(2)
    assert sliced == [(4, "", "")]
    assert metrics["notes"][1].startswith("the model right after its last cut is gone")


def test_other_modes_stay_as_they_were():
    config = parse_config({"schedule": {"channels_per_cycle": [128, 128]}, "recovery": [{"grpo": {"steps": [1, 3]}}]})
    assert [cut.channels for cut in planned_cuts(config.schedule)] == [128, 128]
    assert [recovery_steps(config, planned) for planned in (0, 1)] == [1, 3]


def test_offloaded_weights_come_back_to_be_written(tmp_path):
    """NCCL gathers nothing from host memory; verl's engine loads them within its modes."""
    workers, told = pytest.importorskip("ptl_rl.recovery.in_place.worker"), []

    @contextmanager
    def eval_mode():
        told.append("loaded")
        yield
        told.append("offloaded")

    manager = SimpleNamespace(write_shards=lambda folder: told.append(folder.name))
    worker = object.__new__(workers.PruningTrainer)
    worker.engine = SimpleNamespace(eval_mode=eval_mode, checkpoint_manager=manager)
    worker.write_weights(tmp_path / "last")
    assert told == ["loaded", "last", "offloaded"]
