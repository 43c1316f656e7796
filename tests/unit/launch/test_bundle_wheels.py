"""Wheels are brought by pip, go on where they broke off, and lose what ``--slim`` names; parts hold any stream."""

import csv
import io
import lzma
import os
import platform
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
from bundle import BundleError, parts, slim, wheels
from bundle.lock import read_lock, what_target_has
from bundle.parts import Compressor, PartWriter, compress, stored_stream
from bundle.wheels import Target, download, repack
from conftest import record_hash

TARGET = Target("3.12", "2.31")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its only index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def put_source(source: Path, index: Path, name: str, version: str) -> None:
    with tarfile.open(index / f"{name}-{version}.tar.gz", "w:gz") as tar:
        tar.add(source, arcname=f"{name}-{version}")


def test_a_broken_off_download_goes_on(index, tmp_path, make_wheel, make_source, monkeypatch):
    monkeypatch.setattr(wheels, "BATCH", 2)
    locked = {"one": "1.0", "two-more": "2.0", "three": "3.0", "built": "4.0"}
    first = [make_wheel(index, "one", "1.0", {}), make_wheel(index, "two_more", "2.0", {})]
    put_source(make_source(tmp_path / "source", "built", "4.0"), index, "built", "4.0")
    with pytest.raises(BundleError, match=r"three==3.0.*run this again"):
        download(locked, TARGET, tmp_path / "wheels")
    for path in first:
        path.unlink()  # they are not asked for again
    make_wheel(index, "three", "3.0", {})
    found = download(locked, TARGET, tmp_path / "wheels")
    names = ["one-1.0", "two_more-2.0", "three-3.0", "built-4.0"]
    assert [path.name for path in found] == [f"{name}-py3-none-any.whl" for name in names]
    assert all(path.is_file() for path in found)


def test_a_wheel_for_this_machine_only_is_refused(index, tmp_path, make_source):
    put_source(
        make_source(tmp_path / "source", "native", "1.0", f"py3-none-linux_{platform.machine()}"),
        index,
        "native",
        "1.0",
    )
    with pytest.raises(BundleError, match=r"native==1.0 has no wheel for python3.12-glibc2.31-x86_64"):
        download({"native": "1.0"}, TARGET, tmp_path / "wheels")
    assert not list((tmp_path / "wheels").glob("*.whl"))


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("py3-none-any", True),
        ("cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64", True),
        ("cp39-abi3-manylinux_2_31_x86_64", True),
        ("cp39-abi3-manylinux_2_34_x86_64", False),
        ("cp312-cp312-manylinux_2_17_aarch64", False),
    ],
)
def test_platforms(tag, fits):
    assert TARGET.fits(f"x-1.0-{tag}.whl") is fits


def test_a_slimmed_wheel_is_whole(tmp_path, make_wheel):
    files = {
        "vllm/__init__.py": b"x = 1\n" * 50,
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": b"2" * 100,
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": b"3" * 100,
        "vllm/a, b.py": b"a comma in the name",
        "vllm/_C.cpython-311-x86_64-linux-gnu.so": b"old",
        "vllm/_C.cpython-312-x86_64-linux-gnu.so": b"own",
        "vllm/run.sh": b"true",
    }
    wheel = make_wheel(tmp_path, "vllm", "0.24.0", files, executable=("vllm/run.sh",))
    gone = repack(wheel, tmp_path / "out.whl", lambda path: slim.is_left_out("vllm", "3.12", path))
    assert gone == 103
    with zipfile.ZipFile(tmp_path / "out.whl") as made, zipfile.ZipFile(wheel) as before:
        names = set(made.namelist())
        assert set(before.namelist()) - names == {
            "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
            "vllm/_C.cpython-311-x86_64-linux-gnu.so",
        }
        assert {info.compress_type for info in made.infolist()} == {zipfile.ZIP_STORED}
        assert made.getinfo("vllm/run.sh").external_attr >> 16 & 0o111
        assert made.getinfo("vllm/run.sh").date_time == (2024, 1, 2, 3, 4, 6)
        record = {row[0]: row[1] for row in csv.reader(io.StringIO(made.read("vllm-0.24.0.dist-info/RECORD").decode()))}
        assert set(record) == names
        for name in names - {"vllm-0.24.0.dist-info/RECORD"}:
            assert record[name] == record_hash(made.read(name)) and made.read(name) == before.read(name)


