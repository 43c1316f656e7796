"""Cuts within continued pre-training: verl's own loop, with stand-ins for its workers that note what they are asked."""

import inspect
import json
import shutil
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plans import plan_keeping
from process_ranks import run_ranks
from sft_runs import PROBLEM, engine_of, loss_of_step, sft_config

from ptl_rl.config.in_place import CutInPlace
from ptl_rl.data.corpora import Record
from ptl_rl.recovery.in_place.cuts import IN_CHECKPOINT, Cuts, CutsLost
from ptl_rl.recovery.in_place.shapes import Shapes
from ptl_rl.recovery.sequences import SequenceFile, write_sequences

WIDTHS = [48, 32, 16, 8]


@pytest.fixture
def make_trainer(tmp_path, make_checkpoint, tokenizer, monkeypatch):
    """Factory: a trainer of three cuts, before step 1 and after steps 2 and 4, and what was asked of its workers."""
    supervised = pytest.importorskip("ptl_rl.recovery.in_place.supervised")
    from verl.trainer import sft_trainer_ray
    from verl.utils import tensordict_utils as tu

    path, model, read = tmp_path / "s.arrow", make_checkpoint("llama"), []
    records = [Record(f"How much is {n} + {n * 7}?", f"\\boxed{{{n * 8}}}", str(n * 8), "s", str(n)) for n in range(32)]
    write_sequences(records, tokenizer, path, suffix="", max_tokens=64, response_only=False)  # four steps an epoch
    monkeypatch.setattr(sft_trainer_ray.Tracking, "log", lambda self, data, step: None)

    def make(
        rematerialise: str = "never", save_every: int = 0, steps: int = 6, dies_after: int = 99, schedule="cosine"
    ):
        told: list = []
        work = tmp_path / "work"
        verl = sft_config(tmp_path, model, path, 1, steps=steps)
        verl.trainer.total_training_steps, verl.trainer.save_freq, verl.trainer.logger = steps, save_every or steps, []
        verl.trainer.resume_mode = "auto"
        verl.trainer.default_local_dir = str(work / Shapes.load(work).checkpoints)

        class Client:
            def train_batch(self, data):
                read.append(sorted(tuple(ids.tolist()) for ids in data["input_ids"].unbind()))
                told.append(f"step {len([t for t in told if t.startswith('step')]) + 1}")
                if len(told) > dies_after:
                    raise KeyboardInterrupt
                metrics = {name: torch.tensor(0.0) for name in ("loss", "grad_norm", "lr", "mfu")}
                return types.SimpleNamespace(get=lambda: tu.get_tensordict({}, {"metrics": metrics}))

            def _query_dispatch_info(self, name):
                return [0]

            def save_checkpoint(self, local_path, global_step, max_ckpt_to_keep):
                told.append(f"save {global_step}")

            def load_checkpoint(self, path):
                told.append(f"load {Path(path).name}")

            def decay_after(self, step, steps):
                told.append(f"rate falls from {step} to {steps}")

            def check_can_slice(self):
                assert rematerialise != "never"

            def cut(self, context, rollouts, texts, general, made, sliced, channels, layers, subset, max_damage):
                assert (
                    not rollouts
                    and max_damage is None
                    and context.spec.source.name == (f"{sliced:03d}" if sliced else model.name)
                )
                told.append(f"cut {len(made)}")
                before, after = WIDTHS[len(made) : len(made) + 2]
                plan = plan_keeping([list(range(after))] * 3, before)
                return [(plan, {})]

            def write_sliced(self, context, plan, folder, old, new):
                told.append(f"slice {plan.source_intermediate_size} to {plan.intermediate_size}")
                (folder / "config.json").write_text((model / "config.json").read_text())

        monkeypatch.setattr(
            supervised.CuttingSequenceTrainer, "_build_engine", lambda s: setattr(s, "training_client", Client())
        )
        config = SimpleNamespace(
            schedule=SimpleNamespace(rematerialise=rematerialise),
            calibration=SimpleNamespace(sequences=4),
            evaluation=SimpleNamespace(after_cut=False),
            prompt_suffix="",
        )
        planned = [CutInPlace(16, 0, 0), CutInPlace(16, 0, 2), CutInPlace(8, 0, 4)]
        monkeypatch.setattr(Cuts, "of", classmethod(lambda cls, _: cls(planned, [])))
        data = SimpleNamespace(worked_solutions=lambda: [PROBLEM] * 8, contrast=lambda: [])
        spec = SimpleNamespace(work=work, cuts=tmp_path / "cuts", source=model)
        spec.model_copy = lambda update: SimpleNamespace(**{**vars(spec), **update})
        monkeypatch.setattr("ptl_rl.recovery.in_place.shapes.StageContext", lambda config, spec: context_of(spec))

        def context_of(spec):
            recovery = SimpleNamespace(learning_rate_schedule=schedule)
            return SimpleNamespace(config=config, spec=spec, data=data, recovery=recovery)

        return supervised.CuttingSequenceTrainer(verl, context_of(spec)), told

    make.read = read  # type: ignore[attr-defined]
    return make


