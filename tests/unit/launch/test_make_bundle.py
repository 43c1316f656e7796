"""A bundle is made of tiny wheels, carried, found broken where it is, and installed without an index."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import make_bundle
import pytest
from bundle import BundleError, parts

PYTHON = "{}.{}".format(*sys.version_info)
pytestmark = pytest.mark.skipif(PYTHON not in ("3.11", "3.12"), reason="the lock is for Python 3.11 and 3.12")
FA2, FA3 = "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
OTHER = "vllm/deep/_C.cpython-314-x86_64-linux-gnu.so"
OWN = f"vllm/deep/_C.cpython-{PYTHON.replace('.', '')}-x86_64-linux-gnu.so"


@pytest.fixture
def stack(tmp_path, make_wheel, pip_wheel, project, monkeypatch):
    """Factory: makes a bundle of a lock of four packages with these options; returns its folder."""
    lock = tmp_path / "gpu.lock"
    lock.write_text("# made up\nray==2.0\nvllm==0.24.0\nflashinfer-cubin==0.6\nbig_one==1.0\n", encoding="utf-8")
    wheels = tmp_path / "wheels" / f"python{PYTHON}-glibc2.31-x86_64"
    make_wheel(wheels, "ray", "2.0", {"ray/__init__.py": b""})
    engine = dict.fromkeys((FA2, FA3, OTHER, OWN, "vllm/vllm-rs"), b"code" * 100) | {
        "vllm/__init__.py": b"import ray\n"
    }
    make_wheel(wheels, "vllm", "0.24.0", engine, executable=("vllm/vllm-rs",))
    make_wheel(wheels, "flashinfer_cubin", "0.6", {"flashinfer_cubin/__init__.py": b""})
    make_wheel(wheels, "big_one", "1.0", {"big_one/__init__.py": b"", "big_one/data": os.urandom(500_000)})
    shutil.copy(pip_wheel, wheels)
    monkeypatch.setattr(make_bundle, "PIP", {"pip": pip_wheel.name.split("-")[1]})

    def make(*options: str) -> Path:
        out = tmp_path / "bundle"
        told = ["--lock", str(lock), "--wheels", str(tmp_path / "wheels"), "--part-mib", "0.25", "--threads", "2"]
        make_bundle.make(make_bundle.parse([str(out), "--python", PYTHON, *told, *options]), project)
        return out

    return make


@pytest.fixture
def bundle(stack, tmp_path, tmp_path_factory):
    """A bundle of everything; made once."""
    made = tmp_path_factory.getbasetemp() / "bundle"
    if not made.exists():
        shutil.copytree(stack(), made)
        shutil.rmtree(tmp_path / "bundle")
    return shutil.copytree(made, tmp_path / "bundle")


def install(bundle: Path, *options: str) -> subprocess.CompletedProcess:
    """Runs install.sh where pip's own settings forbid all that it must not heed."""
    there = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONSTRAINT": "/no/such/file", "PIP_NO_INDEX": "0"}
    command = ["bash", str(bundle / "install.sh"), "--python", sys.executable, *options]
    return subprocess.run(command, env=there | told, capture_output=True, text=True, timeout=120)


