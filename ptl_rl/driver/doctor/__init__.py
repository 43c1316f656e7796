"""``ptl doctor``: everything that would stop a run on this machine, found before anything is started or rented.

Every check is a function that returns findings; none raises, none changes anything. What a run checks itself before it
starts Ray is not written a second time: those functions are called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ptl_rl.config import RunConfig
from ptl_rl.driver.cluster import SharedMemory, shared_memory
from ptl_rl.driver.doctor import machine, recipe, stack
from ptl_rl.driver.doctor.finding import Finding
from ptl_rl.driver.environment import read_cuda

__all__ = ["Finding", "examine", "stops"]

LEAST_MEMORY_GIB = 6.0
"""Ray, verl's workers and a vLLM server beside the smallest model."""


@dataclass(frozen=True)
class _Asked:
    config: RunConfig | None
    device: str
    run_dir: Path | None
    lock: Path | None


def _device(config: RunConfig | None, available: bool) -> str:
    chosen = "auto" if config is None else config.resources.device
    if chosen == "auto":
        return "cuda" if available else "cpu"
    return chosen


def _here(asked: _Asked, joined: bool) -> int:
    """GPUs that the recipe wants of this machine."""
    return 0 if joined or asked.config is None else asked.config.resources.workers


def examine(config: RunConfig | None, run_dir: Path | None = None, lock: Path | None = None) -> list[Finding]:
    """All findings, of the machine, and of a recipe if one is given.

    Args:
        run_dir: folder of the run that is meant; default: below ./runs.
        lock: compared with in place of this checkout's own.
    """
    import os

    cuda, joined = read_cuda(), bool(os.environ.get("RAY_ADDRESS"))
    asked = _Asked(config, _device(config, cuda.available), run_dir, lock)
    device = asked.device
    memory = shared_memory(config, device) if config is not None else SharedMemory(0.125, 1.0)
    checks: list[Callable[[], Finding | list[Finding]]] = [
        stack.check_python,
        lambda: stack.check_installed(device, lock),
        lambda: stack.check_imports(device),
        lambda: [] if joined and not cuda.devices else stack.check_cuda(cuda, device, _here(asked, joined)),
        lambda: stack.check_flash_attention(device),
        machine.check_open_files,
        machine.check_socket_paths,
        lambda: machine.check_ports(joined),
        machine.check_names,
        lambda: machine.check_shared_memory(memory),
        lambda: machine.check_disk((run_dir or Path("runs")).resolve()),
        lambda: machine.check_compiler(device),
    ]
    findings = [finding for check in checks for finding in _run(check)]
    return findings + (_of_recipe(asked, config) if config is not None else _of_none(asked))


def _of_none(asked: _Asked) -> list[Finding]:
    memory = _run(lambda: machine.check_memory(LEAST_MEMORY_GIB, "a run takes"))
    return memory + _run(lambda: recipe.check_ray(None, asked.device, None, None))


def _of_recipe(asked: _Asked, config: RunConfig) -> list[Finding]:
    model, found = recipe.find_model(config)
    device = asked.device
    checks: list[Callable[[], Finding | list[Finding]]] = [
        lambda: recipe.check_dtype(config, device),
        lambda: recipe.check_ray(config, device, asked.run_dir, model),
    ]
    least, why = LEAST_MEMORY_GIB, "a run takes"
    if model is not None:
        offloaded = recipe.offloaded_gib(config, model.shape) if device == "cuda" else 0.0
        least, why = (offloaded, "parameters and optimizer, offloaded, take") if offloaded > least else (least, why)
        checks += [
            lambda: recipe.check_attention(config, device, model),
            lambda: recipe.check_room(config, model, asked.run_dir or Path("runs")),
        ]
    checks.append(lambda: machine.check_memory(least, why))
    return [found, *(finding for check in checks for finding in _run(check))]


def _run(check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    found = check()
    return found if isinstance(found, list) else [found]


def stops(findings: list[Finding]) -> bool:
    """Something would stop the run."""
    return any(finding.level == "problem" for finding in findings)
