"""The run's append-only memory: what the journal does not name does not exist.

A line is written only after its artefact was verified, synced to disk and renamed into place, so that a run killed at
any instant continues from its last line.
"""

import errno
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ptl_rl.errors import UserError

WHOLE_BYTES, PART_BYTES = 64 << 20, 1 << 20


class JournalError(UserError, ValueError):
    """A journal that cannot be trusted; the message names file and line."""


class Entry(BaseModel):
    """One finished stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cycle: int
    stage: str
    round: int = 0
    part: int = 0
    """Of several recoveries, which one; from 0."""
    time: float = 0.0
    seconds: float = 0.0
    artefact: str | None = None
    """Path relative to the run folder."""
    files: dict[str, str] = {}
    """Of the artefact, by name: what :func:`fingerprint` gave; empty in journals of earlier versions."""
    metrics: dict[str, Any] = {}


def fingerprint(path: Path) -> str:
    """Changes with a file: with every bit of one of up to 64 MiB, as scores and plans are; of larger ones, which are
    weights, with the size and the first and the last MiB, where safetensors has its header.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(PART_BYTES))
            file.seek(-PART_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:32]


def sync_folder(path: Path) -> None:
    """Flush a folder's own entries (names) to disk; some network file systems have no such call, for folders alone."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # what databases let pass, too
            raise
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush every file below ``path``, and ``path`` itself, to disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)  # noqa: PTH118
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(folder))


class Journal:
    """Reads and appends ``journal.jsonl``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """All whole lines. A last line cut short by a crash is dropped; any other bad line raises."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        *whole, tail = content.split(b"\n")
        if tail:
            self._truncate(len(content) - len(tail))
        entries = []
        for number, line in enumerate(whole, 1):
            try:
                entries.append(Entry.model_validate_json(line))
            except ValidationError as error:
                raise JournalError(f"{self.path}:{number}: not a journal line: {error.errors()[0]['msg']}") from None
        return entries

    def _truncate(self, size: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())

    def append(self, entry: Entry) -> Entry:
        """Write one line and wait until it is on disk; returns the entry as it is written, with its time."""
        stamped = entry.model_copy(update={"time": entry.time or time.time()})
        line = json.dumps(stamped.model_dump(mode="json"), allow_nan=True) + "\n"
        created = not self.path.exists()
        with self.path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if created:
            sync_folder(self.path.parent)
        return stamped
