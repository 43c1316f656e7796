"""What is left out of the imports of a stage's processes."""

import json
import subprocess
import sys

import pytest

from ptl_rl.stage import _setup_hook

PREPARE = "from ptl_rl.verl_patches.quick_imports import prepare; prepare(); prepare()\n"
TRANSFORMERS = """
import sys, transformers.modeling_utils, transformers.generation.candidate_generator
print(*[name for name in ("sklearn", "scipy.optimize") if name in sys.modules] or ["neither"])
"""
AUDIO = """
import sys, ptl_rl.cpu.vllm_alias, vllm.multimodal.audio
print("scipy.signal" in sys.modules)
"""
OTHERS = """
import sklearn, scipy.signal
print(sklearn.__name__, scipy.signal.__name__)
"""
VERL = """
import sys, verl.checkpoint_engine
print("vllm" in sys.modules)
"""


def fresh(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_transformers_and_vllm_do_without_scipy_and_others_do_not():
    of_transformers, *_, of_vllm, others = fresh(PREPARE + TRANSFORMERS + AUDIO + OTHERS)
    assert (of_transformers, of_vllm, others) == ("neither", "False", "sklearn scipy.signal")


def test_verl_is_imported_without_vllm(before_verl):
    asked = "verl.checkpoint_engine.CheckpointEngineRegistry.get('hccl')"
    done = before_verl.run(PREPARE + VERL + asked)
    assert done.stdout == "False\n"
    assert done.returncode == 1 and "hccl_checkpoint_engine: import of" in done.stderr.splitlines()[-1]


@pytest.mark.canary
def test_transformers_still_imports_scipy():
    assert fresh(TRANSFORMERS) == ["sklearn scipy.optimize"]


@pytest.mark.canary
def test_vllm_still_imports_scipy():
    assert fresh(AUDIO)[-1] == "True"


@pytest.mark.canary
def test_verl_still_imports_vllm(before_verl):
    assert before_verl.run(VERL).stdout == "True\n"


def test_a_submitted_jobs_own_setup_hook_stays(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    ours = {"worker_process_setup_hook": "ptl_rl.verl_patches.quick_imports.prepare"}
    assert _setup_hook() == ours
    for runtime_env, expected in (
        ({"env_vars": {"A": "1"}}, ours),
        (None, ours),
        ({"worker_process_setup_hook": "mine.setup"}, {}),  # Ray takes the stage's in place of the job's
    ):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime_env}))
        assert _setup_hook() == expected
