"""Tables that are made once and then memory-mapped: prepared corpora, and which of their rows to leave out.

An entry is a folder ``KEY/`` with one Arrow file and ``about.json``, which holds the file's checksum. It is written
under a temporary name, synced and renamed, so that no reader ever sees half of one; of two writers the first one's
stays. An entry that is damaged is made again. Everything can be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl_rl.data.records import DataError
from ptl_rl.data.sources import file_hash

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
"""Part of every key: raise it whenever what is written, or how it is worked out, changes."""
TABLE, ABOUT, TEMPORARY = "rows.arrow", "about.json", ".making-"
ABANDONED_SECONDS = 86400


@dataclass(frozen=True)
class Entry:
    """A table of the cache, and what was noted when it was made."""

    table: "pyarrow.Table"
    about: dict[str, Any]


def cache_folder() -> Path:
    """``$PTL_CACHE``, else ``ptl-rl/data`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get("PTL_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptl-rl" / "data"


def key_of(*parts: Any) -> str:
    """One name for everything that an entry depends on; ``parts`` must be representable in JSON."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


def _read(folder: Path) -> Entry | None:
    """None for an entry that is missing or damaged."""
    import pyarrow

    try:
        about = json.loads((folder / ABOUT).read_text())
        if file_hash(folder / TABLE) != about["checksum"]:
            return None
        return Entry(pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / TABLE))).read_all(), about)
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's are among them
        return None


def sync(path: Path) -> None:
    """Put a file, or a folder's names, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(folder: Path, schema: "pyarrow.Schema", make: "Callable[[dict[str, Any]], Iterator[pyarrow.RecordBatch]]"):
    import pyarrow

    about: dict[str, Any] = {}
    with pyarrow.OSFile(str(folder / TABLE), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
        for batch in make(about):
            writer.write_batch(batch)
    about["checksum"] = file_hash(folder / TABLE)
    (folder / ABOUT).write_text(json.dumps(about))
    sync(folder / TABLE)
    sync(folder / ABOUT)


def _remove_abandoned(root: Path) -> None:
    """What writers left behind that were killed."""
    for folder in root.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def cached(
    key: str, schema: "pyarrow.Schema", make: "Callable[[dict[str, Any]], Iterator[pyarrow.RecordBatch]]"
) -> Entry:
    """The entry of ``key``, made if it is missing or damaged.

    Args:
        make: yields the table's batches, and writes into its argument what is to be noted beside them.

    Raises:
        DataError: the cache cannot be written.
    """
    root = cache_folder()
    folder = root / key
    if (entry := _read(folder)) is not None:
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        made = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=root))
    except OSError as error:
        raise DataError(
            f"{root}: cannot write prepared data: {error.strerror}; set PTL_CACHE to another folder"
        ) from None
    try:
        _write(made, schema, make)
        entry = _read(made)  # before it is renamed: from then on somebody may take it for damaged and move it away
        if entry is None:
            raise DataError(f"{root}: what was written there cannot be read back; set PTL_CACHE to another folder")
        _put(made, folder)
        return entry
    except OSError as error:
        raise DataError(f"{root}: cannot write prepared data: {error}; set PTL_CACHE to another folder") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _put(made: Path, folder: Path) -> None:
    """Rename; an entry that another writer has put there meanwhile stays, a damaged one goes."""
    for _ in range(3):
        with contextlib.suppress(OSError):  # a folder that is not empty cannot be renamed to
            made.rename(folder)
            return
        if _read(folder) is not None:
            return
        with contextlib.suppress(OSError):
            folder.rename(made.with_name(f"{made.name}-damaged"))
        shutil.rmtree(made.with_name(f"{made.name}-damaged"), ignore_errors=True)
