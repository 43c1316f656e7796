"""Bad rows are named by file and line; subsets are disjoint and cover everything."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.data.corpora import DataError, Record, load_corpus
from ptl_rl.data.partition import partition, subset_hash


def row(i):
    return {"id": f"r{i}", "question": f"q{i}?", "solution": f"s{i}", "answer": i}


def write(path, rows):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return SourceConfig(path=str(path))


def test_jsonl_and_parquet_give_the_same_records(tmp_path):
    rows = [row(i) for i in range(20)]
    jsonl = load_corpus(write(tmp_path / "a.jsonl", rows), seed=3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    parquet = load_corpus(SourceConfig(path=str(tmp_path / "a.parquet")), seed=3)
    assert jsonl.records == parquet.records
    assert sorted(r.id for r in jsonl.records) == sorted(f"r{i}" for i in range(20))
    assert jsonl.records != load_corpus(SourceConfig(path=str(tmp_path / "a.jsonl")), seed=4).records


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"question": "q', r"a\.jsonl:2: not valid JSON"),
        ("[1]", r"a\.jsonl:2: a row is a JSON object, this is list"),
        (
            {"question": "q", "solution": "s"},
            r"a\.jsonl:2: no column 'answer' for the answer; the row has question",
        ),
        ({"question": "q", "solution": "s", "answer": "  "}, r"a\.jsonl:2: column 'answer' \(answer\) is empty"),
    ],
)
def test_bad_rows_are_named(bad, message, tmp_path):
    source = write(tmp_path / "a.jsonl", [row(0), bad, row(2)])
    with pytest.raises(DataError, match=message + r".*; 1 of 3 rows are bad, max_bad_fraction allows 0\.1"):
        load_corpus(source, seed=0, max_bad_fraction=0.1)
    tolerant = load_corpus(source, seed=0, max_bad_fraction=0.5)
    assert len(tolerant.records) == 2 and len(tolerant.bad_rows) == 1


def test_sources_that_cannot_be_read(tmp_path):
    for path, message in [
        (str(tmp_path / "no.jsonl"), "no such file"),
        (str(tmp_path / "a.csv"), "unknown kind of data"),
        ("testbed:nowhere", "there are pretrain, rl, validation, test"),
        ("testbed:rl", "set rows"),
    ]:
        with pytest.raises(DataError, match=message):
            load_corpus(SourceConfig(path=path), seed=0)
    (tmp_path / "b.parquet").write_text("nonsense")
    with pytest.raises(DataError, match=r"b\.parquet: not a readable parquet file"):
        load_corpus(SourceConfig(path=str(tmp_path / "b.parquet")), seed=0)
    with pytest.raises(DataError, match="rows is 9, but there are only 2"):
        load_corpus(write(tmp_path / "c.jsonl", [row(0), row(1)]).model_copy(update={"rows": 9}), seed=0)


def test_math12k_rows_without_answer_are_reported(repository):
    path = repository.parent / "shared" / "data" / "math12k_train.jsonl"
    if not path.exists():
        pytest.skip("Math-12k is not on this machine")
    source = SourceConfig(path=str(path), fields=FieldMap(question="problem"))
    corpus = load_corpus(source, seed=0, max_bad_fraction=0.001)
    assert len(corpus.records) == 11998
    assert [bad.split(":")[1] for bad in corpus.bad_rows] == ["5530", "5532"]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 9))
def test_subsets_are_disjoint_and_complete(keys, subsets):
    records = [Record(f"Question  {k}", "s", "a", "src", str(i)) for i, k in enumerate(keys)]
    if len(set(keys)) < subsets:
        with pytest.raises(DataError, match="distinct questions"):
            partition(records, subsets)
        return
    parts = partition(records, subsets)
    assert sorted(r.id for part in parts for r in part) == sorted(r.id for r in records)
    questions = [{r.question for r in part} for part in parts]
    assert sum(map(len, questions)) == len(set().union(*questions))
    assert len({subset_hash(part) for part in parts}) == subsets