def test_slim_looks_at_whose_file_it_is():
    assert slim.is_left_out("vllm", "3.12", "vllm/vllm-rs")
    assert not slim.is_left_out("other", "3.12", "vllm/vllm-rs")
    assert slim.is_left_out("any", "3.11", "x/y.cpython-312-x86_64-linux-gnu.so")
    assert not slim.is_left_out("any", "3.11", "x/y.cpython-311-x86_64-linux-gnu.so")
    assert not slim.is_left_out("any", "3.11", "x/y.abi3.so")


def test_the_parts_together_are_one_xz_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK_BYTES", 100_000)
    data = os.urandom(250_000) + b"the same again and again " * 20_000 + b"end"
    stream = Compressor(PartWriter(tmp_path, 64_000), preset=0, threads=2)
    for at in range(0, len(data), 33_333):
        stream.write(data[at : at + 33_333])
    stream.close()
    written = sorted(tmp_path.glob("part-*"))
    assert [path.name for path in written] == list(stream.out.sums)
    assert {path.stat().st_size for path in written[:-1]} == {64_000} and written[-1].stat().st_size <= 64_000
    assert lzma.decompress(b"".join(path.read_bytes() for path in written)) == data
    assert stream.read_bytes == len(data)


@pytest.mark.parametrize("length", [1, 4, 65_535, 65_536, 65_537, 300_001])
def test_stored_streams_are_what_xz_reads(length):
    data = random.Random(length).randbytes(length)
    stream = stored_stream(data)
    assert lzma.decompress(stream + stream) == data + data
    assert len(stream) < length + 100 + 3 * (length // 65_536 + 1)


def test_what_is_compressed_already_is_stored():
    noise, text = random.Random(0).randbytes(1 << 20), b"mov eax, ebx; " * 80_000
    assert compress(noise, 6) == stored_stream(noise)
    assert len(compress(text, 0)) < len(text) / 100 and lzma.decompress(compress(text, 0)) == text


def test_locks_that_do_not_pin_are_refused(tmp_path):
    lock = tmp_path / "x.lock"
    lock.write_text("# note\nTorch.Data==1.0  # why\n\n", encoding="utf-8")
    assert read_lock(lock) == {"torch-data": "1.0"}
    for line in ("torch>=2", "torch", "--prefer-binary", "torch==2; python_version > '3'"):
        lock.write_text(f"a==1\n{line}\n", encoding="utf-8")
        with pytest.raises(BundleError, match=r"x.lock:2: .*NAME==VERSION"):
            read_lock(lock)
    with pytest.raises(BundleError, match="cannot be read"):
        read_lock(tmp_path / "missing.lock")


def test_a_targets_packages(tmp_path):
    locked = {"torch": "2.11.0", "triton": "3.6.0", "ray": "2.60.0", "numpy": "2.3.5", "cuda-toolkit": "13.0.2"}
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("torch==2.11.0+cu130\ntriton==3.6.0\nnumpy @ file:///x/numpy.whl\nray==2.9.0\n", encoding="utf-8")
    found = what_target_has([str(freeze), "Ray"], locked)
    assert (found.same, found.other) == ({"torch", "triton", "ray"}, {"numpy": "an unknown version"})
    for other in ("torch==2.11.0+cpu", "torch==2.11.0+cu128", "torch==2.9.0"):
        freeze.write_text(other + "\n", encoding="utf-8")
        assert what_target_has([str(freeze)], locked).other == {"torch": other.partition("==")[2]}
    with pytest.raises(BundleError, match=r"--without vlllm: no such file, and no package"):
        what_target_has(["vlllm"], locked)
    freeze.write_text("nothing here\n", encoding="utf-8")
    with pytest.raises(BundleError, match="pip freeze"):
        what_target_has([str(freeze)], locked)
