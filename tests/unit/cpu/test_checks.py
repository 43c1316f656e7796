"""The helpers that stages and configuration use for CPU runs."""

import os
import subprocess
import sys

import pytest
import torch

from ptl_rl.cpu import checks

# Keys that verl's YAML does not list but its code reads.
NOT_IN_YAML = {
    "actor_rollout_ref.rollout.enable_sleep_mode",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend",
}


def test_pure_helpers_do_not_import_torch():
    code = (
        "import sys; from ptl_rl.cpu import checks; checks.cpu_env_vars();"
        "checks.verl_cpu_overrides(); checks.verl_sft_cpu_overrides();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'verl', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(("cores", "workers", "threads"), [(2, 1, "1"), (2, 4, "1"), (64, 4, "8")])
def test_workers_do_not_oversubscribe_the_cores(monkeypatch, cores, workers, threads):
    monkeypatch.setattr(checks, "usable_cores", lambda: cores)
    assert checks.cpu_env_vars(workers)["OMP_NUM_THREADS"] == threads


def test_environment_values_are_strings():
    assert all(isinstance(value, str) for value in checks.cpu_env_vars(2).values())


def test_ray_environment_carries_what_verl_would_have_set(monkeypatch):
    monkeypatch.delenv("VLLM_DISABLE_COMPILE_CACHE", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    env = checks.ray_runtime_env(2)["env_vars"]
    assert env["VLLM_DISABLE_COMPILE_CACHE"] == "1"
    assert env["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert env["TRANSFER_QUEUE_ENABLE"] == "1"
    assert env["VERL_PLATFORM"] == "cpu"
    assert env["TOKENIZERS_PARALLELISM"] == "false"


def test_an_evaluation_has_verls_environment_for_vllm_and_does_not_import_verl(monkeypatch, before_verl):
    for name in checks.VLLM_ENV:
        monkeypatch.delenv(name, raising=False)
    assert checks.VLLM_ENV.items() <= checks.ray_runtime_env(2)["env_vars"].items()
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    assert checks.evaluation_env(2) == {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        **checks.cpu_env_vars(2),
    }
    code = (
        "import sys; from ptl_rl.config.recipe import parse_config; from ptl_rl.evaluation import runner;"
        "config = parse_config({'schedule': {'channels_per_cycle': [32]}});"
        "from ptl_rl.stage import StageContext, StageSpec;"
        "spec = StageSpec.model_construct(device='cpu', name='evaluate', stage_id='x');"
        "env = StageContext(config, spec).worker_env();"
        "sys.exit('verl' in sys.modules or env['VERL_PLATFORM'] != 'cpu')"
    )
    assert before_verl.run(code).returncode == 0


SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


def test_vllm_on_gpus_is_not_to_compile_a_sampler_unless_it_is_asked_to(monkeypatch):
    monkeypatch.delenv(SAMPLER, raising=False)
    assert checks.cuda_env_vars() == {SAMPLER: "0"}
    monkeypatch.setenv(SAMPLER, "1")
    assert checks.cuda_env_vars() == {}


def test_every_way_to_vllm_on_a_gpu_takes_that_environment(monkeypatch, repository, tmp_path):
    from ptl_rl.config.recipe import load_config
    from ptl_rl.evaluation import command, speed
    from ptl_rl.stage import StageContext, StageSpec

    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != SAMPLER})
    config = load_config(repository / "recipes/demo_restart_cpu.yaml")
    for device, expected in (("cuda", "0"), ("cpu", None)):
        assert (
            StageContext(config, StageSpec.model_construct(device=device, name="recover", stage_id="x"))
            .worker_env()
            .get(SAMPLER)
            == expected
        )

    monkeypatch.setattr(checks, "is_cpu_only", lambda: False)
    command.prepare_machine()
    assert os.environ.pop(SAMPLER) == "0"

    def engine(**_):
        raise RuntimeError(f"sampler {os.environ[SAMPLER]}")

    monkeypatch.setitem(sys.modules, "vllm", type(sys)("vllm"))
    sys.modules["vllm"].LLM = engine
    with pytest.raises(RuntimeError, match="sampler 0"):
        speed._start("folder", "bfloat16", 8, 1, 0.4, 1, False)


@pytest.mark.parametrize(
    ("requested", "accelerator", "cuda_build", "expected"),
    [
        ("cpu", False, False, True),
        ("cpu", False, True, True),
        ("cpu", True, True, False),
        ("nvidia", False, False, False),
        ("", False, False, True),
        ("", False, True, False),
        ("", True, True, False),
    ],
)
def test_activation(monkeypatch, requested, accelerator, cuda_build, expected):
    monkeypatch.setenv("VERL_PLATFORM", requested)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: accelerator)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda_build else None)
    assert checks.should_activate() is expected


@pytest.mark.parametrize("env", [{"VERL_USE_EXTERNAL_PLUGINS": "none"}, {"VERL_PLATFORM": "nvidia"}])
def test_a_platform_that_is_not_loaded_is_reported(env, before_verl):
    code = "from ptl_rl.cpu import checks; checks.assert_cpu_platform_active()"
    result = before_verl.run(code, **{"VERL_PLATFORM": "cpu", **env})
    assert result.returncode == 1
    assert "RuntimeError: verl is not running on the CPU platform" in result.stderr
    assert "verl.plugins" in result.stderr and "pip install -e ." in result.stderr


def test_a_plugin_that_failed_is_reported_with_its_reason(before_verl):
    code = (
        "from importlib import metadata; version = metadata.version;"
        "metadata.version = lambda name: '0.8.0' if name == 'verl' else version(name);"
        "from ptl_rl.cpu import checks; checks.assert_cpu_platform_active()"
    )
    result = before_verl.run(code, VERL_PLATFORM="cpu")
    assert result.returncode == 1
    assert "found 0.8.0" in result.stderr.splitlines()[-1]


def resolve(config_name: str, overrides: dict[str, object]):
    """(verl's configuration without and with the overrides)."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        arguments = [f"++{key}={value}" for key, value in overrides.items()]
        return compose(config_name), compose(config_name, overrides=arguments)


@pytest.mark.parametrize(
    ("config_name", "overrides"),
    [
        ("ppo_trainer", checks.verl_cpu_overrides()),
        ("sft_trainer_engine", checks.verl_sft_cpu_overrides()),
    ],
)
def test_overrides_fit_verl_configuration(config_name, overrides):
    from omegaconf import OmegaConf

    stock, changed = resolve(config_name, overrides)
    for key, value in overrides.items():
        assert OmegaConf.select(changed, key) == value
        parent, _, name = key.rpartition(".")
        siblings = list(OmegaConf.select(stock, parent) or ())
        # Below `mixed_precision` verl's default is null, with the keys read by the engine.
        known = parent.endswith(".mixed_precision") or key in NOT_IN_YAML
        assert known or name in siblings, f"verl has no {key}"


def test_the_engine_that_is_one_process_is_vllms():
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    assert resolve_obj_by_qualname(checks.ONE_PROCESS["distributed_executor_backend"]) is UniProcExecutor
