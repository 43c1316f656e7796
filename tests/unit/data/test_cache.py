"""What is prepared once is used again, until its source or its settings change or it is damaged."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pyarrow
import pytest
from data_rows import row, write

from ptl_rl.config import FieldMap
from ptl_rl.data import cache
from ptl_rl.data.cache import cache_folder, cached, key_of
from ptl_rl.data.corpora import DataError, load_corpus

FEATURES = datasets.Features({"x": datasets.Value("int64")})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tables_in(folder: Path) -> list[str]:
    """Keys of the tables that are whole."""
    return sorted(path.parent.parent.name for path in folder.glob("tables/*/*/dataset_info.json"))


def read(key, log, values=(1, 2, 3, 4), wait=None):
    def make():
        log.append(values)
        if wait is not None:
            wait()
        half = len(values) // 2
        yield from (pyarrow.table({"x": part}) for part in (values[:half], values[half:]) if part)

    return cached(key, FEATURES, make).data.column("x").to_pylist()


def test_an_entry_is_made_once(folder):
    log = []
    assert read("a", log) == read("a", log) == [1, 2, 3, 4]
    assert len(log) == 1
    assert read("b", log) == [1, 2, 3, 4] and len(log) == 2
    assert tables_in(folder) == ["a", "b"]


def test_a_table_without_rows(folder):
    log = []
    assert read("a", log, values=()) == read("a", log, values=()) == [] and len(log) == 1


def _without_its_end(path):
    """A file that ends between two batches is a whole one to Arrow, but for its rows."""
    reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    kept = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(kept, reader.schema) as writer:
        writer.write_batch(reader.read_next_batch())
    path.write_bytes(kept.getvalue())


DAMAGE = {
    "cut": lambda rows, facts: rows.write_bytes(rows.read_bytes()[:-100]),
    "fewer batches": lambda rows, facts: _without_its_end(rows),
    "empty": lambda rows, facts: rows.write_bytes(b""),
    "zeros": lambda rows, facts: rows.write_bytes(bytes(rows.stat().st_size)),
    "gone": lambda rows, facts: rows.unlink(),
    "facts cut": lambda rows, facts: facts.write_text('{"features": '),
    "facts of another kind": lambda rows, facts: facts.write_text("[]"),
    "facts without splits": lambda rows, facts: facts.write_text("{}"),
    "facts gone": lambda rows, facts: facts.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(damage, folder):
    log = []
    read("a", log)
    (rows,), (facts,) = folder.glob("tables/a/*/*.arrow"), folder.glob("tables/a/*/dataset_info.json")
    DAMAGE[damage](rows, facts)
    assert read("a", log) == [1, 2, 3, 4] and len(log) == 2
    assert read("a", log) == [1, 2, 3, 4] and len(log) == 2
    assert tables_in(folder) == ["a"]


def test_a_failure_leaves_nothing(folder):
    def broken():
        yield pyarrow.table({"x": [1, 2]})
        raise DataError("no")

    with pytest.raises(DataError, match=r"^no$"):
        cached("a", FEATURES, broken)
    assert tables_in(folder) == [] and not list(folder.rglob("*.arrow"))
    assert read("a", []) == [1, 2, 3, 4]


def test_an_interrupt_is_one_and_leaves_nothing(folder):
    def interrupted():
        yield pyarrow.table({"x": [1, 2]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("a", FEATURES, interrupted)
    assert tables_in(folder) == [] and read("a", []) == [1, 2, 3, 4]


def test_writers_at_the_same_time_get_the_same(folder):
    log, found = [], []
    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=lambda: (barrier.wait(20), found.append(read("a", log)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1, 2, 3, 4]] * 4
    assert tables_in(folder) == ["a"]


def test_a_writer_that_was_killed_is_cleaned_up_after(folder, tmp_path):
    code = (
        "import os, signal, pyarrow; from test_cache import FEATURES; from ptl_rl.data.cache import cached\n"
        "def make():\n"
        "    yield pyarrow.table({'x': [1, 2]})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached('a', FEATURES, make)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert killed.returncode == -9 and tables_in(folder) == [] and list(folder.rglob("*.arrow"))
    assert read("a", []) == [1, 2, 3, 4]
    assert len(list(folder.rglob("*.arrow"))) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file: cannot write prepared data: .*; set PTL_CACHE to another folder"):
        read("a", [])


def test_a_disk_that_fills_up_is_named(folder, monkeypatch):
    def full(writer, table, *rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    with pytest.raises(DataError, match=r"cache: cannot write prepared data: No space left on device; set PTL_CACHE"):
        read("a", [])
    assert tables_in(folder) == []


def test_progress_bars_of_others_stay_as_they_were(folder):
    shown = datasets.are_progress_bars_disabled()
    seen = []
    read("a", [], wait=lambda: seen.append(datasets.are_progress_bars_disabled()))
    assert seen == [True] and datasets.are_progress_bars_disabled() == shown


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
    made = set(tables_in(folder))
    assert len(made) == 1
    again = load_corpus(source.model_copy(update={"rows": 1}), seed=5, max_bad_fraction=0.5)
    assert again.dropped["bad"].examples[0].startswith(f"{tmp_path}/a.jsonl:3: not valid JSON")
    assert set(tables_in(folder)) == made  # rows, seed and tolerance do not matter
    write(tmp_path / "a.jsonl", [row(0), row(2), "bad"])  # as long as before
    assert list(load_corpus(source, seed=0, max_bad_fraction=1)) != first
    assert len(set(tables_in(folder))) == 2
    other = source.model_copy(update={"fields": FieldMap(solution="question")})
    assert load_corpus(other, seed=0, max_bad_fraction=1)[0].solution.startswith("q")
    assert len(set(tables_in(folder))) == 3
    moved = write(tmp_path / "b.jsonl", [row(0), row(2), "bad"])
    corpus = load_corpus(moved, seed=0, max_bad_fraction=1)
    assert corpus[0].source == "b" and "b.jsonl:3" in corpus.dropped["bad"].examples[0]
    assert len(set(tables_in(folder))) == 4  # records say which file they come from


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
    assert len(tables_in(folder)) == 1
