"""What went wrong and can be mended by the user, and checks of the places that a user names.

The command line turns :class:`UserError`, and nothing else, into a sentence and exit status 2.
"""

import os
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
