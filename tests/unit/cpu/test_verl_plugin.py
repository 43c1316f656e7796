"""verl loads the plugin in every process, and the plugin knows when to stay out of the way."""

import json
import os
import subprocess
import sys

import pytest

ACTIVE = {"registered": True, "patched": True, "engine_device": "cuda", "finder": True}
INERT = {"registered": False, "patched": False, "engine_device": None, "finder": False}
CASES = {
    "on request": ({"VERL_PLATFORM": "cpu"}, False, ACTIVE),
    "another platform": ({"VERL_PLATFORM": "nvidia"}, False, INERT),
    "accelerator": ({}, True, INERT),
    "accelerator despite request": ({"VERL_PLATFORM": "cpu"}, True, INERT),
}
"""Environment, whether torch sees an accelerator, and what is to be found."""
# What verl imports is imported once; a child for every case then imports verl.
REPORT = """
import json, os, sys
import datasets, ray, tensordict, torch, torch.distributed.fsdp, transformers
from transformers import AutoTokenizer

for name, (env, accelerator) in json.loads(sys.argv[1]).items():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    os.environ.update(env)
    if accelerator:
        torch.cuda.is_available = lambda: True
    assert "verl" not in sys.modules
    import verl
    from verl.plugin.platform import PlatformRegistry
    from verl.utils import distributed
    from ptl_rl.cpu.vllm_alias import AliasFinder
    print(json.dumps([name, {
        "registered": PlatformRegistry.get("cpu") is not None,
        "patched": hasattr(distributed.initialize_global_process_group_ray, "names_gloo_once"),
        "engine_device": os.environ.get("VERL_ENGINE_DEVICE"),
        "finder": any(isinstance(finder, AliasFinder) for finder in sys.meta_path),
    }]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    cases = {name: case[:2] for name, case in CASES.items()}
    result = subprocess.run(
        [sys.executable, "-c", REPORT, json.dumps(cases)],
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(line) for line in result.stdout.splitlines() if line.startswith("["))


@pytest.mark.parametrize("name", CASES)
def test_active_on_request_and_inert_otherwise(name, reports):
    assert reports[name] == CASES[name][2]
