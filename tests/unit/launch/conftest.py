"""The launch folder's modules, and tiny packages to lock, bundle and install."""

import base64
import csv
import hashlib
import importlib.metadata
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "launch"))

# A build back end that needs nothing: it zips the package that lies beside it.
BACKEND = """
import zipfile
NAME, VERSION, TAG = {name!r}, {version!r}, {tag!r}
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    file, info = f"{{NAME}}-{{VERSION}}-{{TAG}}.whl", f"{{NAME}}-{{VERSION}}.dist-info"
    with zipfile.ZipFile(f"{{wheel_directory}}/{{file}}", "w") as made:
        made.write(f"{{NAME}}/__init__.py")
        made.writestr(f"{{info}}/METADATA", "Metadata-Version: 2.1\\n"
            f"Name: {{NAME}}\\nVersion: {{VERSION}}\\n")
        made.writestr(f"{{info}}/WHEEL", f"Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: {{TAG}}\\n")
        made.writestr(f"{{info}}/RECORD", f"{{NAME}}/__init__.py,,\\n{{info}}/RECORD,,\\n")
    return file
"""


def record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@pytest.fixture
def make_wheel():
    """Factory: a wheel with these files (path to content), some of them executable, and a right RECORD."""

    def make(folder: Path, name: str, version: str, files: dict[str, bytes], executable: tuple[str, ...] = ()) -> Path:
        info = f"{name}-{version}.dist-info"
        files = files | {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = io.StringIO()
        rows = [(path, record_hash(data), len(data)) for path, data in files.items()]
        csv.writer(record, lineterminator="\n").writerows([*rows, (f"{info}/RECORD", "", "")])
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
            for path, data in (files | {f"{info}/RECORD": record.getvalue().encode()}).items():
                entry = zipfile.ZipInfo(path, (2024, 1, 2, 3, 4, 6))
                entry.external_attr = (0o100755 if path in executable else 0o100644) << 16
                made.writestr(entry, data, zipfile.ZIP_DEFLATED)
        return out

    return make


@pytest.fixture
def make_source():
    """Factory: the source of a package whose build needs nothing and makes a wheel of that tag."""

    def make(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> Path:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"VERSION = {version!r}\n", encoding="utf-8")
        (folder / "backend.py").write_text(BACKEND.format(name=name, version=version, tag=tag), encoding="utf-8")
        (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        (folder / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n', encoding="utf-8"
        )
        return folder

    return make


@pytest.fixture
def project(tmp_path, make_source) -> Path:
    """A git checkout of a project called ``ptl_rl``, with a recipe and a file that git does not track."""
    folder = make_source(tmp_path / "checkout", "ptl_rl", "0.1.0")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "one.yaml").write_text("a: 1\n", encoding="utf-8")
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    (folder / "secret.txt").write_text("not tracked\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def pip_wheel(tmp_path_factory) -> Path:
    """This interpreter's pip, made a wheel again."""
    pip = importlib.metadata.distribution("pip")
    out = tmp_path_factory.mktemp("pip") / f"pip-{pip.version}-py3-none-any.whl"
    with zipfile.ZipFile(out, "w") as made:
        for file in pip.files or []:
            if ".." not in file.parts and file.suffix != ".pyc" and file.name not in ("INSTALLER", "REQUESTED"):
                made.write(str(file.locate()), str(file))
    return out
