"""verl loads the plugin in every process, and the plugin knows when to stay out of the way."""

import json
import os
import subprocess
import sys

import pytest

REPORT = """
import json, os, sys, verl
from verl.plugin.platform import PlatformRegistry
from verl.utils import distributed
from ptl_rl.cpu.vllm_alias import AliasFinder
print(json.dumps({
    "registered": PlatformRegistry.get("cpu") is not None,
    "patched": hasattr(distributed.initialize_global_process_group_ray, "names_gloo_once"),
    "engine_device": os.environ.get("VERL_ENGINE_DEVICE"),
    "finder": any(isinstance(finder, AliasFinder) for finder in sys.meta_path),
}))
"""
GPU = "import torch; torch.cuda.is_available = lambda: True\n"


def report(prefix: str = "", **env: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    result = subprocess.run(
        [sys.executable, "-c", prefix + REPORT],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_active_on_request():
    assert report(VERL_PLATFORM="cpu") == {
        "registered": True,
        "patched": True,
        "engine_device": "cuda",
        "finder": True,
    }


@pytest.mark.parametrize(
    ("prefix", "env"),
    [("", {"VERL_PLATFORM": "nvidia"}), (GPU, {}), (GPU, {"VERL_PLATFORM": "cpu"})],
    ids=["another platform", "accelerator", "accelerator despite request"],
)
def test_inert_otherwise(prefix, env):
    assert report(prefix, **env) == {
        "registered": False,
        "patched": False,
        "engine_device": None,
        "finder": False,
    }
