"""Subsets are disjoint, complete and even, for any number of cycles."""

import numpy
import pytest
from data_rows import row, write
from hypothesis import given
from hypothesis import strategies as st

from ptl_rl.data.corpora import Corpus, DataError, Record, load_corpus
from ptl_rl.data.partition import partition, subset_hash
from ptl_rl.data.store import store_of


def corpus_of(records: list[Record]) -> Corpus:
    return Corpus([store_of(records, "memory")], numpy.arange(len(records)), [])


def reference(records: list[Record], subsets: int) -> list[list[Record]]:
    """What earlier versions did, in plain words."""
    home: dict[str, int] = {}
    parts: list[list[Record]] = [[] for _ in range(subsets)]
    for record in records:
        key = " ".join(record.question.split()).casefold()
        parts[home.setdefault(key, len(home) % subsets)].append(record)
    return parts


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 9))
def test_subsets_are_disjoint_and_complete(keys, subsets):
    records = [Record(f"Question {' ' * (i % 3)}{k}", "s", "a", "src", str(i)) for i, k in enumerate(keys)]
    if len(set(keys)) < subsets:
        for data in (records, corpus_of(records)):
            with pytest.raises(DataError, match="distinct questions"):
                partition(data, subsets)
        return
    parts = partition(records, subsets)
    assert [list(part) for part in parts] == reference(records, subsets)
    assert [list(part) for part in partition(corpus_of(records), subsets)] == parts
    assert sorted(r.id for part in parts for r in part) == sorted(r.id for r in records)
    questions = [{" ".join(r.question.split()) for r in part} for part in parts]
    assert sum(map(len, questions)) == len(set().union(*questions))
    assert len({subset_hash(part) for part in parts}) == subsets


@pytest.mark.parametrize("cycles", range(1, 26))
def test_any_number_of_cycles(cycles, tmp_path):
    corpus = load_corpus(write(tmp_path / "a.jsonl", [row(i) for i in range(211)]), seed=cycles)
    parts = partition(corpus, cycles)
    ids = [{record.id for record in part} for part in parts]
    assert sum(map(len, ids)) == len(set().union(*ids)) == 211
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    hashes = [subset_hash(part) for part in parts]
    assert len(set(hashes)) == cycles
    assert hashes == [subset_hash(part) for part in partition(list(corpus), cycles)]


def test_plain_texts_are_told_apart_by_their_content():
    texts = [Record("", f"Text {i % 5}", "", "src", str(i)) for i in range(10)]
    parts = partition(corpus_of(texts), 5)
    assert [[record.id for record in part] for part in parts] == [[str(i), str(i + 5)] for i in range(5)]


def test_the_hash_is_over_content_and_order():
    one, other = Record("q", "s", "a", "src", "1"), Record("q", "other", "a", "src", "1")
    hashes = {subset_hash(records) for records in ([one], [other], [one, other], [other, one], [])}
    assert len(hashes) == 5
    assert subset_hash([Record("q", "s", "a", "elsewhere", "2")]) == subset_hash([one])
    assert subset_hash([Record("ab", "c", "", "", "")]) != subset_hash([Record("a", "bc", "", "", "")])
