"""``ptl doctor``: everything that would stop a run on this machine, found before anything is started or rented.

Every check is a function that returns findings; none raises, none changes anything. What a run checks itself before it
starts Ray is not written a second time: those functions are called.
"""

import os
from collections.abc import Callable
from pathlib import Path

from ptl_rl.config import RunConfig
from ptl_rl.driver.cluster import SharedMemory, memory_of_node
from ptl_rl.driver.doctor import machine, recipe, stack
from ptl_rl.driver.doctor.finding import Finding
from ptl_rl.driver.environment import CudaFacts, detect_device, read_cuda
from ptl_rl.errors import resolved

__all__ = ["Finding", "examine", "stops"]

LEAST_MEMORY_GIB = 6.0
"""Ray, verl's workers and a vLLM server beside the smallest model."""
Check = Callable[[], Finding | list[Finding]]


def _made(checks: list[Check]) -> list[Finding]:
    findings: list[Finding] = []
    for check in checks:
        found = check()
        findings += found if isinstance(found, list) else [found]
    return findings


def wanted_memory(config: RunConfig | None, device: str, joined: bool, cuda: CudaFacts) -> SharedMemory:
    """/dev/shm of this machine; the head of a cluster may be without GPUs, and so without workers."""
    if config is None:
        return SharedMemory(0.125, 1.0)
    elsewhere = joined and device == "cuda" and not cuda.devices
    return memory_of_node(config, device, 0 if elsewhere else config.resources.workers_per_node)


def examine(config: RunConfig | None, run_dir: Path | None = None, lock: Path | None = None) -> list[Finding]:
    """All findings, of the machine, and of a recipe if one is given.

    Args:
        run_dir: folder of the run that is meant; default: below ./runs.
        lock: compared with in place of this checkout's own.
    """
    cuda, joined = read_cuda(), bool(os.environ.get("RAY_ADDRESS"))
    device = detect_device(config) if config is not None else "cuda" if cuda.available else "cpu"
    wanted = 0 if joined or config is None else config.resources.workers  # of this machine
    memory = wanted_memory(config, device, joined, cuda)
    checks: list[Check] = [
        stack.check_python,
        lambda: stack.check_installed(device, lock),
        lambda: stack.check_imports(device),
        lambda: [] if joined and not cuda.devices else stack.check_cuda(cuda, device, wanted),
        lambda: stack.check_flash_attention(device),
        machine.check_open_files,
        machine.check_socket_paths,
        lambda: machine.check_ports(joined),
        machine.check_names,
        lambda: machine.check_shared_memory(memory),
        lambda: machine.check_disk(resolved(run_dir or Path("runs"))),
        lambda: machine.check_compiler(device),
    ]
    return _made(checks) + _made(_of_recipe(config, device, run_dir))


def _of_recipe(config: RunConfig | None, device: str, run_dir: Path | None) -> list[Check]:
    if config is None:
        return [
            lambda: machine.check_memory(LEAST_MEMORY_GIB, "a run takes"),
            lambda: recipe.check_ray(None, device, None, None),
        ]
    model, found = recipe.find_model(config)
    checks: list[Check] = [
        lambda: found,
        lambda: recipe.check_dtype(config, device),
        lambda: recipe.check_ray(config, device, run_dir, model),
    ]
    least, why = LEAST_MEMORY_GIB, "a run takes"
    if model is not None:
        offloaded = recipe.offloaded_gib(config, model.shape) if device == "cuda" else 0.0
        least, why = (offloaded, "parameters and optimizer, offloaded, take") if offloaded > least else (least, why)
        checks += [
            lambda: recipe.check_attention(config, device, model),
            lambda: recipe.check_room(config, model, run_dir or Path("runs")),
        ]
    return [*checks, lambda: machine.check_memory(least, why)]


def stops(findings: list[Finding]) -> bool:
    """Something would stop the run."""
    return any(finding.level == "problem" for finding in findings)
