"""Makes a folder that brings the GPU stack and this project to a machine without internet access, in small parts.

``python launch/make_bundle.py OUT`` downloads the wheels of requirements/gpu.lock into OUT-wheels, where the same
command goes on if it was interrupted, compresses them together, and writes OUT. Carry OUT, or its files one by one
into one folder, and run ``bash install.sh --venv DIR`` there. Needs Python 3.10 or newer with pip (docs/install.md).
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from bundle import BundleError, slim
from bundle.lock import Found, plain, read_lock, what_target_has
from bundle.parts import Compressor, PartWriter
from bundle.wheels import Target, build_project, download, repack

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
# The installer, which a target need not have; it is not in the lock, as it is no part of the stack.
PIP = {"pip": "25.3"}
# What install.sh imports at its end, of what the bundle brings.
IMPORTED = ("torch", "ray", "verl", "vllm")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the bundle's folder")
    parser.add_argument("--python", default="3.12", choices=["3.11", "3.12"], help="the target's Python (default 3.12)")
    parser.add_argument(
        "--glibc",
        default="2.31",
        help="the target's glibc, or an older one (default 2.31; `ldd --version` there says it)",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="FILE|NAME",
        help="what the target has: files that `pip freeze` wrote there (what has the lock's version is left out), and"
        " names of packages (left out whatever the version)",
    )
    parser.add_argument(
        "--slim",
        action="store_true",
        help="leave out what a text-only model in vLLM on Hopper does not load (launch/bundle/slim.py)",
    )
    parser.add_argument("--part-mib", type=float, default=60, help="the most a part is large, in MiB (default 60)")
    parser.add_argument(
        "--preset",
        default="1",
        choices=["none", *map(str, range(10))],
        help="xz preset, 0 fastest to 9 smallest, or none: wheels as the index has them, in a minute (default 1)",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="compressing threads (default: one per CPU)"
    )
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements" / "gpu.lock", help="another lock file")
    parser.add_argument("--wheels", type=Path, help="where downloaded wheels are kept (default OUT-wheels)")
    options = parser.parse_args(arguments)
    if not options.part_mib > 0 or options.threads < 1:
        parser.error("--part-mib and --threads must be above 0")
    if not options.glibc.startswith("2.") or not options.glibc[2:].isdigit():
        parser.error(f"--glibc {options.glibc}: write it as 2.31")
    return options


def make(options: argparse.Namespace, project: Path = ROOT) -> None:
    """Writes the bundle. Until all of it is written it has no SHA256SUMS, and install.sh refuses it."""
    target = Target(options.python, options.glibc)
    locked = read_lock(options.lock)
    found = what_target_has(options.without, locked)
    chosen = _choose(locked, found, options.slim)
    folder = _empty(options.out)
    wheels = (options.wheels or options.out.with_name(options.out.name + "-wheels")) / str(target)
    paths = download(PIP | chosen, target, wheels)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        # The project comes last: when only its code changes, so do only the last parts.
        paths += build_project(project, Path(work))
        parts = PartWriter(folder, int(options.part_mib * MIB))
        preset = None if options.preset == "none" else int(options.preset)
        stream = Compressor(parts, preset, options.threads)
        installed, dropped = _pack(paths, stream, options.python if options.slim else None, Path(work))
        stream.close()
    _finish(folder, parts, target, (stream.read_bytes, installed), chosen)
    size = sum((folder / name).stat().st_size for name in parts.sums)
    print(f"{len(chosen)} packages and the project, {installed / MIB:.0f} MiB when installed")
    if options.slim:
        gone = sorted((slim.PACKAGES.keys() & locked.keys()) - found.same)
        print(f"left out by --slim: {', '.join(gone)}, and {dropped / MIB:.0f} MiB of files in others")
    print(f"{folder}: {len(parts.sums)} parts of {size / MIB:.0f} MiB in all; there, run: bash install.sh --venv DIR")


def _choose(locked: dict[str, str], found: Found, slimmed: bool) -> dict[str, str]:
    if found.same:
        print(f"left out, as the target has them: {', '.join(sorted(found.same))}")
    for name, version in sorted(found.other.items()):
        print(f"{name}: the target has {version}, the lock {locked[name]}, which the bundle brings")
    gone = found.same | (slim.PACKAGES.keys() if slimmed else set())
    return {name: version for name, version in locked.items() if name not in gone}


def _empty(folder: Path) -> Path:
    """A folder for the bundle, without an older bundle's files; anything else in it is left alone and refused."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ours = {"SHA256SUMS", "bundle.conf", "install.sh", "packages.txt"}
    strange = [path.name for path in folder.iterdir() if path.name not in ours and not path.name.startswith("part-")]
    if strange:
        raise BundleError(f"{folder} holds {strange[0]!r}, which is no part of a bundle; name an empty or a new folder")
    for path in sorted(folder.iterdir()):  # SHA256SUMS first
        path.unlink()
    return folder


def _pack(paths: list[Path], stream: Compressor, slim_for: str | None, work: Path) -> tuple[int, int]:
    """Adds the files to the stream as a tar: wheels are uncompressed if xz follows, and slimmed for ``slim_for``.

    Returns the bytes that are installed of them, and those that slimming left out.
    """
    installed = dropped = 0
    method = zipfile.ZIP_DEFLATED if stream.preset is None else zipfile.ZIP_STORED
    with tarfile.open(fileobj=stream, mode="w|", bufsize=MIB, format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            packed = path
            package = plain(path.name.split("-")[0])
            if path.suffix == ".whl" and (stream.preset is not None or (slim_for and slim.touches(package))):
                packed = work / "repacked"
                goes = partial(slim.is_left_out, package, slim_for) if slim_for else _nothing
                dropped += repack(path, packed, goes, method)
            if path.suffix == ".whl":
                with zipfile.ZipFile(packed) as wheel:
                    installed += sum(info.file_size for info in wheel.infolist())
            info = tarfile.TarInfo(path.name)
            info.size, info.mode = packed.stat().st_size, 0o644
            with packed.open("rb") as file:
                tar.addfile(info, file)
            if packed != path:
                packed.unlink()
    return installed, dropped


def _nothing(path: str) -> bool:
    return False


def _finish(folder: Path, parts: PartWriter, target: Target, sizes: tuple[int, int], chosen: dict[str, str]) -> None:
    imports = " ".join(name for name in IMPORTED if name in chosen)
    conf = (
        f"PYTHON_VERSION={target.python}\nUNPACKED_BYTES={sizes[0]}\nINSTALLED_BYTES={sizes[1]}\nIMPORTS='{imports}'\n"
    )
    (folder / "bundle.conf").write_text(conf, encoding="utf-8")
    packages = "".join(f"{name}=={version}\n" for name, version in chosen.items())
    (folder / "packages.txt").write_text(packages, encoding="utf-8")
    shutil.copyfile(Path(__file__).resolve().parent / "bundle" / "install.sh", folder / "install.sh")
    sums = parts.sums | {name: _sha256(folder / name) for name in ("bundle.conf", "packages.txt")}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (folder / "SHA256SUMS").write_text(lines, encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    try:
        make(parse(sys.argv[1:]))
    except (BundleError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
