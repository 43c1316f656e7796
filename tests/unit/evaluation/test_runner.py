"""The evaluation's vLLM engines keep to the GPUs that Ray gave them, and read prompts of a bounded length."""

import json
import os
import shutil
import sys
import types

import pyarrow.parquet
import pytest
import ray

from ptl_rl.config.recipe import parse_config
from ptl_rl.data.prompts import prompt_ids
from ptl_rl.data.records import Record
from ptl_rl.evaluation import runner
from ptl_rl.evaluation.runner import Engine
from ptl_rl.testbed import CHECKPOINT_DIR


@pytest.mark.parametrize(("cpu", "seen"), [(False, "5,6"), (True, "0,1,2,3,4,5,6,7")])
def test_an_engine_sees_its_own_gpus_only(cpu, seen, monkeypatch):
    """Ray started with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES leaves all of a node's visible to every actor."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    given = types.SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ["5", "6"], "TPU": []})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: given)
    visible = []

    class Model:
        def __init__(self, **_):
            visible.append(os.environ["CUDA_VISIBLE_DEVICES"])

        def generate(self, prompts, parameters, use_tqdm):
            text = types.SimpleNamespace(text="", token_ids=[1], finish_reason="stop")
            return [types.SimpleNamespace(outputs=[text]) for _ in prompts]

    fake = types.SimpleNamespace(LLM=Model, SamplingParams=lambda **_: None)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    Engine(cpu, {"model": "m", "tensor_parallel_size": 2})
    assert visible == [seen]


def test_prompts_that_are_too_long_keep_their_end():
    """Where the question is asked and the response begins."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    short, long = (prompt_ids(tokenizer, f"{words}? Box it.") for words in ("Two and two", "Two and two " * 9))
    data = {"max_prompt_tokens": len(short), "prompt_suffix": " Box it."}
    config = parse_config({"schedule": {"channels_per_cycle": [64], "alignment": 32}, "data": data})
    found = runner._prompt_ids(config, CHECKPOINT_DIR, ["Two and two?", f"{'Two and two ' * 9}?"])
    assert found == [short, long[-len(short) :]] and len(long) > len(short)
    context = types.SimpleNamespace(spec=types.SimpleNamespace(source=CHECKPOINT_DIR, device="cpu"))
    assert runner._options(config, context, CHECKPOINT_DIR, 30)["max_model_len"] == len(short) + 30


RIGHT, WRONG = "so \\boxed{4}", "so \\boxed{5}"


def evaluated(tmp_path, monkeypatch, of_cut, judge=runner.judge):
    """Metrics and rows of an evaluation whose two models answer three problems as told."""
    answers = {"recovered": [RIGHT, RIGHT, WRONG], "sliced": of_cut}

    def generate(context, model, prompts, max_tokens):
        assert len(prompts) == 3 and max_tokens == context.config.data.max_response_tokens
        return [runner.Answer(text, 4, truncated=False) for text in answers[model.name]], 2.0

    monkeypatch.setattr(runner, "_generate", generate)
    monkeypatch.setattr(runner, "judge", judge)
    for name in answers:
        shutil.copytree(CHECKPOINT_DIR, tmp_path / name)
    (tmp_path / "out").mkdir()
    records = [Record(id=str(i), question=f"2 + 2 in {i}?", solution="", answer="4", source="made") for i in range(3)]
    places = {"source": tmp_path / "recovered", "after_cut": tmp_path / "sliced", "out": tmp_path / "out"}
    context = types.SimpleNamespace(
        config=parse_config({"schedule": {"channels_per_cycle": [64], "alignment": 32}}),
        spec=types.SimpleNamespace(cycle=1, parent=CHECKPOINT_DIR, device="cpu", **places),
        data=types.SimpleNamespace(evaluation=lambda name: records),
        connect_ray=lambda: None,
        report=lambda *_: None,
    )
    metrics = runner.evaluate(context)
    assert json.loads((tmp_path / "out/eval.json").read_text())["after_cut"]["accuracy"] < metrics["accuracy"]
    return metrics, pyarrow.parquet.read_table(tmp_path / "out/samples.parquet").to_pylist()


def test_what_a_cut_left_is_paired_with_what_recovery_made_of_it(tmp_path, monkeypatch):
    metrics, rows = evaluated(tmp_path, monkeypatch, [WRONG, RIGHT, WRONG])
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["after_cut"]["accuracy"] == pytest.approx(1 / 3)
    found = metrics["recovered"]
    assert found["difference"] == pytest.approx(1 / 3) and (found["gained"], found["lost"]) == (1, 0)
    assert [row["text_after_cut"] for row in rows] == [WRONG, RIGHT, WRONG]
    assert [(row["correct"], row["correct_after_cut"]) for row in rows] == [(1, 0), (1, 1), (0, 0)]


def test_a_cut_model_that_no_reward_can_judge_counts_as_wrong(tmp_path, monkeypatch):
    def judge(config, records, answers, progress):
        if "nonsense" in answers:
            raise runner.JudgeError("reward: it raised on every answer")
        return runner.Verdicts([1.0, 1.0, 0.0])

    metrics, _ = evaluated(tmp_path, monkeypatch, ["nonsense"] * 3, judge)
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["reward_errors"] == 0
    assert (metrics["after_cut"]["accuracy"], metrics["after_cut"]["reward_errors"]) == (0, 3)
