"""Bad rows are named by file and line, a corpus is a list that holds nothing, and its order never changes."""

import hashlib
import random
from dataclasses import astuple

import pytest
from data_rows import row, write

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.data.corpora import Corpus, DataError, load_corpus, shuffled


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
        ('{"question": "\\ud800", "solution": "s", "answer": "1"}', r"a\.jsonl:2: .* half of a surrogate pair"),
        (
            '{"q\\ud800": "q", "solution": "s", "answer": "1"}',
            r"a\.jsonl:2: no column 'question' .* q\\ud800, solution",
        ),
    ],
)
def test_bad_rows_are_named(bad, message, tmp_path):
    source = write(tmp_path / "a.jsonl", [row(0), bad, row(2)])
    with pytest.raises(DataError, match=message + r".*; 1 of 3 rows are bad, max_bad_fraction allows 0\.1"):
        load_corpus(source, seed=0, max_bad_fraction=0.1)
    tolerant = load_corpus(source, seed=0, max_bad_fraction=0.5)
    assert len(tolerant) == 2 and tolerant.dropped["bad"].count == len(tolerant.dropped["bad"].examples) == 1
    (use,) = tolerant.sources
    assert (use.read, use.kept, use.used) == (3, 2, 2)


def test_only_so_many_bad_rows_are_listed(tmp_path):
    corpus = load_corpus(write(tmp_path / "a.jsonl", [row(0), *["nonsense"] * 50]), seed=0, max_bad_fraction=1)
    assert corpus.dropped["bad"].count == 50 and len(corpus.dropped["bad"].examples) == 20


def test_sources_that_cannot_be_read(tmp_path):
    for path, message in [
        (str(tmp_path / "no.jsonl"), "no such file"),
        (str(tmp_path / "a.csv"), "unknown kind of data"),
        ("testbed:nowhere", "there are pretrain, rl, validation, test"),
        ("testbed:rl", "set rows"),
        (str(tmp_path), "not a folder that datasets.save_to_disk wrote"),
    ]:
        with pytest.raises(DataError, match=message):
            load_corpus(SourceConfig(path=path), seed=0)
    for name in ("b.parquet", "b.arrow"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(DataError, match=rf"{name}: cannot be read, or is not what its name says"):
            load_corpus(SourceConfig(path=str(tmp_path / name)), seed=0)
    with pytest.raises(DataError, match="rows is 9, but there are only 2"):
        load_corpus(write(tmp_path / "c.jsonl", [row(0), row(1)]).model_copy(update={"rows": 9}), seed=0)
    with pytest.raises(DataError, match=r"d\.jsonl: no rows"):
        load_corpus(write(tmp_path / "d.jsonl", []), seed=0)
    with pytest.raises(DataError, match="layout 'numina' is no known corpus; there are AI-MO/NuminaMath-CoT"):
        load_corpus(write(tmp_path / "e.jsonl", [row(0)]).model_copy(update={"layout": "numina"}), seed=0)


def test_a_corpus_is_a_list_of_records(tmp_path):
    source = write(tmp_path / "a.jsonl", [row(i) for i in range(5000)])  # several batches
    corpus = load_corpus(source, seed=3)
    everything = list(corpus)
    assert len(everything) == len(corpus) == 5000 and everything[4999] == corpus[-1] == corpus[4999]
    assert [astuple(record)[:3] for record in corpus[10:20:3]] == [astuple(r)[:3] for r in everything[10:20:3]]
    assert isinstance(corpus[:7], Corpus) and list(corpus[:7][2:]) == everything[2:7]
    assert corpus.at(shuffled(5000, 1))[0] == everything[shuffled(5000, 1)[0]]
    assert everything[8] in corpus and corpus.index(everything[8]) == 8
    with pytest.raises(IndexError):
        corpus[5000]


def test_the_order_is_that_of_a_shuffled_list(tmp_path):
    source = write(tmp_path / "a.jsonl", [row(i) for i in range(100)])
    ids = [f"r{i}" for i in range(100)]
    random.Random(7).shuffle(ids)
    assert [record.id for record in load_corpus(source, seed=7)] == ids
    few = source.model_copy(update={"rows": 30})
    assert [record.id for record in load_corpus(few, seed=7)] == ids[:30]
    assert [shuffled(n, 0).tolist() for n in (0, 1)] == [[], [0]]


def test_generated_problems_are_those_of_earlier_versions():
    """Measured results name seeds: the same seed must give the same problems in the same order for ever."""
    corpus = load_corpus(SourceConfig(path="testbed:rl", rows=8192), seed=0)
    digest = hashlib.sha256(repr(list(corpus)).encode()).hexdigest()
    assert digest == "e80746636bfa6c4dcdd3c859919f554f1db65e44fc683fef6c76ac33c2751945"


def test_math12k_rows_without_answer_are_reported(repository):
    path = repository.parent / "shared" / "data" / "math12k_train.jsonl"
    if not path.exists():
        pytest.skip("Math-12k is not on this machine")
    source = SourceConfig(path=str(path), fields=FieldMap(question="problem"))
    corpus = load_corpus(source, seed=3, max_bad_fraction=0.001)
    assert len(corpus) == 11998
    assert [bad.split(":")[1] for bad in corpus.dropped["bad"].examples] == ["5530", "5532"]
    digest = hashlib.sha256(repr(list(corpus)).encode()).hexdigest()
    assert digest == "8fa8c5cbee241a029eb8c4200cdd7f0b807c6ca9c5b073a0a54364b82b77a33d"
