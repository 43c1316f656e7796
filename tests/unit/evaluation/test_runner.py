"""The evaluation's vLLM engines keep to the GPUs that Ray gave them."""

import os
import sys
import types

import pytest
import ray

from ptl_rl.evaluation.runner import Engine


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
