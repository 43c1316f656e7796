"""Each patch of verl does its work, and verl still needs it."""

import os

import pytest
import torch.distributed
from forked import call_forked

from ptl_rl.cpu import patches


@pytest.fixture
def distributed(monkeypatch):
    """`verl.utils.distributed` as verl ships it, with the backend of new process groups in `.backend`."""
    from verl.utils import distributed as module

    original = module.initialize_global_process_group_ray
    stock = getattr(original, "__wrapped__", original)
    monkeypatch.setattr(module, "initialize_global_process_group_ray", stock)
    monkeypatch.setattr(module, "get_device_name", lambda: "cpu")
    monkeypatch.setattr(module, "get_nccl_backend", lambda: "gloo")
    monkeypatch.setattr(module, "backend", None, raising=False)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **_: monkeypatch.setattr(module, "backend", backend),
    )
    return module


@pytest.mark.canary
def test_verl_still_names_gloo_twice_and_torch_still_refuses(distributed):
    """If this fails, `name_gloo_once` can go."""
    from torch.distributed.distributed_c10d import Backend, BackendConfig

    distributed.initialize_global_process_group_ray()
    assert distributed.backend == "cpu:gloo,cpu:gloo"
    with pytest.raises(ValueError, match=r"(?i)duplicate"):
        BackendConfig(Backend(distributed.backend))


def test_gloo_is_named_once(distributed):
    patches.name_gloo_once()
    distributed.initialize_global_process_group_ray(timeout_second=5)
    assert distributed.backend == "cpu:gloo"


def test_a_backend_that_was_asked_for_is_kept(distributed):
    patches.name_gloo_once()
    distributed.initialize_global_process_group_ray(backend="cuda:nccl")
    assert distributed.backend == "cuda:nccl"


def test_patching_twice_wraps_once(distributed):
    patches.name_gloo_once()
    first = distributed.initialize_global_process_group_ray
    patches.name_gloo_once()
    assert distributed.initialize_global_process_group_ray is first


def engines():
    from verl.workers.engine import EngineRegistry

    from ptl_rl.cpu.patches import use_cuda_engines

    os.environ.pop("VERL_ENGINE_DEVICE", None)
    with pytest.raises(ValueError, match="cpu"):
        EngineRegistry.get_engine_cls("language_model", "fsdp2")
    use_cuda_engines()
    return EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__


def test_verl_has_no_cpu_engine_until_told_to_use_the_others():
    """If it finds one before, `use_cuda_engines` can go."""
    assert call_forked(engines) == "FSDPEngineWithLMHead"


def test_an_unknown_verl_is_refused(monkeypatch):
    monkeypatch.setattr(patches, "version", lambda name: "0.10.0")
    with pytest.raises(RuntimeError, match=r"0\.10\.0"):
        patches.apply()


@pytest.mark.canary
def test_verls_replay_buffer_still_polls_too_seldom_for_tiny_models():
    """Fails once verl polls faster, or lets one set the interval: then ptl_rl.cpu.replay_buffer can go."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from ptl_rl.cpu.replay_buffer import POLL_SECONDS, QuickReplayBuffer

    settings = {
        "trainer_mode": "sync",
        "trainer_config": OmegaConf.create({}),
        "max_off_policy_threshold": 1,
        "max_off_policy_strategy": "drop",
        "sampler_kwargs": OmegaConf.create({}),
    }
    assert ReplayBuffer(**settings).poll_interval == 2.0
    assert QuickReplayBuffer(**settings).poll_interval == POLL_SECONDS


@pytest.mark.canary
def test_verl_still_offloads_the_reference_policy_to_pinned_memory():
    """If this fails, `keep_offloaded_memory_unpinned` can go."""
    import inspect

    import torch
    from verl.workers.engine.fsdp import transformer_impl as engine

    if torch.cuda.is_available():
        pytest.skip("memory can be pinned where there is an accelerator")
    with pytest.raises(RuntimeError):
        torch.zeros(1).pin_memory()
    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(engine.FSDPEngine)


def test_the_reference_policy_is_kept_in_unpinned_memory(monkeypatch):
    from torch.distributed.fsdp import CPUOffloadPolicy
    from verl.workers.engine.fsdp import transformer_impl as engine

    from ptl_rl.verl_patches.engine import keep_offloaded_memory_unpinned

    monkeypatch.setattr(engine, "CPUOffloadPolicy", CPUOffloadPolicy)
    keep_offloaded_memory_unpinned()
    patched = engine.CPUOffloadPolicy
    assert patched(pin_memory=True) == CPUOffloadPolicy(pin_memory=False)
    keep_offloaded_memory_unpinned()
    assert engine.CPUOffloadPolicy is patched


@pytest.fixture
def verl_log_probabilities():
    """verl's own function for machines without flash-attn's kernel."""
    from verl.utils import torch_functional

    import ptl_rl.verl_patches.engine  # noqa: F401  (patches it)

    return torch_functional.logprobs_from_logits_v2.stock


@pytest.mark.canary
def test_verl_still_takes_log_probabilities_token_by_token(verl_log_probabilities, monkeypatch):
    """If this fails, `take_log_probabilities_in_chunks` can go."""
    calls = []
    logsumexp = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda *args, **options: calls.append(1) or logsumexp(*args, **options))
    verl_log_probabilities(torch.randn(7, 5), torch.zeros(7, dtype=torch.long))
    assert len(calls) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_in_chunks_are_the_same_with_gradients(dtype, verl_log_probabilities, monkeypatch):
    from verl.utils.torch_functional import logprobs_from_logits

    from ptl_rl.verl_patches import engine

    monkeypatch.setattr(engine, "LOG_PROBABILITY_TOKENS", 4)
    logits = torch.randn(3, 5, 11).mul(4).to(dtype)
    labels, weight = torch.randint(0, 11, (3, 5)), torch.randn(3, 5)
    found = {}
    for name, function in (("ours", logprobs_from_logits), ("plain", plain_log_probabilities)):
        leaf = logits.clone().requires_grad_()
        values = function(leaf, labels)
        (values * weight).sum().backward()
        found[name] = values.detach(), leaf.grad
    assert found["ours"][0].dtype == torch.float32 and found["ours"][0].shape == (3, 5)
    torch.testing.assert_close(found["ours"][0], found["plain"][0])
    torch.testing.assert_close(found["ours"][1], found["plain"][1])


def plain_log_probabilities(logits, labels):
    return torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None]).squeeze(-1)


def test_log_probabilities_of_many_tokens_are_taken_at_a_time(monkeypatch):
    from verl.utils.torch_functional import logprobs_from_logits

    from ptl_rl.verl_patches import engine

    sizes, one = [], engine._chunk_log_probabilities
    monkeypatch.setattr(
        engine,
        "_chunk_log_probabilities",
        lambda logits_NV, labels_N: sizes.append(len(labels_N)) or one(logits_NV, labels_N),
    )
    logprobs_from_logits(torch.randn(2500, 3), torch.zeros(2500, dtype=torch.long))
    assert sizes == [1024, 1024, 452]
