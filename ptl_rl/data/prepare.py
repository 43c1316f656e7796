"""The data of a run: sources merged, repeats and copies of evaluation questions left out, in a seeded order.

Every stage prepares them again from the configuration alone, and the cache makes that cheap. Rows are compared with
those of sources named before theirs, so the first of several copies stays; only rows that are used count.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ptl_rl.config import RunConfig, SourceConfig
from ptl_rl.data.contamination import Evaluation, Question, word_hits
from ptl_rl.data.corpora import (
    Corpus,
    Dropped,
    SourceUse,
    bad_rows,
    check_bad_rows,
    chosen_rows,
    load_corpus,
    shuffled,
    with_answer,
)
from ptl_rl.data.partition import partition
from ptl_rl.data.records import DataError, Progress, no_progress, question_key
from ptl_rl.data.sources import TESTBED
from ptl_rl.data.store import Store, open_store

if TYPE_CHECKING:
    import numpy

EXAMPLES = 3
REASONS = {
    "unanswered": "rows without an answer",
    "duplicate": "rows whose question came before",
    "contaminated": "rows that hold an evaluation question",
}
EVALUATION_SEED = 0
EVALUATION_SETS: tuple[Literal["validation", "test"], ...] = ("validation", "test")


def training_data(config: RunConfig, progress: Progress = no_progress) -> Corpus:
    """The problems of ``data.train``.

    Raises:
        DataError: a source that cannot be read, holds too many malformed rows, or nothing that is left.
    """
    return _merged(config, config.data.train_sources, config.needs_answers, progress)


def worked_solutions(config: RunConfig, progress: Progress = no_progress) -> Corpus:
    """What scoring and continued pre-training read: ``data.corpus``, or where there is none the training data."""
    if config.data.corpus is None:
        return training_data(config, progress)
    return _merged(config, config.data.corpus_sources, False, progress)


def evaluation_data(config: RunConfig, name: Literal["validation", "test"], progress: Progress = no_progress) -> Corpus:
    """An evaluation set, as it is but for malformed rows and those without an answer; the same whatever the run's seed,
    for runs that are compared."""
    source: SourceConfig = getattr(config.data, name)
    return load_corpus(source, EVALUATION_SEED, config.data.max_bad_fraction, answers=True, progress=progress)


@dataclass(frozen=True)
class RunData:
    """All that a run reads, by the name that it has under ``data``."""

    sets: dict[str, Corpus]
    subsets: dict[str, list[Corpus]]
    """Of train and corpus, one per cycle."""

    def notes(self) -> list[str]:
        """What was left out and where it stands, for people."""
        notes = []
        for name, corpus in self.sets.items():
            for reason, dropped in corpus.dropped.items():
                if reason == "bad":
                    notes += [f"data.{name}: dropped {example}" for example in dropped.examples]
                    more = dropped.count - len(dropped.examples)
                    notes += [f"data.{name}: dropped {more} more malformed rows"] if more else []
                else:
                    notes.append(
                        f"data.{name}: dropped {dropped.count} {REASONS[reason]}: {'; '.join(dropped.examples)}"
                    )
        return notes + self._shared()

    def _shared(self) -> list[str]:
        import numpy

        notes = []
        for name in ("train", "corpus"):
            if name in self.sets:
                shared = numpy.isin(self.sets["test"].question_keys(), self.sets[name].question_keys()).sum()
                notes += [f"data.test: {shared} of its questions also stand in data.{name}"] if shared else []
        return notes


def run_data(config: RunConfig, subsets: int, progress: Progress = no_progress) -> RunData:
    """Read everything; ``subsets`` is how many the run needs.

    Raises:
        DataError: something cannot be used; the message begins with its name.
    """
    sets: dict[str, Corpus] = {}
    parts: dict[str, list[Corpus]] = {}
    name = ""
    try:
        for name in EVALUATION_SETS:
            sets[name] = evaluation_data(config, name, progress)
        if config.data.corpus is None or config.needs_answers:
            name = "train"
            sets[name] = training_data(config, progress)
            parts[name] = partition(sets[name], subsets)
        if config.data.corpus is not None:
            name = "corpus"
            sets[name] = worked_solutions(config, progress)
            parts[name] = partition(sets[name], subsets)
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from None
    order = [name for name in ("train", "corpus", *EVALUATION_SETS) if name in sets]
    return RunData({name: sets[name] for name in order}, parts)


def _evaluation(config: RunConfig, progress: Progress) -> Evaluation:
    questions: list[Question] = []
    for name in EVALUATION_SETS:
        made = getattr(config.data, name).path.startswith(TESTBED)
        for record in evaluation_data(config, name, progress):
            key = question_key(record.question, record.solution)
            questions.append(Question(f"data.{name} {record.id}", record.question, key, made))
    return Evaluation(questions)


def _merged(config: RunConfig, sources: list[SourceConfig], answers: bool, progress: Progress) -> Corpus:
    import numpy

    evaluation = _evaluation(config, progress) if config.data.decontaminate is not None else Evaluation([])
    stores: list[Store] = []
    rows: list[numpy.ndarray] = []
    uses: list[SourceUse] = []
    seen = numpy.empty(0, numpy.uint64)
    start = 0
    for source in sources:
        store = open_store(source, config.seed, progress)
        check_bad_rows(store, config.data.max_bad_fraction)
        dropped = bad_rows(store)
        kept = numpy.arange(len(store))
        if answers:
            kept = with_answer(store, kept, dropped)
        kept = _without_repeats(config, store, kept, seen, dropped)
        kept = _without_copies(config, store, kept, evaluation, dropped, progress)
        used = chosen_rows(source, kept, config.seed)
        if config.data.deduplicate != "off":
            seen = numpy.concatenate([seen, _keys(config, store)[used]])
        uses.append(SourceUse(source.path, store.read, len(kept), len(used), dropped))
        stores.append(store)
        rows.append(used + start)
        start += len(store)
    merged = numpy.concatenate(rows)
    if len(sources) > 1:
        merged = merged[shuffled(len(merged), config.seed)]
    return Corpus(stores, merged, uses)


def _keys(config: RunConfig, store: Store) -> "numpy.ndarray":
    return store.numbers("question_key" if config.data.deduplicate == "question" else "content_key")


def _without_repeats(
    config: RunConfig, store: Store, kept: "numpy.ndarray", seen: "numpy.ndarray", dropped: dict[str, Dropped]
) -> "numpy.ndarray":
    """The first row of every key that is not ``seen``."""
    import numpy

    if config.data.deduplicate == "off":
        return kept
    keys = _keys(config, store)[kept]
    _, first, which = numpy.unique(keys, return_index=True, return_inverse=True)
    repeated = first[which] != numpy.arange(len(kept))
    elsewhere = numpy.isin(keys, seen)
    gone = repeated | elsewhere
    if gone.any():
        examples = []
        for place in numpy.flatnonzero(gone)[:EXAMPLES]:
            of = "a source before it" if elsewhere[place] else store.place(int(kept[first[which[place]]]))
            examples.append(f"{store.place(int(kept[place]))}: repeats {of}")
        dropped["duplicate"] = Dropped(int(gone.sum()), tuple(examples))
    return kept[~gone]


def _without_copies(
    config: RunConfig,
    store: Store,
    kept: "numpy.ndarray",
    evaluation: Evaluation,
    dropped: dict[str, Dropped],
    progress: Progress,
) -> "numpy.ndarray":
    """Rows that overlap with no evaluation question; those of the test bed need only differ from all of them."""
    import numpy

    if not evaluation.questions or config.data.decontaminate is None:
        return kept
    keys = store.numbers("question_key")
    same = numpy.flatnonzero(numpy.isin(keys, numpy.array(list(evaluation.keys), numpy.uint64)))
    hits = {int(row): (evaluation.keys[int(keys[row])], 1.0) for row in same}
    if evaluation.worded and not store.path.startswith(TESTBED):
        found = word_hits(store, evaluation, config.data.decontaminate, progress)
        for row, question, share in zip(found.rows, found.questions, found.shares, strict=True):
            hits.setdefault(int(row), (int(question), float(share)))
    gone = numpy.isin(kept, numpy.array(list(hits), numpy.int64))
    if gone.any():
        examples = []
        for row in kept[gone][:EXAMPLES].tolist():
            question, share = hits[row]
            examples.append(f"{store.place(row)}: holds {share:.0%} of {evaluation.questions[question].place}")
        dropped["contaminated"] = Dropped(int(gone.sum()), tuple(examples))
    return kept[~gone]
