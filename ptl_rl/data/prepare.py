"""The data of a run: sources merged, repeats and copies of evaluation questions left out, in a seeded order.

They are prepared from the configuration alone, and the cache makes it cheap to do that again. Rows are compared with
those of sources named before theirs, so the first of several copies stays; only rows that are used count.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ptl_rl.config import RunConfig, SourceConfig
from ptl_rl.config.data import TESTBED, EvaluationSet
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
from ptl_rl.data.held_out import EVALUATION_SEED, HeldOut, hold_out, spared
from ptl_rl.data.partition import partition
from ptl_rl.data.records import DataError, Progress, no_progress, question_key
from ptl_rl.data.store import Store, open_store

if TYPE_CHECKING:
    import numpy

EXAMPLES = 3
REASONS = {
    "unanswered": "rows without an answer",
    "held_out": "rows held out for evaluation",
    "duplicate": "rows whose question came before",
    "contaminated": "rows that hold an evaluation question",
}
EVALUATION_SETS: tuple[EvaluationSet, ...] = ("validation", "test")


def training_data(config: RunConfig, progress: Progress = no_progress) -> Corpus:
    """The problems of ``data.train``.

    Raises:
        DataError: a source that cannot be read, holds too many malformed rows, or nothing that is left.
    """
    return _Reading(config, progress).training()


@dataclass(frozen=True)
class RunData:
    """All that a run reads, by the name that it has under ``data``."""

    sets: dict[str, Corpus]
    subsets: dict[str, list[Corpus]]
    """Of train and corpus, one per cycle."""
    unnamed: str | None = None
    """What stands in for evaluation sets that the recipe does not name."""

    def notes(self) -> list[str]:
        """What was left out and where it stands, for people."""
        notes = [self.unnamed] if self.unnamed is not None else []
        for name, corpus in self.sets.items():
            for reason, dropped in corpus.dropped.items():
                if reason == "held_out":
                    continue
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
    reading = _Reading(config, progress)
    held = reading.held  # before all else: what it cannot use it names itself
    name = ""
    try:
        for name in EVALUATION_SETS:
            sets[name] = reading.evaluation(name)
        if config.data.corpus is None or config.needs_answers:
            name = "train"
            sets[name] = reading.training()
            parts[name] = partition(sets[name], subsets)
        if config.data.corpus is not None:
            name = "corpus"
            sets[name] = reading.worked_solutions()
            parts[name] = partition(sets[name], subsets)
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from None
    order = [name for name in ("train", "corpus", *EVALUATION_SETS) if name in sets]
    return RunData({name: sets[name] for name in order}, parts, held.note if held else _made_note(config))


def _made_note(config: RunConfig) -> str | None:
    """That problems of the test bed stand in where the recipe names none."""
    made = {name: config.evaluation_set(name) for name in EVALUATION_SETS if getattr(config.data, name) is None}
    if not made:
        return None
    paths = " and ".join(f"data.{name}: {source.rows} of {source.path}" for name, source in made.items() if source)
    return f"problems of the test bed stand in for sets that are not named: {paths}"


class _Reading:
    """One reading of a run's data, which opens every source once, however many sets it is for."""

    def __init__(self, config: RunConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._stores: dict[SourceConfig, Store] = {}
        self._sets: dict[EvaluationSet, Corpus] = {}

    def _open(self, source: SourceConfig) -> Store:
        if not source.is_made:
            source = source.model_copy(update={"rows": None})
        if source not in self._stores:
            self._stores[source] = open_store(source, self._config.seed, self._progress)
        return self._stores[source]

    @cached_property
    def held(self) -> HeldOut | None:
        """What is held out; None where both evaluation sets have a source."""
        config = self._config
        if config.needs_answers or config.data.corpus is None:
            self._check_train()
        if not (unnamed := config.data.unnamed_sets(config.needs_answers)):
            return None
        named = []
        for name in EVALUATION_SETS:
            if name not in unnamed:
                try:
                    named.append(self.evaluation(name).question_keys())
                except DataError as error:
                    raise DataError(f"data.{name}: {error}") from None
        return hold_out(config, self._open, named)

    def _check_train(self) -> None:
        if self._config.data.train is None and not self._config.is_of_the_test_bed:
            raise DataError(
                f"data.train: not set, and {self._config.model.path} is none of the test bed's models, which alone "
                "learn from its problems by default; set data.train to your problems: {path: FILE}"
            )

    def evaluation(self, name: EvaluationSet) -> Corpus:
        if name not in self._sets:
            source, most_bad = self._config.evaluation_set(name), self._config.data.max_bad_fraction
            if source is None:
                assert self.held is not None
                return self.held.sets[name]
            self._sets[name] = load_corpus(source, EVALUATION_SEED, most_bad, answers=True, progress=self._progress)
        return self._sets[name]

    def training(self) -> Corpus:
        return self._merged(self._config.data.train_sources, self._config.needs_answers)

    def worked_solutions(self) -> Corpus:
        if self._config.data.corpus is None:
            return self.training()
        return self._merged(self._config.data.corpus_sources, False)

    @cached_property
    def _questions(self) -> Evaluation:
        """Those that rows are compared with."""
        questions: list[Question] = []
        for name in EVALUATION_SETS if self._config.data.decontaminate is not None else ():
            source = self._config.evaluation_set(name)
            made = source is not None and source.is_made
            for record in self.evaluation(name):
                key = question_key(record.question, record.solution)
                questions.append(Question(f"data.{name} {record.id}", record.question, key, made))
        return Evaluation(questions)

    def _merged(self, sources: list[SourceConfig], answers: bool) -> Corpus:
        import numpy

        config, held = self._config, self.held
        stores: list[Store] = []
        rows: list[numpy.ndarray] = []
        uses: list[SourceUse] = []
        seen = numpy.empty(0, numpy.uint64)
        start = 0
        for source in sources:
            store = self._open(source)
            check_bad_rows(store, config.data.max_bad_fraction)
            dropped = bad_rows(store)
            kept = store.records
            if answers:
                kept = with_answer(store, kept, dropped)
            if held is not None:
                kept = held.without(store, kept, dropped)
            kept = _without_repeats(config, store, kept, seen, dropped)
            kept = _without_copies(config, store, kept, self._questions, dropped, self._progress)
            used = chosen_rows(source, kept, config.seed, spared(held, dropped))
            if config.data.deduplicate != "off":
                seen = numpy.concatenate([seen, _keys(config, store)[used]])
            uses.append(SourceUse(source.path, len(store), len(kept), len(used), dropped))
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