def test_every_cut_comes_between_its_steps_and_is_saved_and_told_after_it(make_trainer, tmp_path):
    trainer, told = make_trainer()
    trainer.fit()
    assert told == [
        *("cut 0", "step 1", "step 2", "cut 1", "save 2", "step 3", "step 4", "cut 2", "save 4", "step 5", "step 6"),
        "save 6",
    ]
    assert sorted(path.name for path in (tmp_path / "cuts").iterdir()) == ["001", "002", "003"]
    made = [
        len(json.loads((tmp_path / f"work/checkpoints/global_step_{n}" / IN_CHECKPOINT).read_text())) for n in (2, 4, 6)
    ]
    assert made == [2, 3, 3]


def test_a_checkpoint_that_verl_wants_before_a_cut_waits_for_it(make_trainer):
    trainer, told = make_trainer(save_every=1)
    trainer.fit()
    assert [line for line in told if "step" not in line] == [
        *("cut 0", "save 1", "cut 1", "save 2", "save 3", "cut 2", "save 4", "save 5", "save 6")
    ]


def test_the_rate_falls_from_the_last_cut_on_at_every_start(make_trainer):
    _, told = make_trainer(schedule="cosine_after_cuts")
    assert told == ["rate falls from 4 to 6"]


def test_killed_it_goes_on_with_the_cuts_of_its_checkpoint(make_trainer, tmp_path):
    trainer, told = make_trainer(dies_after=5)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert told[-2:] == ["save 2", "step 3"]
    trainer, told = make_trainer()
    trainer.fit()
    assert told == ["load global_step_2", "step 1", "step 2", "cut 2", "save 4", "step 3", "step 4", "save 6"]
    (tmp_path / "work/checkpoints/global_step_6" / IN_CHECKPOINT).unlink()
    with pytest.raises(CutsLost, match="cannot go on without knowing what it has cut"):
        make_trainer()


def test_it_goes_on_with_the_sliced_model_from_the_step_where_it_stood(make_trainer, tmp_path):
    trainer, told = make_trainer("after_every_cut")
    trainer.fit()
    assert told == ["cut 0", "step 1", "save 1", "slice 48 to 32"] and trainer.ended
    trainer, told = make_trainer("after_every_cut")
    trainer.fit()
    assert told == ["load global_step_1", "step 1", "cut 1", "save 2", "slice 32 to 16"]
    trainer, told = make_trainer("after_every_cut")
    trainer.fit()
    assert told == ["load global_step_2", "step 1", "step 2", "cut 2", "save 4", "slice 16 to 8"]
    trainer, told = make_trainer("after_every_cut")
    trainer.fit()
    assert told == ["load global_step_4", "step 1", "step 2", "save 6"] and not trainer.ended
    assert [record.sliced for record in trainer.cuts.made] == [0, 1, 2] and Shapes.load(tmp_path / "work").cuts == 3


@pytest.mark.parametrize("killed", [True, False])
def test_what_is_read_is_what_an_undisturbed_training_reads(make_trainer, tmp_path, killed):
    """Also after the fourth step, with which the sequences have been read once."""
    trainer, _ = make_trainer(steps=10)
    trainer.fit()
    undisturbed, make_trainer.read[:] = list(make_trainer.read), []
    first, second = (sorted(row for step in undisturbed[n : n + 4] for row in step) for n in (0, 4))
    assert undisturbed[0] != undisturbed[4] and first == second
    shutil.rmtree(tmp_path / "work")
    shutil.rmtree(tmp_path / "cuts")
    if killed:
        trainer, _ = make_trainer(steps=10, dies_after=9)  # in the fifth step
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        trainer, told = make_trainer(steps=10)
        trainer.fit()
        assert told[0] == "load global_step_4"
        del make_trainer.read[4]  # by the step that it was killed in
    else:
        for _ in range(4):
            trainer, told = make_trainer("after_every_cut", steps=10)
            trainer.fit()
    assert make_trainer.read == undisturbed and told[-1] == "save 10"


