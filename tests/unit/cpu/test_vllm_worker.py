"""Weights of a rollout stay updatable, and a failed update is not silent."""

import pytest
import torch

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vLLM's CPU layers only", allow_module_level=True)

from ptl_rl.cpu import vllm_worker


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64, 32), requires_grad=False)


@pytest.fixture
def layers_utils(monkeypatch):
    """vLLM's module with its own dispatch function, restored afterwards."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    return utils


def output_after_update(layer: Layer) -> torch.Tensor:
    layer.weight.data.fill_(2.0)
    return layer.cpu_linear(torch.ones(1, 32), layer.weight, None)


@pytest.mark.canary
def test_vllm_still_drops_the_parameter_of_linear_layers(layers_utils):
    """If this and the next test fail, `keep_weights_unpacked` can go."""
    layer = Layer()
    layers_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0


@pytest.mark.canary
def test_vllm_still_computes_tied_heads_with_the_old_weight(layers_utils):
    layer = Layer()
    layers_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    assert torch.allclose(output_after_update(layer), torch.full((1, 64), 32.0))


@pytest.mark.parametrize("remove_weight", [True, False])
def test_an_update_reaches_the_output(layers_utils, remove_weight):
    vllm_worker.keep_weights_unpacked()
    layer = Layer()
    layers_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)
    assert torch.allclose(output_after_update(layer), torch.full((1, 64), 64.0))


@pytest.mark.parametrize("layer_module", ["linear", "vocab_parallel_embedding"])
def test_vllm_looks_the_dispatch_up_when_it_needs_it(layer_module):
    """A module-level import would bypass the replacement."""
    from importlib import import_module

    assert not hasattr(import_module(f"vllm.model_executor.layers.{layer_module}"), "dispatch_cpu_unquantized_gemm")


@pytest.fixture
def extension(monkeypatch):
    """An extension whose verl half receives three buckets, of which "bad" does not load."""
    loaded: list[str] = []

    def receive(self, buckets):
        for bucket in buckets:
            self._update_weights([(bucket, torch.zeros(1))], None, False)

    def load(self, weights, *_):
        if weights[0][0] == "bad":
            raise ValueError("shapes differ")
        loaded.append(weights[0][0])

    monkeypatch.setattr(vllm_worker.vLLMColocateWorkerExtension, "update_weights_from_ipc", receive)
    monkeypatch.setattr(vllm_worker.vLLMColocateWorkerExtension, "_update_weights", load)
    # Not constructed: verl's constructor would tie this process to its parent's life.
    instance = object.__new__(vllm_worker.CpuWorkerExtension)
    instance.loaded = loaded
    return instance


def test_all_buckets_are_loaded(extension):
    extension.update_weights_from_ipc(["a", "b"])
    assert extension.loaded == ["a", "b"]


def test_failed_update_drains_the_buckets_then_raises(extension):
    with pytest.raises(RuntimeError, match="shapes differ"):
        extension.update_weights_from_ipc(["a", "bad", "c"])
    assert extension.loaded == ["a"]
    extension.update_weights_from_ipc(["d"])
    assert extension.loaded == ["a", "d"]
