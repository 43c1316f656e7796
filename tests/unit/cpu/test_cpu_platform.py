"""The CPU platform and its device module answer what verl asks."""

import pytest
import torch

from ptl_rl.cpu import device
from ptl_rl.cpu.verl_platform import PlatformCPU


@pytest.fixture
def platform() -> PlatformCPU:
    return PlatformCPU()


def test_current_device_serves_wherever_verl_passes_it(platform):
    device = platform.current_device()
    assert torch.zeros(1).to(device).device.type == "cpu"
    assert torch.device(device).type == "cpu"
    assert torch.nn.Linear(1, 1, device="meta").to_empty(device=device).weight.device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="index 0 is a CUDA device here")
@pytest.mark.canary
def test_an_index_would_not_do_as_current_device():
    """If this fails, torch takes an index on the CPU and `current_device` can follow verl's signature."""
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).to(0)


def test_weights_go_through_shared_memory_and_gloo(platform):
    assert not platform.is_ipc_supported()
    assert platform.communication_backend_name() == "gloo"


def test_workers_are_placed_by_logical_gpus(platform):
    assert platform.ray_resource_options(1) == {"num_gpus": 1}


def test_nvtx_range_is_a_context(platform):
    with platform.nvtx_range("step"):
        pass


def test_memory_is_that_of_the_process():
    allocated = device.memory_allocated()
    assert 0 < allocated <= device.max_memory_allocated()
    available, total = device.mem_get_info()
    assert 0 < available <= total


def test_random_state_round_trip():
    device.manual_seed(3)
    state = device.get_rng_state()
    first = torch.rand(4)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_the_rest_is_torch_cpu():
    assert device.device_count() == torch.cpu.device_count()
    with pytest.raises(AttributeError):
        _ = device.no_such_function


@pytest.mark.parametrize("name", ["empty_cache", "ipc_collect", "memory_allocated", "mem_get_info"])
@pytest.mark.canary
def test_torch_cpu_lacks_what_the_module_adds(name):
    """If this fails, torch.cpu has learnt the function and ours can go."""
    assert not hasattr(torch.cpu, name)
