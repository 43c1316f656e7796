"""What is prepared once is used again, until its source or its settings change or it is damaged."""

import subprocess
import sys
import threading
import time

import pyarrow
import pytest
from data_rows import row, write

from ptl_rl.config import FieldMap
from ptl_rl.data import cache
from ptl_rl.data.cache import cache_folder, cached, key_of
from ptl_rl.data.corpora import DataError, load_corpus

SCHEMA = pyarrow.schema([("x", pyarrow.int64())])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(log, values=(1, 2), wait=None):
    def batches(about):
        log.append(values)
        about["note"] = "n"
        if wait is not None:
            wait()
        yield pyarrow.RecordBatch.from_pydict({"x": list(values)}, SCHEMA)

    return batches


def read(key, log, **options):
    entry = cached(key, SCHEMA, make(log, **options))
    assert entry.about["note"] == "n"
    return entry.table.column("x").to_pylist()


def test_an_entry_is_made_once(folder):
    log = []
    assert read("a", log) == read("a", log) == [1, 2]
    assert len(log) == 1
    assert read("b", log) == [1, 2] and len(log) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def _cut(folder):
    path = folder / "rows.arrow"
    path.write_bytes(path.read_bytes()[:-20])


def _flip(folder):
    path = folder / "rows.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = [
    _cut,
    _flip,
    lambda folder: (folder / "rows.arrow").write_bytes(b""),
    lambda folder: (folder / "rows.arrow").unlink(),
    lambda folder: (folder / "about.json").write_text('{"checksum": '),
    lambda folder: (folder / "about.json").write_text("[]"),
    lambda folder: (folder / "about.json").unlink(),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(damage, folder):
    log = []
    read("a", log)
    damage(folder / "a")
    assert read("a", log) == [1, 2] and len(log) == 2
    assert read("a", log) == [1, 2] and len(log) == 2
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_failure_leaves_nothing(folder):
    def broken(about):
        yield pyarrow.RecordBatch.from_pydict({"x": [1]}, SCHEMA)
        raise DataError("no")

    with pytest.raises(DataError):
        cached("a", SCHEMA, broken)
    assert list(folder.iterdir()) == []


def test_writers_at_the_same_time_get_the_same_and_leave_one(folder):
    log, barrier, found = [], threading.Barrier(4), []
    threads = [
        threading.Thread(target=lambda: found.append(read("a", log, wait=lambda: barrier.wait(20)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1, 2]] * 4 and len(log) == 4
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert read("a", log) == [1, 2] and len(log) == 4


def test_writers_who_find_a_damaged_entry_at_the_same_time(folder):
    log, found = [], []
    read("a", log)
    _flip(folder / "a")
    barrier = threading.Barrier(4)
    threads = [
        threading.Thread(target=lambda: found.append(read("a", log, wait=lambda: barrier.wait(20)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1, 2]] * 4
    assert read("a", log) == [1, 2] and len(log) == 5
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_writer_that_was_killed_is_cleaned_up_after(folder, monkeypatch):
    (folder / ".making-old").mkdir(parents=True)
    read("a", [])
    assert (folder / ".making-old").exists()  # it may still be at work
    now = time.time()
    monkeypatch.setattr(cache.time, "time", lambda: now + 2 * cache.ABANDONED_SECONDS)
    read("b", [])
    assert not (folder / ".making-old").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file: cannot write prepared data: .*; set PTL_CACHE to another folder"):
        cached("a", SCHEMA, make([]))


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
    assert len(set(folder.iterdir())) == 3  # the same content


def test_a_new_format_is_a_new_key(monkeypatch):
    before = key_of("a")
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert key_of("a") != before


def test_processes_at_the_same_time(folder, tmp_path):
    source = write(tmp_path / "a.jsonl", [row(i) for i in range(4000)])
    code = (
        "import sys; from ptl_rl.config import SourceConfig; from ptl_rl.data.corpora import load_corpus;"
        f"print(len(list(load_corpus(SourceConfig(path={source.path!r}), 0))))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["4000"] * 3
    assert len(list(folder.iterdir())) == 1
