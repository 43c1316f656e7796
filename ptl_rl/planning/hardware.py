"""What a plan counts with: the memory and the speed of GPUs, and of this machine where there is none."""

import os
import subprocess
from dataclasses import dataclass

from ptl_rl.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU, or, on CPUs, one worker's part of the machine."""

    name: str
    memory_gib: float
    """As CUDA reports it, which is less than the name says; of the whole machine on CPUs."""
    teraflops: float
    """Peak of dense bfloat16 products."""
    terabytes_per_second: float
    """Peak of its memory."""
    solves: float = 1.0
    """Speed of float64 factorisations, as a share of an H200's."""
    is_cpu: bool = False


GPUS = {
    "h200": Device("H200", 139.8, 989, 4.8),
    "h100": Device("H100 80 GB (SXM)", 79.1, 989, 3.35),
    "a100-80": Device("A100 80 GB", 79.1, 312, 2.0, 0.29),
    "a100-40": Device("A100 40 GB", 39.4, 312, 1.55, 0.29),
    "l40s": Device("L40S", 44.4, 362, 0.86, 0.02),
    "l4": Device("L4", 22.0, 121, 0.3, 0.01),
    "rtx4090": Device("RTX 4090", 23.5, 165, 1.0, 0.02),
}
"""Vendors' data sheets, without sparsity."""
_NAMES = (("H200", "h200"), ("H100", "h100"), ("L40S", "l40s"), ("L4", "l4"), ("4090", "rtx4090"))
CPU_GIGAFLOPS = 90.0
"""Of one core, float32 products of an ordinary size: SmolLM2's forward pass on an AMD EPYC (docs/results/cost.md)."""
CPU_GIGABYTES_PER_SECOND = 10.0


def known_gpu(name: str, setting: str) -> Device:
    """The GPU called ``name``; raises :class:`ConfigError` that lists those that are known."""
    if name.lower() not in GPUS:
        raise ConfigError(f"{setting}: {name} is not known; known are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def nvidia_smi(query: str) -> list[list[str]]:
    """Rows of ``nvidia-smi --query-gpu``; none if there is no such program or no driver."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line.strip()]


def gpu_of_this_machine() -> str | None:
    """Our name of the GPU that ``nvidia-smi`` reports first; None where there is none or it is not known."""
    try:
        name, memory_mib = nvidia_smi("name,memory.total")[0]
        if "A100" in name:
            return "a100-80" if float(memory_mib) > 60_000 else "a100-40"
    except (IndexError, ValueError):
        return None
    return next((ours for theirs, ours in _NAMES if theirs in name), None)


def this_machine(workers: int) -> Device:
    """One of ``workers`` CPU workers: as many threads as the run gives it, and all of the machine's memory."""
    from ptl_rl.cpu.checks import usable_cores

    cores = usable_cores()
    threads = max(1, cores // (2 * workers))
    return Device(
        f"{cores} CPU cores",
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        threads * CPU_GIGAFLOPS / 1000,
        CPU_GIGABYTES_PER_SECOND / 1000,
        is_cpu=True,
    )


def gpus_of_this_machine() -> int:
    """How many GPUs ``nvidia-smi`` reports, as far as ``CUDA_VISIBLE_DEVICES`` shows them to this process."""
    count = len(nvidia_smi("index"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    shown = [part for part in visible.split(",") if part.strip() not in ("", "-1", "NoDevFiles")]
    return min(count, len(shown))
