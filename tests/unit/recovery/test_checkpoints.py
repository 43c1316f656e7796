"""What a killed recovery goes on from, and how its finished weights are handed over."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptl_rl.config.recipe import parse_config
from ptl_rl.recovery import cpt, grpo
from ptl_rl.recovery.checkpoints import TRACKER, Checkpoints, link_or_copy
from ptl_rl.recovery.follow import MetricsFollower

STEPS = 24


def checkpoint(folder: Path, step: int, part: str = "") -> Path:
    """As verl and its checkpoint manager leave one."""
    weights = folder / f"global_step_{step}" / part / "huggingface"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    if step == STEPS:
        (weights / "model.safetensors").write_bytes(b"weights")
    else:
        (weights.parent / "model_world_size_1_rank_0.pt").write_bytes(b"state")
    (folder / f"global_step_{step}" / "data_0.pt").write_bytes(b"data")
    (folder / TRACKER).write_text(str(step))
    return weights


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in folder.glob("global_step_*"))


def test_the_weights_get_a_second_name_and_no_copy(tmp_path):
    weights, out = checkpoint(tmp_path / "work", STEPS, "actor"), tmp_path / "out"
    out.mkdir()
    Checkpoints(tmp_path / "work", STEPS, "actor").hand_over(out)
    assert (out / "model.safetensors").samefile(weights / "model.safetensors")
    shutil.rmtree(tmp_path / "work")  # as the driver does once the journal has the recovery
    assert (out / "model.safetensors").read_bytes() == b"weights" and (out / "config.json").exists()


def test_where_links_cannot_be_made_files_are_copied(tmp_path, monkeypatch):
    def across(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", across)
    weights, out = checkpoint(tmp_path / "work", STEPS), tmp_path / "out"
    Checkpoints(tmp_path / "work", STEPS).hand_over(out)
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert not (out / "model.safetensors").samefile(weights / "model.safetensors")
    assert link_or_copy(str(out / "config.json"), str(out / "copy")) == str(out / "copy")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_training_that_left_no_weights_is_an_error(missing, tmp_path):
    (checkpoint(tmp_path, STEPS) / missing).unlink()
    with pytest.raises(FileNotFoundError, match="global_step_24/huggingface: verl ended without writing"):
        Checkpoints(tmp_path, STEPS).hand_over(tmp_path / "out")


def test_killed_after_the_last_save_nothing_is_trained_again(tmp_path):
    for step in (16, STEPS):
        checkpoint(tmp_path, step)
    assert Checkpoints(tmp_path, STEPS).are_finished()
    assert steps(tmp_path) == [16, STEPS]


def test_killed_in_the_last_save_training_goes_on_from_the_one_before(tmp_path):
    for step in (8, STEPS, 16):  # weights are there, but the data loader's state and the tracker came after them
        checkpoint(tmp_path, step)
    assert not Checkpoints(tmp_path, STEPS).are_finished()
    assert steps(tmp_path) == [16] and (tmp_path / TRACKER).read_text() == "16"


def test_killed_in_the_first_save_training_begins_anew(tmp_path):
    assert not Checkpoints(tmp_path / "none", STEPS).are_finished()
    checkpoint(tmp_path, 8)
    (tmp_path / TRACKER).unlink()
    assert not Checkpoints(tmp_path, STEPS).are_finished()
    assert steps(tmp_path) == []


@pytest.mark.parametrize("saved", [[8, 16], [16, STEPS], []])
def test_killed_while_the_tracker_is_written(saved, tmp_path):
    for step in saved:
        checkpoint(tmp_path, step)
    (tmp_path / "global_step_20").mkdir()  # begun, and without the data loader's state
    (tmp_path / TRACKER).write_text("")
    assert Checkpoints(tmp_path, STEPS).are_finished() == (STEPS in saved)
    if saved:
        assert (tmp_path / TRACKER).read_text() == str(saved[-1]) and saved[-1] in steps(tmp_path)
    else:
        assert steps(tmp_path) == [] and not (tmp_path / TRACKER).exists()


@pytest.mark.parametrize("module", [cpt, grpo], ids=["cpt", "grpo"])
def test_a_stage_that_finds_its_finished_weights_does_not_train(module, tmp_path, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    checkpoint(work / "checkpoints", STEPS, "actor" if module is grpo else "")
    rows = [{"step": step, "data": {"train/loss": 0.5, "critic/score/mean": 0.25}} for step in range(1, STEPS + 1)]
    cut_short = '{"step": 24, "da'
    (work / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut_short)
    entry = {module.__name__.rpartition(".")[2]: {"save_every_steps": 8, "steps": STEPS}}
    recipe = {"model": {"path": "x"}, "schedule": {"channels_per_cycle": [64]}, "recovery": [entry]}
    config = parse_config(recipe | {"calibration": {"source": "corpus"}})
    spec = SimpleNamespace(work=work, out=out, steps=STEPS, attention="sdpa")
    context = SimpleNamespace(config=config, spec=spec, recovery=config.recovery[0], report=lambda *_, **__: None)
    prepared = (tmp_path, SimpleNamespace(sequences=64, tokens=640, cut=0), "hash")
    monkeypatch.setattr(module, "_prepare", lambda *_: prepared if module is cpt else ([], work / "metrics.jsonl"))
    monkeypatch.setattr(module, "subset_hash", lambda _: "hash")
    metrics = module.recover(context)  # and no Ray session was there to train on
    assert [row["step"] for row in metrics["curve"]] == list(range(1, STEPS + 1))
    assert (out / "model.safetensors").exists()
    logged = [json.loads(line) for line in (out / "verl_metrics.jsonl").read_text().splitlines()]
    assert logged == rows and metrics["notes"] == []


def test_a_step_that_was_saved_but_not_logged_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data": {}}\n')
    context = SimpleNamespace(spec=SimpleNamespace(steps=2), report=lambda *_, **__: None)
    follower = MetricsFollower(context, tmp_path / "metrics.jsonl", dict)
    assert follower.gap() == [
        "the curve lacks step 2: it was made and saved, but the attempt was killed before it was logged"
    ]


def test_a_step_that_is_made_again_has_nothing_of_the_killed_attempt(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "data": {"reward": 1}}\n{"step": 2, "data": {"reward": 2, "cut_seconds": 9}}\n')
    context = SimpleNamespace(spec=SimpleNamespace(steps=4), report=lambda *_, **__: None)
    follower = MetricsFollower(context, path, dict)
    path.write_text('{"step": 2, "data": {"reward": 3}}\n{"step": 2, "data": {"validation": 4}}\n')
    follower.start()
    follower.finish()
    assert follower.curve == [{"step": 1, "reward": 1}, {"step": 2, "reward": 3, "validation": 4}]
    assert follower.gap(2) == []  # of a training that ended before all of its steps


def test_seconds_that_were_measured_stay_where_a_stage_trains_twice(tmp_path):
    """And those of a step that a cut came before are not its own."""
    path = tmp_path / "metrics.jsonl"
    context = SimpleNamespace(spec=SimpleNamespace(steps=4), report=lambda *_, **__: None)
    follower = MetricsFollower(context, path, dict, timed=True, counts=lambda step: step != 3)
    for step in (1, 2, 3):
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "data": {"tokens": 5.0}}) + "\n")
        follower._poll()
    assert [sorted(row) for row in follower.curve] == [
        ["step", "tokens"],  # the first one's are of the start, too
        ["step", "step_seconds", "tokens", "tokens_per_second"],
        ["step", "tokens"],
    ]
    again = follower.again()
    assert again.curve == follower.curve and not again.counts(3)
