"""`torch.cpu` with the memory and random-number calls that verl makes on `torch.cuda`.

verl asks a platform for its `torch.<device>` module. `torch.cpu` lacks part of that interface;
this module adds it and passes everything else on. Memory is that of the process, so verl's memory
metrics stay meaningful on a CPU.
"""

import resource
from typing import Any

import psutil
import torch
from torch import Tensor

_KIB = 1024


def _nothing(*_arguments: Any, **_options: Any) -> None:
    """torch caches no host memory and hands out no handles to it; the operating system alone has limits and peaks."""


empty_cache = ipc_collect = reset_peak_memory_stats = set_per_process_memory_fraction = _nothing


def memory_allocated(device: Any = None) -> int:
    """Resident memory of this process, bytes."""
    return psutil.Process().memory_info().rss


def max_memory_allocated(device: Any = None) -> int:
    """Highest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    return max(peak, memory_allocated())  # the kernel updates the peak with a delay


memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated
"""The host has no caching allocator to tell apart."""


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(available, total) memory of the machine, bytes."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def get_device_name(device: Any = None) -> str:
    """Name under which torch knows the device."""
    return "cpu"


manual_seed = manual_seed_all = torch.manual_seed


def get_rng_state(device: Any = None) -> Tensor:
    """State of torch's CPU generator."""
    return torch.get_rng_state()


def set_rng_state(state: Tensor, device: Any = None) -> None:
    """Restore the state of torch's CPU generator."""
    torch.set_rng_state(state)


def __getattr__(name: str) -> Any:
    return getattr(torch.cpu, name)
