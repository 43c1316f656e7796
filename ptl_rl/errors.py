"""What went wrong and can be mended by the user, and checks of the places that a user names.

The command line turns :class:`UserError`, and what the file system says against a path, into a sentence and exit
status 2.
"""

import os
import shlex
from pathlib import Path


class UserError(Exception):
    """Base of every error that a user can mend: the message names the file or setting, and the remedy.

    Whatever is raised beside it is a fault of ours, or of the machine, and keeps its traceback.
    """


class OutputError(UserError, OSError):
    """A place that cannot be written to, or that holds something."""


SOCKET_BYTES = 107
"""Longest path of a Unix socket."""
RAY_SOCKET = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"
VLLM_SOCKET = "00000000-0000-0000-0000-000000000000"
LONGEST_PATH, BELOW_A_RUN = 4095, 300
"""Bytes of a path, and what a run's files need of them below its folder."""


class PathError(UserError, ValueError):
    """A path that cannot be one."""


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder; raises :class:`PathError` where nobody has that name."""
    if "\0" in str(path):
        raise PathError(f"{str(path)!r}: no path may hold the character 0; write another")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PathError(f"{path}: there is no such user, so no such home folder; write the whole path") from None


def resume_command(folder: str | Path) -> str:
    """What goes on with a run, as a shell takes it."""
    return f"ptl resume {shlex.quote(str(folder))}"


def what_stands_there(path: Path) -> str | None:
    """What a file is that a download or a checkout left in the place of another; None for anything else."""
    try:
        with path.open("rb") as file:
            start = file.read(100).lstrip()
    except OSError:
        return None
    if not start:
        return "is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run git lfs pull in its folder"
    if start.startswith(b"<"):
        return "is a web page, not the file itself; download it again"
    return None


PATTERNS = ("[", "*", "?", "${")


def check_plain(path: str | Path) -> None:
    """Raise :class:`PathError` for a path that vLLM takes for a pattern of names, or OmegaConf for a reference."""
    if found := [mark for mark in PATTERNS if mark in str(path)]:
        raise PathError(f"{path}: vLLM and verl do not read paths with {found[0]} in them; rename the folder")


def resolved(path: Path) -> Path:
    """``path`` without symbolic links; raises :class:`PathError` where these lead in a circle."""
    try:
        return path.resolve()
    except RuntimeError:
        raise PathError(f"{path}: symbolic links that lead in a circle; name another place") from None


def check_new_folder(out: Path) -> None:
    """Raise :class:`OutputError` unless ``out`` is an empty folder, or can become one."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: exists and is not an empty folder")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Raise :class:`OutputError` unless the folder ``out`` is there and can be written to, or can be made."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{out}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {place} cannot be written to; choose another place")


def check_new_file(out: Path) -> None:
    """Raise :class:`OutputError` unless a file ``out`` can be written."""
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: {out.parent} is no folder")
    check_writable(out.parent)


def long_sockets(ray: Path | None, temporary: str | None = None) -> list[tuple[str, str]]:
    """What is wrong with the places of Ray's and vLLM's sockets, and the remedy; nothing as a rule.

    Args:
        ray: folder of the sessions of a Ray that is started here; None if none is.
        temporary: default: TMPDIR, where vLLM looks, too.
    """
    temporary = temporary or os.environ.get("TMPDIR") or "/tmp"
    found = []
    for name, folder, rest in (("Ray's", ray, RAY_SOCKET), ("vLLM's", temporary, VLLM_SOCKET)):
        length, room = len(f"{folder}/{rest}".encode()), SOCKET_BYTES - len(f"/{rest}".encode())
        if folder is not None and length > SOCKET_BYTES:
            variable = "RAY_TMPDIR" if folder is ray and os.environ.get("RAY_TMPDIR") else "TMPDIR"
            found.append(
                (
                    f"{name} sockets below {folder} would have paths of {length} bytes, at most {SOCKET_BYTES} go",
                    f"set {variable} to a folder of at most {room - 4} bytes, e.g. {variable}=/tmp",
                )
            )
    return found


def check_sockets(ray: Path | None = None) -> None:
    """Raise :class:`PathError` where :func:`long_sockets` finds something."""
    for text, remedy in long_sockets(ray):
        raise PathError(f"{text}; {remedy}")


def check_run_dir(run_dir: Path) -> None:
    """Raise :class:`UserError` unless a run's files can be written below a folder, which need not be there yet."""
    if len(os.fsencode(run_dir)) > LONGEST_PATH - BELOW_A_RUN or any(len(os.fsencode(p)) > 255 for p in run_dir.parts):
        raise PathError(f"`run_dir` {str(run_dir)[:80]}...: too long for a run's files; choose a shorter one")
    check_writable(run_dir)
