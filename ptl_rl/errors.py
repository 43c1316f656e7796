"""What went wrong and can be mended by the user, and checks of the places that a user names.

The command line turns :class:`UserError`, and nothing else, into a sentence and exit status 2.
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


class PathError(UserError, ValueError):
    """A path that cannot be one."""


def expanded(path: str | Path) -> Path:
    """``path`` with ``~`` as the home folder; raises :class:`PathError` where nobody has that name."""
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
