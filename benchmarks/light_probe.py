"""What a machine has, and whether the parts that recovery stands on work there: ``python light_probe.py OUT DEVICE``.

A process of its own, for it loads everything and holds GPU memory. Every check is a few lines of what verl or vLLM
does much later, behind minutes of starting up and, where it fails, sometimes in silence. ``OUT`` is written anew after
each, so that a check which hangs or takes the process down is seen as the one that is missing.
"""

import importlib
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl_rl.driver.environment import nvidia_smi

NEEDED = ("torch", "transformers", "ray", "verl", "vllm")
OPTIONAL = ("flash_attn", "flashinfer", "lm_eval")


def machine() -> dict[str, Any]:
    """Cores, memory, disk, and the compilers that Triton and torch.compile call."""
    import psutil

    shared = Path("/dev/shm")
    return {
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "shared_memory_gib": round(shutil.disk_usage(shared).free / 2**30, 1) if shared.exists() else 0.0,
        "disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "compiler": shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"),
        "python_headers": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        "nvcc": shutil.which("nvcc"),
    }


def gpus() -> dict[str, Any]:
    """What the driver says, without torch."""
    rows = nvidia_smi("name,memory.total,driver_version")
    if not rows:
        return {"error": "nvidia-smi: no such program, or no driver"}
    return {"count": len(rows), "name": rows[0][0], "memory_gib": float(rows[0][1]) / 1024, "driver": rows[0][2]}


def version_of(name: str) -> str:
    """Of a package once it is imported; raises what its import raises."""
    module = importlib.import_module(name)
    return str(getattr(module, "__version__", "unknown"))


def multiply(device: str) -> dict[str, Any]:
    """A 16-bit product: the driver and torch go together."""
    import torch

    size = 8192 if device == "cuda" else 256
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    left @ left
    started = time.perf_counter()
    value = float((left @ left).sum())  # waits for the device
    return {"tflops": round(2 * size**3 / (time.perf_counter() - started) / 1e12, 2), "finite": value == value}


def process_group(device: str) -> dict[str, Any]:
    """A collective of one rank, as in the pruning worker and verl's."""
    import tempfile

    import torch
    import torch.distributed as dist

    store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    one = torch.ones(1, device=device)
    dist.all_reduce(one)
    dist.destroy_process_group()
    return {"sum": float(one)}


def compiled(device: str) -> dict[str, Any]:
    """verl compiles its entropy, and vLLM's kernels are Triton's: both call a C compiler, which wants Python.h."""
    import torch

    value = torch.compile(lambda x: (x.exp() * 2).sum())(torch.zeros(64, device=device))
    return {"value": float(value)}


def _receive(queue: Any, answers: Any) -> None:
    answers.put(float(queue.get().sum()))


def shared_between_processes(device: str) -> dict[str, Any]:
    """verl hands new weights to vLLM's process through CUDA IPC; where that fails in vLLM, verl waits for ever."""
    import torch
    import torch.multiprocessing as multiprocessing

    spawn = multiprocessing.get_context("spawn")
    queue, answers = spawn.Queue(), spawn.Queue()
    process = spawn.Process(target=_receive, args=(queue, answers), daemon=True)
    process.start()
    tensor = torch.ones(1024, device=device)
    queue.put(tensor)
    try:
        return {"sum": answers.get(timeout=90)}
    finally:
        process.kill()


def sleep_and_wake(device: str) -> dict[str, Any]:
    """vLLM's sleep, which frees a GPU between rollouts, unmaps memory that it has allocated itself."""
    import torch
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    with allocator.use_memory_pool(tag="weights"):
        weights = torch.ones(1 << 28, device=device)
    free = torch.cuda.mem_get_info()[0]
    allocator.sleep(offload_tags=("weights",))
    freed = (torch.cuda.mem_get_info()[0] - free) / 2**30
    allocator.wake_up()
    return {"freed_gib": round(freed, 2), "kept": float(weights.sum()) == float(1 << 28)}


CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {"multiply": multiply, "process_group": process_group}
CUDA_CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "compile": compiled,
    "ipc": shared_between_processes,
    "sleep": sleep_and_wake,
}


def timed(function: Callable[[], Any]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        found = {"value": function()}
    except BaseException as error:  # the report is about what fails, whatever it is
        found = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    return {**found, "seconds": round(time.perf_counter() - started, 2)}


def main(out: Path, device: str) -> None:
    """Write the report to ``out`` as it grows; ``problems`` says what is wrong, in words."""
    report: dict[str, Any] = {"machine": machine(), "packages": {}, "checks": {}, "problems": []}
    problems: list[str] = report["problems"]

    def save() -> None:
        unfinished = out.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(report))
        unfinished.replace(out)

    if device == "cuda":
        report["gpu"] = gpus()
    for name in NEEDED + OPTIONAL:
        report["running"] = f"import {name}"
        save()
        found = report["packages"][name] = timed(lambda name=name: version_of(name))
        if "error" in found and name in NEEDED:
            problems.append(f"import {name}: {found['error']}")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        del report["running"]
        problems.append(f"torch {torch.__version__} sees no GPU; its CUDA is {torch.version.cuda}: {report['gpu']}")
        save()
        return
    for name, check in {**CHECKS, **(CUDA_CHECKS if device == "cuda" else {})}.items():
        report["running"] = name
        save()
        found = report["checks"][name] = timed(lambda check=check: check(device))
        if "error" in found:
            problems.append(f"{name}: {found['error']}")
    del report["running"]
    save()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
