"""A folder that SliceGPT made, in vLLM: its class comes from outside of vLLM, and gives the same greedy tokens."""

import json
import os
import subprocess
import sys

import pytest
import torch
from forked import call_forked
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ptl_rl.baselines import slicegpt
from ptl_rl.baselines.slicegpt.command import slice_with_slicegpt
from ptl_rl.config import ScoreConfig

PROMPT, TOKENS = list(range(20, 44)), 16
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
found = []
for folder in json.loads(sys.argv[1]):
    llm = LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, max_num_seqs=4)
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], sampling, use_tqdm=False)
    found.append(list(out[0].outputs[0].token_ids))
    del llm
    cleanup_dist_env_and_memory()
print("FOUND " + json.dumps(found))
"""


@pytest.mark.stack
@pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM's CPU build")
def test_vllm_generates_what_transformers_does(make_checkpoint, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = ScoreConfig.model_validate(
        {"data": {"path": "testbed:rl", "rows": 16}, "calibration": {"sequences": 16, "max_tokens": 64}}
    )
    slicegpt.register()
    folders, expected = [], []
    for family in ("qwen2", "llama"):
        source, folder = make_checkpoint(family, **sizes), tmp_path / family
        slice_with_slicegpt(str(source), folder, config, remove="25%")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        generated = model.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        folders.append(str(folder))
        expected.append(generated[0, len(PROMPT) :].tolist())
        ids = AutoTokenizer.from_pretrained(folder).encode("Mia has 3 apples.")
        assert ids == AutoTokenizer.from_pretrained(source).encode("Mia has 3 apples.")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PTL_")} | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    arguments = [json.dumps(folders), json.dumps(PROMPT), str(TOKENS)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND ")
    assert json.loads(found) == expected


def registered_by_verl() -> str:
    import verl  # noqa: F401

    return AutoConfig.for_model("slicegpt_llama").model_type


def test_verl_registers_it_wherever_it_is_imported():
    assert call_forked(registered_by_verl) == "slicegpt_llama"
