"""What a stage must know and set for a CPU run, in functions that cost nothing to import.

The command line and the configuration code use these, so torch, ray and verl are only imported
inside the functions that truly need them.
"""

import os

CPU_PLATFORM = "cpu"
REPLAY_BUFFER = ("pkg://ptl_rl.cpu.replay_buffer", "QuickReplayBuffer")
WORKER_EXTENSION = "ptl_rl.cpu.vllm_worker.CpuWorkerExtension"
ONE_PROCESS = {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
"""vLLM options: the engine's process computes, too, as another one takes some ten seconds to start. vLLM for CPUs takes
the short name 'uni' for 'mp', whose workers can be bound to cores; here none is (`VLLM_CPU_OMP_THREADS_BIND`)."""

# Why loading the verl plugin failed; verl itself logs that at debug level only.
_plugin_error: BaseException | None = None


def is_cpu_only() -> bool:
    """True if torch can use no accelerator (CUDA, ROCm or NPU) in this process."""
    import torch

    npu = getattr(torch, "npu", None)
    return not torch.cuda.is_available() and not (npu is not None and npu.is_available())


def should_activate() -> bool:
    """True if this process is to run on verl's `cpu` platform.

    `VERL_PLATFORM` decides where it is set. Where it is not, only a torch built without any
    accelerator counts as proof: in a GPU cluster, processes to which Ray assigned no GPU see none
    either, and must stay on verl's own platform.
    """
    requested = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if requested not in ("", CPU_PLATFORM) or not is_cpu_only():
        return False
    import torch

    built_for_cpu = torch.version.cuda is None and torch.version.hip is None and not hasattr(torch, "npu")
    return requested == CPU_PLATFORM or built_for_cpu


def record_plugin_error(error: BaseException) -> None:
    """Keep the reason for `assert_cpu_platform_active`, as verl would swallow it."""
    global _plugin_error
    _plugin_error = error


def assert_cpu_platform_active() -> None:
    """Raise RuntimeError unless verl in this process runs on our CPU platform.

    Call it at the start of every stage of a CPU run: a plugin that failed to load would otherwise
    show up much later, as a CUDA error in some worker.
    """
    requested = os.environ.get("VERL_PLATFORM")
    try:
        import verl  # noqa: F401  (its import loads the plugins)
        from verl.plugin.platform import get_platform

        active = get_platform().device_name
    except ValueError as error:  # verl's "Unknown platform"
        active = str(error)
    if active == CPU_PLATFORM and _plugin_error is None:
        return
    raise RuntimeError(
        f"verl is not running on the CPU platform (active: {active}; VERL_PLATFORM={requested!r}; "
        f"torch sees an accelerator: {not is_cpu_only()}). verl loads it from the entry point "
        "'ptl_rl_cpu' of group 'verl.plugins'. Remedy: `pip install -e .` in the ptl-rl checkout, "
        "leave VERL_USE_EXTERNAL_PLUGINS unset or have it name ptl_rl_cpu, and set VERL_PLATFORM=cpu "
        f"(an accelerator can be hidden with CUDA_VISIBLE_DEVICES=''). Error while loading it: {_plugin_error}"
    ) from _plugin_error


def usable_cores() -> int:
    """Number of CPUs this process may run on, which a container can limit below os.cpu_count()."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_env_vars(num_workers: int = 1) -> dict[str, str]:
    """Environment of a CPU run: for the stage process and for Ray's `runtime_env["env_vars"]`.

    Args:
        num_workers: trainer workers, and as many vLLM replicas, that share this machine.
    """
    # Training and generation alternate, so both get the same threads. Half of the cores stay with the
    # processes that schedule, serve and judge: threads that share a core stall at every barrier.
    threads = str(max(1, usable_cores() // (2 * num_workers)))
    return {
        "VERL_PLATFORM": CPU_PLATFORM,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # vLLM would pin every replica's threads to the same cores, and keep one core free.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB per vLLM replica, which would take most of the memory
        "TOKENIZERS_PARALLELISM": "false",
    }


def cuda_env_vars() -> dict[str, str]:
    """Environment of vLLM's processes on GPUs, without what this process's has already.

    When an engine starts, vLLM 0.24 tries out FlashInfer's sampler, which FlashInfer compiles at that moment, with the
    nvcc of a CUDA toolkit; where there is none, no engine starts. vLLM's own sampler is what verl's rollouts use in any
    case (they return log-probabilities), and greedy answers need neither.
    """
    return {name: value for name, value in {"VLLM_USE_FLASHINFER_SAMPLER": "0"}.items() if name not in os.environ}


def ray_runtime_env(num_workers: int = 1) -> dict[str, dict[str, str]]:
    """The `runtime_env` for `ray.init` when a stage starts Ray itself, before verl's `run_ppo`.

    verl builds its runtime environment only when it is the one that initialises Ray, so a stage
    which did so already has to pass verl's variables along with ours. verl leaves out what the calling
    process has set; workers of a Ray that was started elsewhere do not inherit it, so it is passed too.
    """
    from verl.trainer.constants_ppo import PPO_RAY_RUNTIME_ENV, get_ppo_ray_runtime_env

    set_here = {name: os.environ[name] for name in PPO_RAY_RUNTIME_ENV["env_vars"] if name in os.environ}
    verl_env = get_ppo_ray_runtime_env()["env_vars"]
    return {"env_vars": {**verl_env, **set_here, "TRANSFER_QUEUE_ENABLE": "1", **cpu_env_vars(num_workers)}}


VLLM_ENV = {"VLLM_LOGGING_LEVEL": "WARN", "VLLM_DISABLE_COMPILE_CACHE": "1"}
"""What verl gives vLLM's processes. Evaluations take it from here: importing verl takes longer than their answers."""


def evaluation_env(num_workers: int = 1) -> dict[str, str]:
    """The same as :func:`ray_runtime_env` for a stage that has vLLM alone; what the calling process has set wins."""
    set_here = {name: os.environ[name] for name in VLLM_ENV if name in os.environ}
    return {**VLLM_ENV, **set_here, **cpu_env_vars(num_workers)}


def float32_engine(prefix: str) -> dict[str, object]:
    """FSDP engine settings below the dotted key `prefix` for everything in float32, as in the rollouts.

    verl would compute in bfloat16 even with float32 parameters, and the policy's log-probabilities then
    differ from the rollout's by about 0.5 %.
    """
    return {
        f"{prefix}.model_dtype": "fp32",
        f"{prefix}.dtype": "float32",
        **{f"{prefix}.mixed_precision.{part}_dtype": "fp32" for part in ("param", "reduce", "buffer")},
    }


def _fsdp_cpu_overrides(prefix: str) -> dict[str, object]:
    return {**float32_engine(prefix), f"{prefix}.use_torch_compile": False}


def verl_cpu_overrides() -> dict[str, object]:
    """Settings that `verl.trainer.main_ppo` needs on CPUs, as dotted keys.

    Pass each to Hydra as `++key=value`, which sets keys present in verl's YAML as well as absent ones.
    """
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return {
        "trainer.device": CPU_PLATFORM,
        # The padding-free path needs flash-attn, which has no CPU build.
        "actor_rollout_ref.model.use_remove_padding": False,
        f"{actor}.strategy": "fsdp2",
        f"{actor}.use_torch_compile": False,
        **_fsdp_cpu_overrides(f"{actor}.fsdp_config"),
        "actor_rollout_ref.ref.use_torch_compile": False,
        **_fsdp_cpu_overrides("actor_rollout_ref.ref.fsdp_config"),
        f"{rollout}.name": "vllm",
        f"{rollout}.dtype": "float32",
        f"{rollout}.enforce_eager": True,
        f"{rollout}.tensor_model_parallel_size": 1,
        # Sleep mode unmaps device memory; vLLM has none to unmap here and refuses the flag.
        f"{rollout}.enable_sleep_mode": False,
        f"{rollout}.free_cache_engine": False,
        f"{rollout}.engine_kwargs.vllm.worker_extension_cls": WORKER_EXTENSION,
        **{f"{rollout}.engine_kwargs.vllm.{key}": value for key, value in ONE_PROCESS.items()},
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": 64,
        # Helper actors default to eight processes each: far more than there are cores.
        f"{rollout}.agent.num_workers": 1,
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "data.dataloader_num_workers": 0,
        "trainer.v1.sampler.custom_sampler.path": REPLAY_BUFFER[0],
        "trainer.v1.sampler.custom_sampler.name": REPLAY_BUFFER[1],
    }


def verl_sft_cpu_overrides() -> dict[str, object]:
    """Settings that `verl.trainer.sft_trainer_ray` needs on CPUs; keys as in `verl_cpu_overrides`."""
    return {
        "trainer.device": CPU_PLATFORM,
        "model.use_remove_padding": False,
        "engine.strategy": "fsdp2",
        **_fsdp_cpu_overrides("engine"),
        "data.num_workers": 0,
    }
