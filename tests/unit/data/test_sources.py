"""The same rows from every kind of file give the same records."""

import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_rows import row, write

from ptl_rl.config import SourceConfig
from ptl_rl.data.corpora import DataError, load_corpus
from ptl_rl.data.known import Layout
from ptl_rl.data.records import Record
from ptl_rl.data.sources import _arrow_rows, _parquet_rows

ROWS = [row(i, more="not read") for i in range(3000)]
ORDER = list(range(3000))
random.Random(3).shuffle(ORDER)
FIRST = [f"r{i}" for i in ORDER[:3]]


def _jsonl(folder):
    return write(folder / "a.jsonl", ROWS)


def _parquet(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=700)
    return SourceConfig(path=str(folder / "a.parquet"))


def _arrow_file(folder):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    return SourceConfig(path=str(folder / "a.arrow"))


def _arrow_stream(folder):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    return SourceConfig(path=str(folder / "a.arrow"))


def _saved(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "a")
    return SourceConfig(path=str(folder / "a"))


def _saved_splits(folder):
    splits = {"train": datasets.Dataset.from_list(ROWS[:1]), "other": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(folder / "a")
    return SourceConfig(path=str(folder / "a"), split="other")


def _saved_selection(folder):
    """A data set whose rows are chosen by an index file."""
    doubled = datasets.Dataset.from_list([*ROWS[::-1], *ROWS])
    doubled.select(range(2999, -1, -1)).save_to_disk(folder / "a")
    return SourceConfig(path=str(folder / "a"))


def _home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    write(folder / "a.jsonl", ROWS)
    return SourceConfig(path="~/a.jsonl")


KINDS = [_jsonl, _parquet, _arrow_file, _arrow_stream, _saved, _saved_splits, _saved_selection]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_records(kind, tmp_path):
    told = []
    corpus = load_corpus(kind(tmp_path), seed=3, progress=lambda what, done, total: told.append((what, done, total)))
    plain = [Record(f"q{i}?", f"s{i}", str(i), "a", f"r{i}") for i in range(3000)]
    assert sorted(corpus, key=lambda record: int(record.answer)) == plain
    assert [record.id for record in corpus[:3]] == FIRST
    assert told and told[0][0].startswith("reading ") and told[-1][2] in (0, told[-1][1])


def test_a_path_from_home(tmp_path, monkeypatch):
    assert len(load_corpus(_home(tmp_path, monkeypatch), seed=0)) == 3000


def test_a_split_that_is_not_there(tmp_path):
    source = _saved_splits(tmp_path).model_copy(update={"split": "tset"})
    with pytest.raises(DataError, match="no split 'tset'; there are train, other"):
        load_corpus(source, seed=0)


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"problem": "q", "x": 1}]), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet row 1: no column 'question' for the question; the row has problem, x"
    ):
        load_corpus(SourceConfig(path=str(tmp_path / "a.parquet")), seed=0)


def test_short_floats_are_the_decimals_that_they_were_written_as(tmp_path):
    rows = pyarrow.Table.from_pylist([row(i, answer=None) for i in range(3)]).drop_columns("answer")
    short, path = pyarrow.float32(), tmp_path / "a.parquet"
    answers = rows.append_column("answer", pyarrow.array([0.1, 2.5e-7, 1 / 3], short))
    pyarrow.parquet.write_table(answers, path)
    corpus = load_corpus(SourceConfig(path=str(path)), seed=0)
    assert {record.answer for record in corpus} == {"0.1", "2.5e-07", "0.33333334"}
    kind = pyarrow.struct({"known": short, "wide": pyarrow.float64()})
    parts = {
        "half": pyarrow.array([0.1, 1, None], pyarrow.float16()),
        "judged": pyarrow.array([{"known": 0.7, "wide": 0.1}, None, {"known": None, "wide": 1}], kind),
        "all": pyarrow.array([[0.1, 0.2], [], None], pyarrow.list_(short)),
        "named": pyarrow.array([[("a", 0.1)], [], None], pyarrow.map_(pyarrow.string(), short)),
        "large": pyarrow.array([123456792.0, float("nan"), float("inf")], short),
    }
    pyarrow.parquet.write_table(pyarrow.table(parts), path)
    read = [values for _, values in _parquet_rows(path, Layout("any", (), dict), lambda *_: None)]
    assert [values["half"] for values in read] == [0.1, 1.0, None]
    assert [values["judged"] for values in read] == [{"known": 0.7, "wide": 0.1}, None, {"known": None, "wide": 1.0}]
    assert [values["all"] for values in read] == [[0.1, 0.2], [], None]
    assert [values["named"] for values in read] == [[("a", 0.1)], [], None]
    assert repr([values["large"] for values in read]) == "[123456792.0, nan, inf]"
    few = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1, 0], pyarrow.int8()), pyarrow.array([0.1, 0.7], short)
    )
    with pyarrow.ipc.new_file(tmp_path / "few.arrow", pyarrow.schema({"few": few.type})) as writer:
        writer.write_table(pyarrow.table({"few": few}))
    read = [values for _, values in _arrow_rows(tmp_path / "few.arrow", Layout("any", (), dict), lambda *_: None)]
    assert read == [{"few": 0.1}, {"few": 0.7}, {"few": 0.1}]
