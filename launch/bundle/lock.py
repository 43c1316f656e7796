"""What a bundle holds: the packages of a lock file, less those that the target has or does not need."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bundle import BundleError


def plain(name: str) -> str:
    """A package's name in the form in which the index compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, str]:
    """Package to version. Raises ``BundleError`` where a line is not ``NAME==VERSION``."""
    locked = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)", line)
        if match is None:
            raise BundleError(f"{path}:{number}: {line!r} does not name one version; write NAME==VERSION")
        locked[plain(match[1])] = match[2]
    if not locked:
        raise BundleError(f"{path} names no package; name a lock file with --lock")
    return locked


@dataclass(frozen=True)
class Found:
    """What a target has of the lock: the ``same`` versions, and (package to the target's version) ``other`` ones."""

    same: frozenset[str]
    other: dict[str, str]


def what_target_has(named: Iterable[str], locked: dict[str, str]) -> Found:
    """Reads ``--without``: names of packages, and files that ``pip freeze`` wrote on the target.

    A named package is left out whatever the target's version; one in a file only where the versions are the same.
    Raises ``BundleError`` for a name that is neither a file nor in the lock.
    """
    same: set[str] = set()
    other: dict[str, str] = {}
    for entry in named:
        if Path(entry).is_file():
            for name, version in _read_freeze(Path(entry)).items():
                if name not in locked:
                    continue
                if _is_version(version, locked[name], locked):
                    same.add(name)
                else:
                    other[name] = version
        elif plain(entry) in locked:
            same.add(plain(entry))
        else:
            raise BundleError(f"--without {entry}: no such file, and no package of that name in the lock")
    return Found(frozenset(same), {name: version for name, version in other.items() if name not in same})


def _read_freeze(path: Path) -> dict[str, str]:
    """Package to version; of one that was installed from a file or an address, ``an unknown version``."""
    found = {}
    for line in _text(path).splitlines():
        line = line.partition("#")[0].strip()
        if match := re.fullmatch(r"([\w.-]+)===?(\S+)", line):
            found[plain(match[1])] = match[2]
        elif match := re.match(r"([\w.-]+)\s*@", line):
            found[plain(match[1])] = "an unknown version"
    if not found:
        raise BundleError(f"{path} names no package; write it with pip freeze on the target")
    return found


def _is_version(version: str, wanted: str, locked: dict[str, str]) -> bool:
    """Whether it is the lock's. A build's label (``2.11.0+cu130``) may name the lock's CUDA, and nothing else."""
    base, _, label = version.partition("+")
    cuda = "cu" + "".join(locked.get("cuda-toolkit", "").split(".")[:2])
    return version == wanted or (base == wanted and label == cuda != "cu")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({error}); name a text file") from None