def _slice(rank: int, ranks: int, folder: Path, model: Path, sequences: Path) -> None:
    """Two steps, a cut between them, and a third one: by the model as it was, and by the sliced one after a start."""
    from ptl_rl.families import FAMILIES
    from ptl_rl.pruning.slice.in_place import cut_in_place
    from ptl_rl.recovery.in_place.worker import PruningTrainer

    file = SequenceFile(str(sequences))
    verl = sft_config(folder, model, sequences, ranks, save_every_steps=2)

    def step(engine, number: int) -> float:
        return loss_of_step(engine, file, verl, number, rank, ranks)

    plan = plan_keeping([list(range(7 * layer, 7 * layer + 19)) for layer in range(3)], 48, [1])
    worker = object.__new__(PruningTrainer)
    engine = worker.engine = engine_of(verl)
    worker.check_can_slice()
    step(engine, 0)
    cut_in_place(engine.module, FAMILIES["llama"], plan, engine.optimizer)
    step(engine, 1)
    old, new, small, whole = (folder / f"{ranks}/{name}" for name in ("old", "new", "small", "whole"))
    for path in (new, small, whole):
        path.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(old), global_step=2)
    worker.write_weights(whole)
    context = SimpleNamespace(spec=SimpleNamespace(source=model, device="cpu"))
    worker.write_sliced(context, plan, small, old, new)
    expected, rate = step(engine, 2), engine.optimizer.param_groups[0]["lr"]
    again = engine_of(sft_config(folder, small, sequences, ranks, save_every_steps=2))
    again.load_checkpoint(str(new))
    assert step(again, 2) == pytest.approx(expected, rel=1e-5)
    assert again.optimizer.param_groups[0]["lr"] == rate
    left = {name: p.full_tensor().detach() for name, p in engine.module.named_parameters()}
    for name, parameter in again.module.named_parameters():
        was = left[name.replace("layers.1.", "layers.2.")]
        kept = plan.keep_channels[2 if "layers.1." in name else 0]
        if "gate_proj" in name or "up_proj" in name:
            was = was[kept]
        elif "down_proj" in name:
            was = was[:, kept]
        torch.testing.assert_close(parameter.full_tensor().detach(), was, rtol=1e-4, atol=1e-6)
    if rank == 0:
        from transformers import AutoModelForCausalLM

        loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (small, whole)]
        sizes = [(m.config.num_hidden_layers, m.config.intermediate_size) for m in loaded]
        assert sizes == [(2, 19), (3, 48)]
        ids_BT = torch.arange(40).view(2, 20)
        logits = [m.eval()(input_ids=ids_BT).logits for m in loaded]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_verls_engine_goes_on_sliced_as_it_would_have_gone_on(tokenizer, make_checkpoint, tmp_path):
    """Through verl's own checkpoints, on two ranks; one has it in the end-to-end test."""
    pytest.importorskip("verl")
    path = tmp_path / "s.arrow"
    records = [Record(f"How much is {n} + {n * 7}?", f"\\boxed{{{n * 8}}}", str(n * 8), "s", str(n)) for n in range(32)]
    write_sequences(records, tokenizer, path, suffix="", max_tokens=64, response_only=False)
    run_ranks(_slice, 2, tmp_path, make_checkpoint("llama"), path)


def test_verls_worker_is_ours_while_it_is_named_and_verls_again_after(monkeypatch):
    supervised = pytest.importorskip("ptl_rl.recovery.in_place.supervised")
    from verl.trainer import sft_trainer_ray

    from ptl_rl.recovery.trainer import SequenceTrainer

    stock, seen = sft_trainer_ray.TrainingWorker, []

    def build(self) -> None:
        seen.append(sft_trainer_ray.TrainingWorker)
        raise OSError

    monkeypatch.setattr(SequenceTrainer, "_build_engine", build)
    with pytest.raises(OSError):
        object.__new__(supervised.CuttingSequenceTrainer)._build_engine()
    assert seen == [supervised.PruningTrainer] and sft_trainer_ray.TrainingWorker is stock


@pytest.mark.canary
def test_verls_supervised_trainer_still_names_its_worker_itself():
    """If this fails, `CuttingSequenceTrainer._build_engine` can ask verl for another worker."""
    from verl.trainer.sft_trainer_ray import SFTTrainer

    assert "ray.remote(TrainingWorker)" in inspect.getsource(SFTTrainer._build_engine)
