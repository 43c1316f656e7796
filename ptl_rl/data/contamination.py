"""Find rows of a corpus that hold a question which the model will be evaluated on.

Words are compared, in small letters and without punctuation. A row is a hit if it holds ``min_overlap`` of the runs of
``ngram`` words of some question. Runs that many questions share are a template's and say nothing. Questions with
fewer words, or with no run of their own, are compared whole, and with their operators, as "2 + 3" and "2 - 3" are the
same words. Each row is read once: its runs of words are looked up among those of all questions.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ptl_rl.config import DecontaminateConfig
from ptl_rl.data.cache import cached, key_of
from ptl_rl.data.records import Progress, no_progress
from ptl_rl.data.store import Store

if TYPE_CHECKING:
    import numpy
    import pyarrow

_NO_WORD = r"[^\p{L}\p{N}]+"
_APOSTROPHE = re.compile(r"['’`´]")
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
_WHOLE = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[-+*/=<>^%|()]|(?<=[\d)])!")
_FILTER_BITS = 22
TEMPLATE = 5
"""A run that more different questions than this have is a template's."""


def whole_key(text: str) -> str:
    """What is left of a short question when letter case, white space and punctuation are taken off."""
    plain = unicodedata.normalize("NFKC", _APOSTROPHE.sub("", text)).casefold()
    return " ".join(_WHOLE.findall(_HYPHEN.sub(" ", plain)))


def words(texts: "pyarrow.Array") -> "pyarrow.ListArray":
    """The words of every text."""
    import pyarrow.compute as pc

    plain = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    spaced = pc.utf8_trim(pc.replace_substring_regex(plain, pattern=_NO_WORD, replacement=" "), characters=" ")
    return pc.split_pattern(spaced, pattern=" ")


@dataclass(frozen=True)
class Question:
    """A question of an evaluation set."""

    place: str
    """The set and the question's id."""
    text: str
    key: int
    """:func:`ptl_rl.data.records.question_key` of it."""
    by_key: bool
    """Only the very same question counts: the test bed's share their templates, and are disjoint by construction."""


class NgramIndex:
    """The runs of ``n`` words of all questions, as 64-bit hashes.

    Of a corpus of 10^9 words and 10^5 runs, a single chance match has a probability of 10^-5.
    """

    def __init__(self, questions: list[Question], n: int) -> None:
        import numpy
        import pyarrow
        import pyarrow.compute as pc

        self.n = n
        found = words(pyarrow.array([question.text for question in questions], pyarrow.string()))
        self.vocabulary = pc.unique(found.values)
        # Words get random numbers, so that the hash of a run does not depend on the order of the vocabulary.
        self._numbers = numpy.random.default_rng(0).integers(1, 2**63, len(self.vocabulary) + 1, dtype=numpy.uint64)
        hashes, owner = self._runs(found)
        pairs = numpy.empty(len(hashes), [("run", numpy.uint64), ("question", numpy.int64)])
        pairs["run"], pairs["question"] = hashes, owner
        pairs = numpy.unique(pairs)
        text_of = numpy.unique([question.text for question in questions], return_inverse=True)[1]
        of_texts = pairs.copy()
        of_texts["question"] = text_of[pairs["question"]]
        runs, texts = numpy.unique(numpy.unique(of_texts)["run"], return_counts=True)
        pairs = pairs[~numpy.isin(pairs["run"], runs[texts > TEMPLATE])]
        self.sizes = numpy.bincount(pairs["question"], minlength=len(questions))
        self._runs_of_pairs, self._questions_of_pairs = pairs["run"], pairs["question"]
        self._filter = numpy.zeros(1 << _FILTER_BITS, bool)
        self._filter[pairs["run"] >> numpy.uint64(64 - _FILTER_BITS)] = True
        self.short = {whole_key(questions[i].text): int(i) for i in numpy.flatnonzero(self.sizes == 0)[::-1]}
        self.short.pop("", None)
        # Copies of a short question that punctuation makes more than twice as long are not looked for.
        self.longest_short = 2 * max((len(questions[i].text) for i in self.short.values()), default=0) + 32

    def _runs(self, found: "pyarrow.ListArray") -> "tuple[numpy.ndarray, numpy.ndarray]":
        """Hash and list of every run of ``n`` words that are all in the vocabulary."""
        import numpy
        import pyarrow.compute as pc

        ids = pc.index_in(found.values, value_set=self.vocabulary).fill_null(len(self.vocabulary)).to_numpy()
        lengths = pc.list_value_length(found).to_numpy()
        owner = numpy.repeat(numpy.arange(len(found)), lengths)
        count = max(0, len(ids) - self.n + 1)
        unknown = numpy.concatenate([[0], numpy.cumsum(ids == len(self.vocabulary))])
        whole = (owner[:count] == owner[self.n - 1 :]) & (unknown[self.n :] == unknown[:count])
        starts = numpy.flatnonzero(whole)
        hashes = numpy.zeros(len(starts), numpy.uint64)
        for place in range(self.n):
            hashes = hashes * numpy.uint64(0x9E3779B97F4A7C15) + self._numbers[ids[starts + place]]
        return hashes, owner[starts]

    def same(self, texts: "pyarrow.Array") -> Iterator[tuple[int, int]]:
        """Places of texts that are a short question, and of that question."""
        import numpy
        import pyarrow.compute as pc

        if not self.short:
            return
        places = numpy.flatnonzero(pc.less_equal(pc.utf8_length(texts), self.longest_short))
        for place, text in zip(places.tolist(), texts.take(places).to_pylist(), strict=True):
            question = self.short.get(whole_key(text))
            if question is not None:
                yield place, question

    def holding(self, texts: "pyarrow.Array", min_overlap: float) -> Iterator[tuple[int, int, float]]:
        """Places of texts that hold runs of words, of the question of which they hold most, and its share."""
        import numpy

        found = words(texts)
        hashes, row = self._runs(found)
        near = numpy.flatnonzero(self._filter[hashes >> numpy.uint64(64 - _FILTER_BITS)])
        first = numpy.searchsorted(self._runs_of_pairs, hashes[near], "left")
        last = numpy.searchsorted(self._runs_of_pairs, hashes[near], "right")
        seen: dict[int, dict[int, set[int]]] = {}
        for place, low, high in zip(near.tolist(), first.tolist(), last.tolist(), strict=True):
            for pair in range(low, high):
                of_row = seen.setdefault(int(row[place]), {})
                of_row.setdefault(int(self._questions_of_pairs[pair]), set()).add(int(hashes[place]))
        for text, of_row in sorted(seen.items()):
            share, question = max((len(runs) / int(self.sizes[q]), -q) for q, runs in of_row.items())
            if share >= min_overlap:
                yield text, -question, share


