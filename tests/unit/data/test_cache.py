"""What is prepared once is used again, until its source or its settings change or it is damaged."""

import os
import random
import threading
import time
from pathlib import Path

import datasets
import pyarrow
import pytest
from data_rows import row, write
from forked import fork_server

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.data import cache
from ptl_rl.data.cache import cache_folder, cached, key_of
from ptl_rl.data.corpora import DataError, load_corpus

FEATURES = datasets.Features({"x": datasets.Value("string")})
VALUES = [f"{i} " * 40 for i in range(200)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keys(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def read(key, log, values=VALUES, wait=None):
    def make():
        log.append(values)
        if wait is not None:
            wait()
        yield from (pyarrow.table({"x": values[start : start + 50]}) for start in range(0, len(values), 50))

    return cached(key, FEATURES, make).data.column("x").to_pylist()


def test_an_entry_is_made_once(folder):
    log = []
    assert read("a", log) == read("a", log) == VALUES
    assert len(log) == 1
    assert read("b", log) == VALUES and len(log) == 2
    assert keys(folder) == ["a", "b"]


def test_a_table_without_rows(folder):
    log = []
    assert read("a", log, values=[]) == read("a", log, values=[]) == [] and len(log) == 1


@pytest.mark.parametrize("name", ["a::b", "with space", "[x]*", "{y}", "NNNNN-SSSSS", "s3:"])
def test_folders_with_odd_names(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / name / "c"))
    assert read("a", []) == VALUES and read("b", [], values=["other"]) == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == [name] and keys(tmp_path / name / "c") == ["a", "b"]


def _cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_entry_is_made_again(folder):
    read("a", log := [])
    size, rng = next(folder.iterdir()).stat().st_size, random.Random(0)
    damage = [lambda p, at=at: _cut(p, at) for at in (0, 1, size - 9, size - 1, *rng.sample(range(size), 12))]
    damage += [lambda p, at=at: _flip(p, at) for at in rng.sample(range(size), 12)]
    damage += [lambda p: p.write_bytes(bytes(size)), lambda p: p.unlink()]
    for number, do in enumerate(damage, 2):
        (path,) = folder.iterdir()
        do(path)
        assert read("a", log) == VALUES and len(log) == number
        assert read("a", log) == VALUES and len(log) == number
        assert keys(folder) == ["a"]


def test_a_failure_leaves_nothing(folder):
    for error in (DataError("no"), KeyboardInterrupt()):

        def broken(error=error):
            yield pyarrow.table({"x": ["1"]})
            raise error

        with pytest.raises(type(error)):
            cached("a", FEATURES, broken)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damaged", [False, True])
def test_writers_at_the_same_time_get_the_same_and_leave_one(folder, damaged):
    log, found, barrier = [], [], threading.Barrier(4)
    if damaged:
        read("a", [])
        _flip(next(folder.iterdir()), 1000)
    threads = [
        threading.Thread(target=lambda: found.append(read("a", log, wait=lambda: barrier.wait(20)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [VALUES] * 4 and len(log) == 4
    assert read("a", log) == VALUES and len(log) == 4 and keys(folder) == ["a"]


def test_a_writer_that_was_killed_is_cleaned_up_after(folder, monkeypatch):
    (folder / ".making-old").mkdir(parents=True)
    read("a", [])
    assert (folder / ".making-old").exists()  # it may still be at work
    now = time.time()
    monkeypatch.setattr(cache.time, "time", lambda: now + 2 * cache.ABANDONED_SECONDS)
    read("b", [])
    assert not (folder / ".making-old").exists()


def test_others_may_read_what_is_there_and_reading_writes_nothing(folder):
    before = os.umask(0o022)
    try:
        read("a", [])
    finally:
        os.umask(before)
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644
    written = folder.stat().st_mtime_ns
    read("a", [])
    assert folder.stat().st_mtime_ns == written


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file: cannot write prepared data: .*; set PTL_CACHE to another folder"):
        read("a", [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_is_named(folder, monkeypatch):
    real = pyarrow.OSFile
    monkeypatch.setattr(pyarrow, "OSFile", lambda path, mode: real("/dev/full", mode))
    with pytest.raises(DataError, match=r"cache: cannot write prepared data: .*No space left.*; set PTL_CACHE"):
        read("a", [])
    assert list(folder.iterdir()) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("PTL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ptl-rl" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ptl-rl" / "data"


def test_every_part_of_a_key_counts():
    keys = [key_of("a", 1), key_of("a", 2), key_of("b", 1), key_of("a", 1, None), key_of(["a", 1])]
    assert len(set(keys)) == len(keys) and key_of("a", 1) == keys[0]


def test_a_source_is_read_again_only_when_it_changes(folder, tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [row(0), row(1), "bad"])
    first = list(load_corpus(source, seed=0, max_bad_fraction=1))
    made = set(folder.iterdir())
    assert len(made) == 1
    again = load_corpus(source.model_copy(update={"rows": 1}), seed=5, max_bad_fraction=0.5)
    assert again.dropped["bad"].examples[0].startswith(f"{tmp_path}/a.jsonl:3: not valid JSON")
    assert set(folder.iterdir()) == made  # rows, seed and tolerance do not matter
    write(tmp_path / "a.jsonl", [row(0), row(2), "bad"])  # as long as before
    assert list(load_corpus(source, seed=0, max_bad_fraction=1)) != first
    assert len(set(folder.iterdir())) == 2
    other = source.model_copy(update={"fields": FieldMap(solution="question")})
    assert load_corpus(other, seed=0, max_bad_fraction=1)[0].solution.startswith("q")
    assert len(set(folder.iterdir())) == 3
    moved = write(tmp_path / "b.jsonl", [row(0), row(2), "bad"])
    corpus = load_corpus(moved, seed=0, max_bad_fraction=1)
    assert corpus[0].source == "b" and "b.jsonl:3" in corpus.dropped["bad"].examples[0]
    assert len(set(folder.iterdir())) == 4  # records say which file they come from


def test_a_new_format_is_a_new_key(monkeypatch):
    before = key_of("a")
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert key_of("a") != before


def count_rows(source: SourceConfig, cache: str, found: Path) -> None:
    os.environ["PTL_CACHE"] = cache
    found.write_text(str(len(list(load_corpus(source, 0)))))


def test_processes_at_the_same_time(folder, tmp_path):
    source = write(tmp_path / "a.jsonl", [row(i) for i in range(4000)])
    found = [tmp_path / f"found-{number}" for number in range(3)]
    processes = [fork_server().Process(target=count_rows, args=(source, str(folder), path)) for path in found]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [path.read_text() for path in found] == ["4000"] * 3
    assert len(list(folder.iterdir())) == 1
