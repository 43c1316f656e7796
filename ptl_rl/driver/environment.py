"""What this machine offers a run on GPUs: torch's build, the NVIDIA driver, the GPUs; and why they do not go together.

The facts are read once, by :func:`read_cuda`; what follows from them are pure functions, which preflight, the check of
a cluster's nodes and ``ptl doctor`` share. Torch is imported in functions only.
"""

import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.planning.hardware import nvidia_smi

DRIVER_FILE = Path("/proc/driver/nvidia/version")
DEVICE_FOLDER = Path("/dev")
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""CUDA's major version to the oldest Linux driver that runs it (NVIDIA's table of minor version compatibility)."""


@dataclass(frozen=True)
class CudaFacts:
    """What one process sees. ``driver``: its version, None if there is none. ``devices``: device files of GPUs."""

    driver: str | None = None
    devices: int = 0
    torch: str | None = None
    """None: not installed."""
    cuda: str | None = None
    """CUDA (or ROCm) version that torch was built for; None: a CPU build, or unknown as torch was not imported."""
    available: bool = False
    """``torch.cuda.is_available()``."""
    usable: int = 0
    """``torch.cuda.device_count()``."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def parse_driver(text: str) -> str | None:
    """The driver's version in the kernel module's or nvidia-smi's words."""
    found = re.search(r"\b\d{3,}(\.\d+){1,2}\b", text)
    return found.group() if found else None


def find_driver() -> str | None:
    """Version of the NVIDIA driver; None if none is loaded."""
    if DRIVER_FILE.exists():
        return parse_driver(DRIVER_FILE.read_text())
    rows = nvidia_smi("driver_version")  # WSL has no such file
    return parse_driver(rows[0][0]) if rows else None


def read_cuda() -> CudaFacts:
    """The facts of this process and machine; no CUDA context is made.

    Torch is asked even where no driver shows: some sandboxes and boards have none of its files.
    """
    driver = find_driver()
    devices = len([path for path in DEVICE_FOLDER.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    if Path("/dev/dxg").exists() and not devices:  # WSL: one file for all
        devices = len(nvidia_smi("name"))
    try:
        installed = version("torch")
    except PackageNotFoundError:
        installed = None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if installed is None:
        return CudaFacts(driver, devices, visible=visible)
    import torch

    built_for = torch.version.cuda or getattr(torch.version, "hip", None)
    available = torch.cuda.is_available()
    usable = torch.cuda.device_count() if available else 0
    return CudaFacts(driver, devices or usable, installed, built_for, available, usable, visible)


def ray_folder() -> Path:
    """Where a Ray that is started here keeps its sessions, unless it is told otherwise."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


def own_ray_folder() -> Path | None:
    """:func:`ray_folder` where a run starts a Ray of its own; None where it joins one, which has its own place."""
    return None if os.environ.get("RAY_ADDRESS") else ray_folder()


def oldest_driver(cuda: str) -> str | None:
    """The oldest driver for a CUDA version, e.g. '13.0'; None if that is not known."""
    return OLDEST_DRIVER.get(_numbers(cuda)[0])


def why_no_cuda(facts: CudaFacts) -> str | None:
    """Why torch cannot compute on a GPU here, with the remedy; None if it can."""
    if facts.available:
        return None
    if facts.torch is None:
        return "torch is not installed; install this project's GPU stack (launch/setup_gpu.sh)"
    if facts.driver is None:
        return (
            "this machine has no NVIDIA driver and so no GPU that torch could use; run where there are GPUs, or, to "
            "try things out without, set resources.device to cpu or auto"
        )
    if facts.devices == 0:
        return (
            f"the machine has the NVIDIA driver {facts.driver}, but no GPU is visible here (/dev/nvidia0 is missing); "
            "start the container with its GPUs (docker run --gpus all), or ask the batch system for them"
        )
    if facts.cuda is None:
        return (
            f"torch {facts.torch} is a build without CUDA, although the machine has {facts.devices} GPUs; install "
            "this project's GPU stack (launch/setup_gpu.sh)"
        )
    needed = oldest_driver(facts.cuda)
    if needed is not None and _numbers(facts.driver) < _numbers(needed):
        return (
            f"the NVIDIA driver is {facts.driver}, but torch {facts.torch} is built for CUDA {facts.cuda}, which needs "
            f"driver {needed} or newer; update the driver, or install a torch built for an older CUDA"
        )
    if facts.visible is not None and facts.visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides all {facts.devices} GPUs; unset it"
    return (
        f"torch {facts.torch} (CUDA {facts.cuda}, driver {facts.driver}) finds none of {facts.devices} GPUs usable; "
        "see what nvidia-smi says, and whether its fabric manager runs where GPUs are joined by NVSwitch"
    )


def oldest_capability() -> float | None:
    """Compute capability of this machine's oldest GPU; None where none is seen, as on a head node without."""
    found = [float(row[0]) for row in nvidia_smi("compute_cap") if re.fullmatch(r"\d+\.\d+", row[0])]
    return min(found, default=None)


def detect_device(config: RunConfig) -> str:
    """'cpu' or 'cuda', as the recipe asks or, with ``auto``, as this machine has, or the cluster that it joins.

    A head node may have no GPUs while others do, so there a joined Ray is asked, if torch could use a GPU at all.
    """
    device = config.resources.device
    if device != "auto":
        return device
    import torch

    from ptl_rl.cpu.checks import is_cpu_only

    if not is_cpu_only():
        return "cuda"
    address = os.environ.get("RAY_ADDRESS")
    return "cuda" if address and torch.version.cuda is not None and cluster_has_gpus(address) else "cpu"


def cluster_has_gpus(address: str) -> bool:
    """Whether a node of the Ray at ``address`` found GPUs of its own; it was only told of logical ones otherwise.

    False where nobody answers: what joins it says so.
    """
    import ray

    from ptl_rl.driver.ray_session import unreachable

    if address.startswith("ray://") or unreachable(address):
        return False
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError):
        return False
    try:
        return any(name.startswith("accelerator_type:") for name in ray.cluster_resources())
    finally:
        ray.shutdown()


def check_gpus(config: RunConfig, device: str, facts: CudaFacts | None = None) -> None:
    """Refuse a run on GPUs that this machine cannot make; on a joined cluster, the nodes are asked instead.

    Args:
        device: 'auto', 'cpu' or 'cuda'; only with the last is anything checked.
        facts: for tests; read here otherwise.

    Raises:
        ConfigError: no usable GPU, or fewer than ``resources.workers_per_node``.
    """
    if device != "cuda" or os.environ.get("RAY_ADDRESS"):
        return
    facts = facts or read_cuda()
    if problem := why_no_cuda(facts):
        raise ConfigError(f"resources.device: cuda, but {problem}")
    resources = config.resources
    if facts.usable < resources.workers:
        visible = f" (CUDA_VISIBLE_DEVICES={facts.visible})" if facts.visible else ""
        where = "this machine" if resources.nodes == 1 else "this machine, where the run would start a Ray of its own,"
        raise ConfigError(
            f"resources: the recipe wants {resources.nodes} x {resources.workers_per_node} GPUs (nodes x "
            f"workers_per_node), but {where} has {facts.usable}{visible}; lower resources.workers_per_node, or join a "
            "cluster: start Ray on its nodes and set RAY_ADDRESS"
        )