@dataclass(frozen=True)
class Evaluation:
    """All questions that must not be trained on."""

    questions: list[Question]

    @cached_property
    def keys(self) -> dict[int, int]:
        """Question keys, each with the place of its question."""
        return {question.key: place for place, question in reversed(list(enumerate(self.questions)))}

    @cached_property
    def worded(self) -> list[int]:
        """Places of those that are compared word by word."""
        return [place for place, question in enumerate(self.questions) if not question.by_key]

    @cached_property
    def digest(self) -> str:
        return key_of("questions", [[self.questions[place].place, self.questions[place].text] for place in self.worded])


@dataclass(frozen=True)
class Hits:
    """Rows of a store that overlap, with the place of the question and the share of it that they hold."""

    rows: "numpy.ndarray"
    questions: "numpy.ndarray"
    shares: "numpy.ndarray"


def _scan(store: Store, index: NgramIndex, min_overlap: float, progress: Progress) -> "Iterator[pyarrow.Table]":
    import pyarrow
    import pyarrow.compute as pc

    start = 0
    for batch in store.rows.data.to_batches():
        question, solution = batch.column("question"), batch.column("solution")
        texts = pc.binary_join_element_wise(question, solution, "\n")
        hits = {place: (found, share) for place, found, share in index.holding(texts, min_overlap)}
        wholes = pc.if_else(pc.equal(question, ""), solution, question)
        hits |= {place: (found, 1.0) for place, found in index.same(wholes)}
        if hits:
            rows = [{"row": start + place, "question": q, "share": share} for place, (q, share) in sorted(hits.items())]
            yield pyarrow.Table.from_pylist(rows)
        start += len(batch)
        progress(f"comparing {store.path} with the evaluation questions", start, len(store))


def word_hits(
    store: Store, evaluation: Evaluation, settings: DecontaminateConfig, progress: Progress = no_progress
) -> Hits:
    """Rows of ``store`` that overlap with a question word by word; remembered in the cache."""
    import numpy
    from datasets import Features, Value

    questions = [evaluation.questions[place] for place in evaluation.worded]
    key = key_of("hits", store.key, evaluation.digest, settings.ngram, settings.min_overlap)
    found = cached(
        key,
        Features({"row": Value("int64"), "question": Value("int64"), "share": Value("float64")}),
        lambda: _scan(store, NgramIndex(questions, settings.ngram), settings.min_overlap, progress),
    )
    row, question, share = (found.data.column(name).to_numpy() for name in ("row", "question", "share"))
    return Hits(row, numpy.asarray(evaluation.worded, numpy.int64)[question], share)
