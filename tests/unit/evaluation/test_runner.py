"""The evaluation's vLLM engines keep to the GPUs that Ray gave them, and read prompts of a bounded length."""

import os
import sys
import types

import pytest
import ray

from ptl_rl.config.recipe import parse_config
from ptl_rl.data.prompts import prompt_ids
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
    assert runner._options(config, context, 30)["max_model_len"] == len(short) + 30
