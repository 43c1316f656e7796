"""What the stage finds out about the model before verl trains it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptl_rl.config.recipe import load_config
from ptl_rl.config.verl_keys import REWARD
from ptl_rl.recovery import grpo
from ptl_rl.recovery.rl.outcome import Outcome
from ptl_rl.stage import StageSpec
from ptl_rl.testbed.tokenizer import CHAT_TEMPLATE

DEMO = Path(__file__).resolve().parents[3] / "recipes/demo_restart_cpu.yaml"


@pytest.mark.parametrize("opened", [False, True])
def test_the_format_reward_knows_whether_the_chat_template_opens_the_thinking(
    opened, make_checkpoint, tmp_path, monkeypatch
):
    model, asked, trained = make_checkpoint("llama"), [], []
    if opened:
        template = CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")
        (model / "chat_template.jinja").write_text(template)
    load = grpo.load_tokenizer
    monkeypatch.setattr(grpo, "load_tokenizer", lambda *given: asked.append(given) or load(*given))
    monkeypatch.setattr(grpo, "compose", lambda settings: settings)
    trainer = SimpleNamespace(run_ppo=lambda settings, **_: trained.append(settings))
    monkeypatch.setitem(sys.modules, "verl.trainer.main_ppo", trainer)
    monkeypatch.setitem(sys.modules, "ptl_rl.recovery.rl.runner", SimpleNamespace(Runner=None))
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "")
    told = {"device": "cpu", "attention": "sdpa", "cycle": 1, "round": 0, "planned": 0, "part": 0, "steps": 2}
    spec = StageSpec.model_construct(
        **told, source=model, parent=model, work=tmp_path, progress=tmp_path / "x.progress.jsonl"
    )
    config = load_config(DEMO, ["model.trust_remote_code=true"])
    context = SimpleNamespace(config=config, spec=spec, connect_ray=lambda: None)
    follower = SimpleNamespace(path=tmp_path / "metrics.jsonl", start=lambda: None, finish=lambda: None)
    grpo._train([SimpleNamespace()], context, follower, {})
    assert [settings[f"{REWARD}.think_opened"] for settings in trained] == [opened]
    assert asked == [(model, True)]  # as before the run: code that comes with the tokenizer is run


class Follower:
    """Of a training that has logged three steps."""

    def __init__(self, *given) -> None:
        self.curve = [{"step": step, "reward": 0.1} for step in range(4)]

    def gap(self, made: int) -> list[str]:
        return []

    def save(self, path: Path) -> None:
        path.write_text("")


def test_a_training_that_ended_early_gives_its_model_and_says_why(tmp_path, monkeypatch):
    """A stage that is killed right after it is not trained again."""
    config = load_config(DEMO, ["recovery=[{grpo: {steps: 8, save_every_steps: 2, min_learnable_fraction: 0.1}}]"])
    work, trained = tmp_path / "work", []
    spec = SimpleNamespace(work=work, out=None, steps=8, round=0, name="recover", source=tmp_path)
    context = SimpleNamespace(config=config, spec=spec, recovery=config.recovery[0])

    def train(*given) -> None:
        trained.append(1)
        (work / "passed/last").mkdir(parents=True)
        (work / "passed/last/model.safetensors").write_text("weights")
        Outcome(folder="passed/last", made=[], steps=3, why="ended after step 3", learns=False).save(work)

    monkeypatch.setattr(grpo, "MetricsFollower", Follower)
    monkeypatch.setattr(grpo, "_prepare", lambda context: ([], work / "metrics.jsonl"))
    monkeypatch.setattr(grpo, "_train", train)
    work.mkdir()
    for attempt in ("first", "again"):
        spec.out = tmp_path / attempt
        spec.out.mkdir()
        found = grpo.recover(context)
        assert found["steps"] == 3 and len(found["curve"]) == 4
        assert found["notes"] == ["ended after step 3"] and found["learns"] is False
        assert (spec.out / "model.safetensors").read_text() == "weights"
    assert trained == [1]
