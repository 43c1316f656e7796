"""Split the training data into disjoint subsets, one per cycle, so that no cycle sees what another was tuned on."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import overload

from ptl_rl.data.corpora import Corpus
from ptl_rl.data.records import DataError, Record, question_key


def subset_hash(records: Iterable[Record]) -> str:
    """Hash over the content of a subset, order included; written into every plan and manifest."""
    digest = hashlib.sha256()
    for record in records:
        for text in (record.question, record.solution, record.answer):
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


@overload
def partition(records: Corpus, subsets: int) -> list[Corpus]: ...
@overload
def partition(records: Sequence[Record], subsets: int) -> Sequence[Sequence[Record]]: ...
def partition(records: Sequence[Record], subsets: int) -> Sequence[Sequence[Record]]:
    """Deal ``records`` into ``subsets`` that share no question; the parts of a corpus are views of it.

    A question that stands twice goes to the subset of its first copy, so that repeats cannot leak between cycles.
    The order of the records is kept, and sizes differ by at most one where no question repeats.

    Raises:
        DataError: fewer distinct questions than subsets.
    """
    import numpy

    if isinstance(records, Corpus):
        keys = records.question_keys()
    else:
        keys = numpy.array([question_key(r.question, r.solution) for r in records], numpy.uint64)
    _, first, which = numpy.unique(keys, return_index=True, return_inverse=True)
    if len(first) < subsets:
        raise DataError(f"the training data has {len(first)} distinct questions, but the run needs {subsets} subsets")
    rank = numpy.empty(len(first), numpy.int64)
    rank[numpy.argsort(first)] = numpy.arange(len(first))  # of the question, in the order in which questions appear
    home = rank[which] % subsets
    places = [numpy.flatnonzero(home == subset) for subset in range(subsets)]
    if isinstance(records, Corpus):
        return [records.at(part) for part in places]
    return [[records[place] for place in part] for part in places]
