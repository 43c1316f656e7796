"""verl loads the plugin in every process, and the plugin knows when to stay out of the way."""

import json

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
REPORT = """
import json, os, sys
{before}
import verl
from verl.plugin.platform import PlatformRegistry
from verl.utils import distributed
from ptl_rl.cpu.vllm_alias import AliasFinder
print(json.dumps({{
    "registered": PlatformRegistry.get("cpu") is not None,
    "patched": hasattr(distributed.initialize_global_process_group_ray, "names_gloo_once"),
    "engine_device": os.environ.get("VERL_ENGINE_DEVICE"),
    "finder": any(isinstance(finder, AliasFinder) for finder in sys.meta_path),
}}))
"""
ACCELERATOR = "import torch; torch.cuda.is_available = lambda: True"


@pytest.mark.parametrize("name", CASES)
def test_active_on_request_and_inert_otherwise(name, before_verl):
    environment, accelerator, expected = CASES[name]
    result = before_verl.run(REPORT.format(before=ACCELERATOR if accelerator else ""), **environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == expected
