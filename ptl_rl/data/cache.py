"""Tables that are made once and then memory-mapped by ``datasets``. Everything can be deleted at any time.

A file's name holds its key and its checksum. It is written under another name, synced and renamed, so no reader sees
half of one, and one that was damaged is made again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl_rl.data.records import DataError
from ptl_rl.data.sources import file_hash

if TYPE_CHECKING:
    import datasets
    import pyarrow

FORMAT = 4
"""Part of every key: raise it whenever what is written, or how it is worked out, changes."""
TEMPORARY = ".making-"
ABANDONED_SECONDS = 86400


def cache_folder() -> Path:
    """``$PTL_CACHE``, else ``ptl-rl/data`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get("PTL_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptl-rl" / "data"


def key_of(*parts: Any) -> str:
    """One name for everything that a table depends on; ``parts`` must be representable in JSON."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


def sync(path: Path) -> None:
    """Put a file, or a folder's names, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cached(
    key: str, features: "datasets.Features", make: "Callable[[], Iterator[pyarrow.Table]]"
) -> "datasets.Dataset":
    """The table of ``key``, made if it is missing or damaged.

    Args:
        make: yields the table in parts.

    Raises:
        DataError: the cache cannot be written; and what ``make`` raises.
    """
    from datasets import Dataset

    root = cache_folder()
    for path in sorted(root.glob(f"{key}-*.arrow")):
        with contextlib.suppress(OSError):
            if path.name == _name(key, path):
                return Dataset.from_file(str(path))
    try:
        return Dataset.from_file(str(_write(root, key, features, make)))
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{root}: cannot write prepared data: {why}; set PTL_CACHE to another folder") from None


def _name(key: str, path: Path) -> str:
    return f"{key}-{file_hash(path)[:32]}.arrow"


def _write(root: Path, key: str, features: "datasets.Features", make: "Callable[[], Iterator[pyarrow.Table]]") -> Path:
    import pyarrow

    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=root, ignore_cleanup_errors=True) as folder:
        made, schema = Path(folder) / "rows.arrow", features.arrow_schema
        with pyarrow.OSFile(str(made), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            for table in make():
                writer.write_table(table.replace_schema_metadata(schema.metadata))
        sync(made)
        whole = root / _name(key, made)
        made.replace(whole)
    return whole


def _remove_abandoned(root: Path) -> None:
    """What writers left behind that were killed."""
    for folder in root.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
