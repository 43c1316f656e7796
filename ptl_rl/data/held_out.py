"""Evaluation sets that are held out of a run's own data, where its recipe names none.

A question goes where the hash of its text puts it. So the sets are the same in every stage, after a resume and under
every seed, and mostly the same once rows are added to a file. No row of the sources is looked at one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptl_rl.config import RunConfig, SourceConfig
from ptl_rl.config.data import EvaluationSet, held_out_rows
from ptl_rl.data.corpora import Corpus, Dropped, SourceUse, check_bad_rows
from ptl_rl.data.records import DataError
from ptl_rl.data.store import Store

if TYPE_CHECKING:
    import numpy

EVALUATION_SEED = 0
EXAMPLES = 3
FEWEST: dict[EvaluationSet, int] = {"validation": 5, "test": 20}
"""Fewer problems say nothing of a model."""
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Of SplitMix64."""


@dataclass(frozen=True)
class HeldOut:
    """What is held out, and how to keep it out of training."""

    sets: dict[EvaluationSet, Corpus]
    keys: "numpy.ndarray"
    """Of their questions; no row that has one of them is trained on."""
    note: str
    """For people."""

    def without(self, store: Store, kept: "numpy.ndarray", dropped: dict[str, Dropped]) -> "numpy.ndarray":
        """The rows ``kept`` that share no question with the sets; notes in ``dropped`` how many do."""
        import numpy

        gone = numpy.isin(store.numbers("question_key")[kept], self.keys)
        if gone.any():
            places = [store.place(int(row)) for row in kept[gone][:EXAMPLES]]
            dropped["held_out"] = Dropped(int(gone.sum()), tuple(f"{place}: held out" for place in places))
        return kept[~gone]


def spared(held: HeldOut | None, dropped: dict[str, Dropped]) -> int:
    """Rows that a source lacks because some of it is held out."""
    if held is None:
        return 0
    return sum(dropped[reason].count for reason in ("held_out", "contaminated") if reason in dropped)


@dataclass(frozen=True)
class _Pool:
    """The rows of one source that may be held out, one for each question, in the order of their ranks."""

    source: SourceConfig
    store: Store
    rows: "numpy.ndarray"
    ranks: "numpy.ndarray"

    @property
    def size(self) -> int:
        """As many of them as the run would use."""
        return min(len(self.rows), self.source.rows or len(self.rows))


def rank(keys: "numpy.ndarray") -> "numpy.ndarray":
    """A seeded order of question keys, which depends on nothing else: SplitMix64's last steps."""
    import numpy

    u = numpy.uint64
    mixed = keys + u((EVALUATION_SEED + 1) * GOLDEN % 2**64)
    mixed = (mixed ^ (mixed >> u(30))) * u(FIRST)
    mixed = (mixed ^ (mixed >> u(27))) * u(SECOND)
    return mixed ^ (mixed >> u(31))


def hold_out(
    config: RunConfig, open_source: Callable[[SourceConfig], Store], named: "list[numpy.ndarray]"
) -> HeldOut | None:
    """Choose the rows of the evaluation sets that ``config`` does not name; None if it names both.

    Args:
        open_source: gives a source's records.
        named: question keys of the sets that are named, which are not held out again.

    Raises:
        DataError: a source cannot be read, or there are too few questions with an answer; names the settings.
    """
    import numpy

    unnamed = config.data.unnamed_sets(config.needs_answers)
    if not unnamed:
        return None
    name, sources = config.data.learnt(config.needs_answers)
    own = [source for source in sources if not source.is_made and source.may_have_answers]
    try:
        pools = _pools(own, open_source, named, config.data.max_bad_fraction)
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from None
    total = sum(pool.size for pool in pools)
    wanted = held_out_rows(total, config.data.held_out)
    for unset in unnamed:
        if wanted[unset] < FEWEST[unset]:
            raise DataError(_too_few(config, unnamed, unset, name, total, wanted[unset]))
    chosen = _chosen(pools, wanted)
    sets = {unset: _corpus(pools, chosen[unset]) for unset in unnamed}
    keys = numpy.concatenate([corpus.question_keys() for corpus in sets.values()])
    return HeldOut(sets, keys, _note(config, sets, name, total))


