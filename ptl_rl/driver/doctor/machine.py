"""What the machine allows: open files, sockets, ports, names, shared memory, memory, disks, a C compiler."""

import os
import shutil
import socket
import sysconfig
from pathlib import Path

from ptl_rl.driver.cluster import SharedMemory
from ptl_rl.driver.doctor.finding import Finding, ok, problem, warning
from ptl_rl.driver.environment import ray_folder
from ptl_rl.driver.node_check import SHARED_MEMORY, TEMPORARY_GIB
from ptl_rl.driver.node_facts import free_bytes
from ptl_rl.errors import long_sockets

LEAST_FILES, AMPLE_FILES = 4096, 65536
"""Open files of a process: below the first Ray warns of connection errors, to the second it raises its own limit."""
PORTS = {6379: "a Ray head", 8265: "Ray's dashboard and jobs", 52365: "Ray's job agent"}


def check_open_files(limits: tuple[int, int] | None = None) -> Finding:
    """``ulimit -n``: Ray, vLLM and NCCL hold some thousand sockets; Ray raises the soft limit as far as the hard one.

    Args:
        limits: soft and hard, for tests.
    """
    import resource

    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = AMPLE_FILES if hard == resource.RLIM_INFINITY else max(soft, min(hard, AMPLE_FILES))
    text = f"{soft}, can be raised to {'any number' if hard == resource.RLIM_INFINITY else hard}"
    remedy = f"ulimit -n {AMPLE_FILES} before the start; for good: nofile in /etc/security/limits.conf, or docker run "
    remedy += f"--ulimit nofile={AMPLE_FILES}"
    if reachable < LEAST_FILES:
        return problem("open files", f"{text}; Ray wants at least {LEAST_FILES}", remedy)
    if reachable < AMPLE_FILES // 4:
        return warning("open files", f"{text}; eight workers may want more", remedy)
    return ok("open files", text)


def check_socket_paths(ray: Path | None = None, temporary: str | None = None) -> list[Finding]:
    """Paths of Ray's and vLLM's sockets below TMPDIR; the kernel takes 107 bytes."""
    ray = ray or ray_folder()
    findings = [problem("sockets", *found) for found in long_sockets(ray, temporary)]
    return findings or [ok("sockets", f"paths below {ray} are short enough")]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_ports(joined: bool) -> list[Finding]:
    """Ports of ``ray start --head``; a Ray of the run's own takes free ones. ``joined``: RAY_ADDRESS is set."""
    if joined:
        return []
    taken = [f"{port} ({what})" for port, what in PORTS.items() if _listens(port)]
    if not taken:
        return [ok("ports", ", ".join(map(str, PORTS)) + " are free")]
    text = f"taken, by another Ray or something else: {', '.join(taken)}; a run that starts its own Ray does not mind"
    remedy = "to join that Ray set RAY_ADDRESS=auto; to start a head beside it: ray start --head --port=6380 "
    remedy += "--dashboard-port=8266 --dashboard-agent-listen-port=0"
    return [warning("ports", text, remedy)]


def check_names() -> Finding:
    """Whether localhost and the machine's own name have an address: torch's process groups ask for both."""
    for name in ("localhost", socket.gethostname()):
        try:
            socket.getaddrinfo(name, None)
        except OSError as error:
            remedy = f"add a line '127.0.0.1 {name}' (on a cluster: the address that other nodes reach) to /etc/hosts"
            return problem("names", f"{name} cannot be resolved ({error.strerror or error})", remedy)
    return ok("names", f"localhost and {socket.gethostname()} have an address")


def check_shared_memory(memory: SharedMemory, free: int | None = None) -> Finding:
    """``free``: bytes of /dev/shm, for tests."""
    free = free_bytes(SHARED_MEMORY) if free is None else free
    if free is None:
        return warning("shared memory", f"there is no {SHARED_MEMORY}", "mount a tmpfs there")
    text = f"{SHARED_MEMORY} has {free / 2**30:.2f} GiB free"
    size = max(1, round(memory.ample + 0.5))
    remedy = f"docker run --shm-size={size}g, or mount -o remount,size={size}G {SHARED_MEMORY}"
    if free < memory.least * 2**30:
        return problem("shared memory", f"{text}, {memory.least:.2f} are needed", remedy)
    if free < memory.ample * 2**30:
        return warning("shared memory", f"{text}, up to {memory.ample:.1f} may be used", remedy)
    return ok("shared memory", text)


def check_memory(least_gib: float, why: str) -> Finding:
    """Main memory, of which a container may have less than the machine."""
    import psutil

    total = psutil.virtual_memory().total
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name).read_text().strip() if Path(name).exists() else ""
        total = min(total, int(limit)) if limit.isdecimal() else total
    text = f"{total / 2**30:.0f} GiB"
    if total < least_gib * 2**30:
        return problem("memory", f"{text}, but {why} about {least_gib:.0f}", "use a machine with more")
    return ok("memory", text)


def check_disk(run_parent: Path) -> list[Finding]:
    """Room for Ray's sessions, and whether run folder and data cache can be written."""
    from ptl_rl.data.cache import cache_folder

    ray = ray_folder()
    free = free_bytes(str(ray))
    text = f"{ray} has {(free or 0) / 2**30:.0f} GiB free for Ray's sessions"
    remedy = "make room, or set RAY_TMPDIR to a folder with more"
    findings = [ok("disk", text)]
    if free is not None and free < TEMPORARY_GIB * 2**30:
        findings = [problem("disk", f"{text}, {TEMPORARY_GIB:g} are needed", remedy)]
    for what, folder in (("run folder", run_parent), ("data cache", cache_folder()), ("Ray's folder", ray)):
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            reason = "cannot be written to" if place.is_dir() else "is no folder"
            findings.append(problem("disk", f"{what} {folder}: {place} {reason}", "choose another, or its permissions"))
    return findings


def check_compiler(device: str) -> Finding:
    """On GPUs Triton, and so vLLM and torch.compile, builds C code when kernels are first run."""
    if device == "cpu":
        return ok("C compiler", "not needed on CPUs")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None:
        return problem("C compiler", "neither gcc nor clang is there, nor CC set", "apt-get install gcc")
    if not header.exists():
        text = f"{compiler}, but {header} is missing, without which Triton cannot build"
        return problem("C compiler", text, "apt-get install python3-dev (of this Python's version)")
    return ok("C compiler", str(compiler))
