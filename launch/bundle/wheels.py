"""Gets the wheels of a lock from the index, and makes others out of them: uncompressed, without some files."""

import csv
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bundle import BundleError
from bundle.lock import plain

COPY_BYTES = 1 << 20
BATCH = 24  # Packages that one call of pip brings: starting pip takes longer than bringing a small one.


@dataclass(frozen=True)
class Target:
    """What the wheels are for: Python ``3.12``, and an oldest glibc ``2.31`` on ``x86_64``."""

    python: str
    glibc: str
    machine: str = "x86_64"

    def __str__(self) -> str:
        return f"python{self.python}-glibc{self.glibc}-{self.machine}"

    def platforms(self) -> list[str]:
        """The platform tags of wheels that run there."""
        newest = int(self.glibc.partition(".")[2])
        tags = [f"manylinux_2_{minor}" for minor in range(newest, 4, -1)]
        return [f"{tag}_{self.machine}" for tag in (*tags, "manylinux2014", "manylinux2010", "manylinux1")]

    def fits(self, wheel: str) -> bool:
        """Whether the wheel of that file name runs there, as far as the platform goes."""
        tags = wheel.removesuffix(".whl").split("-")[-1].split(".")
        return "any" in tags or not set(tags).isdisjoint(self.platforms())


def wheel_of(folder: Path, name: str, version: str) -> Path | None:
    """The wheel of ``name`` in ``folder``."""
    for path in sorted(folder.glob("*.whl")):
        package, its_version = path.name.split("-")[:2]
        if plain(package) == plain(name) and plain(its_version) == plain(version):
            return path
    return None


def download(locked: dict[str, str], target: Target, folder: Path) -> list[Path]:
    """The wheels of all packages; pip brings those that do not lie in ``folder`` yet, so a broken-off download goes on.

    Where the index has only a source package, it is built, which must give a wheel for every machine.
    Raises ``BundleError`` where there is none to be had.
    """
    missing = {name: version for name, version in locked.items() if wheel_of(folder, name, version) is None}
    while missing:
        batch = dict(list(missing.items())[:BATCH])
        _bring(batch, target, folder)
        brought = [name for name, version in batch.items() if wheel_of(folder, name, version) is not None]
        if not brought:
            raise BundleError(f"pip brought other files than the wheels of {', '.join(batch)}; remove {folder}")
        for name in brought:
            del missing[name]
        print(f"{len(locked) - len(missing)} of {len(locked)} packages are here, the last {brought[-1]}", flush=True)
    wheels = [wheel_of(folder, name, version) for name, version in locked.items()]
    return [wheel for wheel in wheels if wheel is not None]


def _bring(batch: dict[str, str], target: Target, folder: Path) -> None:
    """Downloads the batch; or, if a package of it has no wheel, builds that one only."""
    incoming = folder / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={target.python}", *_resume_option()]
    options += [f"--platform={tag}" for tag in target.platforms()]
    wanted = [f"{name}=={version}" for name, version in batch.items()]
    failed = _pip("download", "--no-deps", *options, "--dest", str(incoming), *wanted)
    if source := re.search(r"No matching distribution found for ([\w.-]+)==", failed):
        wanted = [f"{source[1]}=={batch[plain(source[1])]}"]
        failed = _pip("wheel", "--no-deps", "--wheel-dir", str(incoming), *wanted)
    if failed:
        raise BundleError(f"pip could not bring {' '.join(wanted)}; run this again to go on. It said: {failed}")
    for wheel in sorted(incoming.glob("*.whl")):
        if not target.fits(wheel.name):
            raise BundleError(f"{wanted[0]} has no wheel for {target}; pip made {wheel.name} here: see --glibc")
        wheel.replace(folder / wheel.name)
    incoming.rmdir()


def _pip(*arguments: str) -> str:
    """Runs pip; empty, or the end of what it said when it failed."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return "" if done.returncode == 0 else " ".join(done.stderr.split())[-1500:] or f"exit status {done.returncode}"


def _resume_option() -> list[str]:
    """pip 25.1 and newer take up a broken-off file where it broke off."""
    done = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True)
    version = re.match(r"pip (\d+)\.(\d+)", done.stdout)
    if version is None:
        raise BundleError(f"{sys.executable} has no pip; run make_bundle.py with a Python that has one")
    return ["--resume-retries=20"] if (int(version[1]), int(version[2])) >= (25, 1) else []


def build_project(root: Path, work: Path) -> list[Path]:
    """The project's own wheel, and a tar of its files (recipes, launch scripts, tests), both in ``work``.

    The files are those that git tracks, as they are now. The wheel is made from a copy: building leaves files behind.
    """
    copy, source = work / "project", work / "ptl-rl-source.tar"
    with tarfile.open(source, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in _tracked(root):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
            tar.add(copy / name, arcname=f"ptl-rl/{name}", filter=_without_owner)
    if failed := _pip("wheel", "--no-deps", "--wheel-dir", str(work), str(copy)):
        raise BundleError(f"pip could not build the project's wheel from {root}; it said: {failed}")
    shutil.rmtree(copy)
    return [*sorted(work.glob("*.whl")), source]


def _tracked(root: Path) -> list[str]:
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True)
    names = sorted(name for name in listed.stdout.split("\0") if name and (root / name).is_file())
    if not names:
        reason = listed.stderr.strip() or "git tracks no file there"
        raise BundleError(f"{root} must be a git checkout, whose tracked files are bundled: {reason}")
    return names


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def repack(wheel: Path, out: Path, is_left_out: Callable[[str], bool], method: int = zipfile.ZIP_STORED) -> int:
    """Writes ``wheel`` to ``out`` with its files uncompressed, for a better compressor to see, or by ``method``.

    Files that ``is_left_out`` names go, and their lines in the wheel's RECORD; the rest keeps order, times and
    permissions. Returns the bytes that went.
    """
    left_out = 0
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(out, "w", method) as to:
        gone = {info.filename for info in source.infolist() if is_left_out(info.filename)}
        for info in source.infolist():
            if info.filename in gone:
                left_out += info.file_size
                continue
            made = zipfile.ZipInfo(info.filename, info.date_time)
            made.external_attr, made.compress_type = info.external_attr, method
            if gone and re.fullmatch(r"[^/]+\.dist-info/RECORD", info.filename):
                to.writestr(made, _without_lines(source.read(info), gone))
                continue
            made.file_size = info.file_size
            with source.open(info) as reading, to.open(made, "w") as writing:
                shutil.copyfileobj(reading, writing, COPY_BYTES)
    return left_out


def _without_lines(record: bytes, gone: set[str]) -> bytes:
    kept = io.StringIO()
    lines = csv.reader(io.StringIO(record.decode("utf-8"), newline=""))
    csv.writer(kept, lineterminator="\n").writerows(line for line in lines if line and line[0] not in gone)
    return kept.getvalue().encode("utf-8")