def _pools(
    sources: list[SourceConfig],
    open_source: Callable[[SourceConfig], Store],
    named: "list[numpy.ndarray]",
    max_bad_fraction: float,
) -> list[_Pool]:
    import numpy

    pools: list[_Pool] = []
    taken = numpy.concatenate([numpy.empty(0, numpy.uint64), *named])
    for source in sources:
        store = open_source(source)
        check_bad_rows(store, max_bad_fraction)
        rows = numpy.flatnonzero(store.has("answer"))
        keys, first = numpy.unique(store.numbers("question_key")[rows], return_index=True)
        new = ~numpy.isin(keys, taken)
        keys, rows = keys[new], rows[first[new]]
        ranks = rank(keys)
        order = numpy.argsort(ranks)
        pools.append(_Pool(source, store, rows[order], ranks[order]))
        taken = numpy.concatenate([taken, keys])
    return pools


def _chosen(pools: list[_Pool], wanted: dict[EvaluationSet, int]) -> "dict[EvaluationSet, list[numpy.ndarray]]":
    """Places in every pool of the rows of each set: of the lowest ranks test's, then validation's."""
    import numpy

    sizes = numpy.array([pool.size for pool in pools])
    begin = numpy.zeros(len(pools), numpy.int64)
    chosen: dict[EvaluationSet, list[numpy.ndarray]] = {}
    sets: tuple[EvaluationSet, ...] = ("test", "validation")
    for name in sets:  # both, also where one is named: the other does not depend on it
        ends = numpy.cumsum(sizes) * wanted[name] // max(1, sizes.sum())
        counts = numpy.diff(ends, prepend=0)
        end = numpy.minimum(begin + counts, [len(pool.rows) for pool in pools])
        chosen[name] = [numpy.arange(low, high) for low, high in zip(begin, end, strict=True)]
        begin = end
    return chosen


def _corpus(pools: list[_Pool], places: "list[numpy.ndarray]") -> Corpus:
    """The rows at ``places`` of the pools, all of them in the order of their ranks."""
    import numpy

    rows, ranks, uses, start = [], [], [], 0
    for pool, of_pool in zip(pools, places, strict=True):
        rows.append(pool.rows[of_pool] + start)
        ranks.append(pool.ranks[of_pool])
        uses.append(SourceUse(pool.source.path, len(of_pool), len(of_pool), len(of_pool)))
        start += len(pool.store)
    order = numpy.argsort(numpy.concatenate(ranks))
    return Corpus([pool.store for pool in pools], numpy.concatenate(rows)[order], uses)


def _settings(names: list[EvaluationSet]) -> str:
    return " and ".join(f"data.{name}" for name in names)


def _too_few(
    config: RunConfig, unnamed: list[EvaluationSet], unset: EvaluationSet, name: str, total: int, found: int
) -> str:
    one = "is" if len(unnamed) == 1 else "are"
    return (
        f"{_settings(unnamed)} {one} not set, and of the {total} questions with an answer in data.{name} "
        f"data.held_out {config.data.held_out:g} gives {found} to {unset}, which needs {FEWEST[unset]}; set "
        "data.test and data.validation to problems with answers, or give more rows"
    )


def _note(config: RunConfig, sets: dict[EvaluationSet, Corpus], name: str, total: int) -> str:
    names = list(sets)
    paths = ", ".join(dict.fromkeys(use.path for corpus in sets.values() for use in corpus.sources))
    counts = " and ".join(str(len(corpus)) for corpus in sets.values())
    return (
        f"{_settings(names)} {'is' if len(names) == 1 else 'are'} not set: {counts} of {total:,} questions of "
        f"data.{name} ({paths}) are held out (data.held_out {config.data.held_out:g}), the same under every seed, and "
        f"are not trained on; name problems of your own as {_settings(names)}: {{path: ...}}"
    )
