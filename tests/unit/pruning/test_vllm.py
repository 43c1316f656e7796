"""Sliced checkpoints of every family in stock vLLM: the same greedy tokens as in transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptl_rl.families import FAMILIES
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import slice_checkpoint

PROMPT, TOKENS = list(range(20, 44)), 16
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
found = {}
for family, folder in json.loads(sys.argv[1]).items():
    llm = LLM(folder, dtype="float32", max_model_len=64, enforce_eager=True, max_num_seqs=4)
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], sampling, use_tqdm=False)
    found[family] = list(out[0].outputs[0].token_ids)
    del llm
    cleanup_dist_env_and_memory()
assert not [name for name in sys.modules if name.split(".")[0] in ("ptl_rl", "reward")]
print("FOUND " + json.dumps(found))
"""
CONFIGS = {
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 16},
}


@pytest.mark.stack
@pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM's CPU build")
def test_every_family_generates_the_same_tokens(make_checkpoint, tmp_path):
    plan = PruningPlan(
        keep_channels=[list(range(layer, layer + 32)) for layer in range(3)],
        keep_layers=[0, 2],
        layer_order=[1],
        source_intermediate_size=48,
        alignment=1,
        channel_criterion="",
        layer_criterion="",
        subset_hash="",
        source="",
    )
    folders = {family: tmp_path / family for family in FAMILIES}
    expected = {}
    for family, folder in folders.items():
        # Heads of 32, which vLLM's kernels for CPUs take.
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        slice_checkpoint(make_checkpoint(family, **sizes, **CONFIGS.get(family, {})), plan, folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids_BT = torch.tensor([PROMPT])
        for _ in range(TOKENS):
            with torch.no_grad():
                ids_BT = torch.cat([ids_BT, model(input_ids=ids_BT).logits[:, -1:].argmax(-1)], dim=1)
        expected[family] = ids_BT[0, len(PROMPT) :].tolist()
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PTL_")} | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
    }
    arguments = [json.dumps({k: str(v) for k, v in folders.items()}), json.dumps(PROMPT), str(TOKENS)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND ")
    )
    assert found == expected
    assert len({tuple(tokens) for tokens in found.values()}) > 1
