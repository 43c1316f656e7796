"""What the stage finds out about the model before verl trains it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptl_rl.config.recipe import load_config
from ptl_rl.config.verl_keys import REWARD
from ptl_rl.recovery import grpo
from ptl_rl.stage import StageSpec
from ptl_rl.testbed.tokenizer import CHAT_TEMPLATE

DEMO = Path(__file__).resolve().parents[3] / "recipes/demo_grpo_cpu.yaml"


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
    trainer = SimpleNamespace(TaskRunnerV1=None, run_ppo=lambda settings, **_: trained.append(settings))
    monkeypatch.setitem(sys.modules, "verl.trainer.main_ppo", trainer)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "")
    told = {"device": "cpu", "attention": "sdpa", "cycle": 1, "round": 0, "planned": 0, "part": 0, "steps": 2}
    spec = StageSpec.model_construct(**told, source=model, parent=model, work=tmp_path)
    config = load_config(DEMO, ["model.trust_remote_code=true"])
    context = SimpleNamespace(config=config, spec=spec, connect_ray=lambda: None)
    follower = SimpleNamespace(path=tmp_path / "metrics.jsonl", start=lambda: None, finish=lambda: None)
    grpo._train(context, [SimpleNamespace()], follower)
    assert [settings[f"{REWARD}.think_opened"] for settings in trained] == [opened]
    assert asked == [(model, True)]  # as before the run: code that comes with the tokenizer is run