def refused(bundle: Path, *options: str) -> str:
    done = install(bundle, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_carried_in_parts_and_installed_into_a_new_environment(bundle, tmp_path):
    sizes = [path.stat().st_size for path in bundle.glob("part-*")]
    assert len(sizes) > 2 and max(sizes) <= 0.25 * 1024**2
    carried = tmp_path / "there"
    carried.mkdir()
    for path in bundle.iterdir():  # one at a time, and any folder will do
        shutil.move(path, carried)
    done = install(carried, "--venv", str(tmp_path / "a folder" / "venv"))
    assert done.returncode == 0, done.stdout + done.stderr
    venv = tmp_path / "a folder" / "venv"
    seen = subprocess.run(
        [venv / "bin/python", "-E", "-c", "import ptl_rl, vllm, big_one; print(vllm.__path__[0], ptl_rl.VERSION)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    folder, version = seen.stdout.rsplit(maxsplit=1)
    assert version == "0.1.0" and Path(folder).is_relative_to(venv)
    assert os.access(Path(folder) / "vllm-rs", os.X_OK)
    assert all((Path(folder).parent / file).is_file() for file in (FA2, FA3, OTHER, OWN))
    assert (venv / "ptl-rl" / "recipes" / "one.yaml").read_text(encoding="utf-8") == "a: 1\n"
    assert not (venv / "ptl-rl" / "secret.txt").exists()
    assert [path.name for path in venv.parent.iterdir()] == ["venv"]  # what was unpacked is gone


def test_installed_into_a_plain_folder(stack, tmp_path):
    done = install(stack("--slim", "--preset", "none"), "--target", str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    assert (site / FA3).is_file() and (site / OWN).is_file() and (site / "ptl_rl" / "__init__.py").is_file()
    assert not any((site / gone).exists() for gone in (FA2, OTHER, "vllm/vllm-rs", "flashinfer_cubin"))


def test_broken_and_missing_parts_are_named(bundle, tmp_path):
    whole = (bundle / "part-0002").read_bytes()
    (bundle / "part-0002").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "part-0002 is corrupt" in refused(bundle, "--verify")
    (bundle / "part-0001").rename(tmp_path / "forgotten")
    message = refused(bundle, "--venv", str(tmp_path / "venv"))
    assert "part-0001 is missing; part-0002 is corrupt" in message and "part-0003" not in message
    assert not (tmp_path / "venv").exists()
    (bundle / "part-0002").write_bytes(whole)
    (tmp_path / "forgotten").rename(bundle / "part-0001")
    assert install(bundle, "--verify").returncode == 0
    (bundle / "SHA256SUMS").unlink()
    assert "SHA256SUMS" in refused(bundle, "--verify")


def test_what_install_refuses(bundle, tmp_path):
    assert "--venv DIR or --target DIR" in refused(bundle)
    assert "--venv DIR or --target DIR" in refused(bundle, "--venv", "a", "--target", "b")
    assert "--what" in refused(bundle, "--what")
    conf = (bundle / "bundle.conf").read_text(encoding="utf-8")
    sums = (bundle / "SHA256SUMS").read_text(encoding="utf-8")

    def rewrite(old: str, new: str) -> None:
        (bundle / "bundle.conf").write_text(conf.replace(old, new), encoding="utf-8")
        digest = make_bundle._sha256(bundle / "bundle.conf")
        lines = [f"{digest}  bundle.conf" if line.endswith("bundle.conf") else line for line in sums.splitlines()]
        (bundle / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")

    rewrite(f"PYTHON_VERSION={PYTHON}", "PYTHON_VERSION=3.9")
    assert f"is for Python 3.9 and {sys.executable} is {PYTHON}" in refused(bundle, "--venv", str(tmp_path / "venv"))
    rewrite("UNPACKED_BYTES=", "UNPACKED_BYTES=9999999")
    assert "MiB are needed" in refused(bundle, "--venv", str(tmp_path / "venv"))
    assert not (tmp_path / "venv").exists()


def test_what_the_target_has_is_left_out_and_differences_are_said(stack, tmp_path, capsys):
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("Big.One==1.0\nray==1.9\nelsewhere==3\n", encoding="utf-8")
    bundle = stack("--without", str(freeze), "flashinfer_cubin")
    said = capsys.readouterr().out
    assert "left out, as the target has them: big-one, flashinfer-cubin" in said
    assert "ray: the target has 1.9, the lock 2.0, which the bundle brings" in said
    assert (bundle / "packages.txt").read_text(encoding="utf-8") == "ray==2.0\nvllm==0.24.0\n"


def test_made_again_for_new_code_only_the_end_changes(stack, project, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK_BYTES", 100_000)
    before = {path.name: path.read_bytes() for path in stack().glob("part-*")}
    (project / "ptl_rl" / "__init__.py").write_text("VERSION = 'new'\n", encoding="utf-8")
    after = {path.name: path.read_bytes() for path in stack().glob("part-*")}
    same = sorted(name for name in before if before[name] == after[name])
    assert same == [f"part-{number:04d}" for number in range(1, len(before))]  # all but the last


def test_a_folder_with_other_files_is_refused(stack, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleError, match=r"thesis.txt"):
        stack()
    assert (tmp_path / "bundle" / "thesis.txt").exists()


def test_interrupted_while_packing_it_is_not_taken_for_whole(stack, tmp_path, monkeypatch):
    stack()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_bundle, "repack", interrupt)
        stack()
    assert not (tmp_path / "bundle" / "SHA256SUMS").exists()
