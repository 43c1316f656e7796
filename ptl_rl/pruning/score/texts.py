"""Which texts a cycle is scored on: worked solutions of its own subset, the policy's rollouts, general text."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from ptl_rl.config import CriterionConfig, RunConfig
from ptl_rl.data import rollouts
from ptl_rl.data.corpora import Record, load_corpus
from ptl_rl.stage import StageSpec


@dataclass(frozen=True)
class Texts:
    """Questions (empty for plain text), what follows them, and how much each pair counts."""

    questions: list[str] = field(default_factory=list)
    solutions: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    rollouts: int = 0
    """How many of them are the policy's own."""


def texts_of(records: Sequence[Record], suffix: str) -> Texts:
    """Worked solutions, or plain text, each counting 1; ``suffix`` follows the questions."""
    questions = [record.question + suffix if record.question else "" for record in records]
    return Texts(questions, [record.solution for record in records], [1.0] * len(records))


def calibration_texts(config: RunConfig, spec: StageSpec, records: Sequence[Record]) -> Texts:
    """The sequences that a cycle is scored on, at most ``calibration.sequences``.

    With ``calibration.source`` rollouts or both, the latest responses that earned a reward, weighted by it; worked
    solutions make up the number where there are too few, as in the first cycle.
    """
    count, source = config.calibration.sequences, config.calibration.source
    wanted = {"corpus": 0, "rollouts": count, "both": count // 2}[source]
    own = rollouts.load(spec.source)[:wanted] if wanted else []
    corpus = texts_of(records[: count - len(own)], config.prompt_suffix)
    of_corpus = list(zip(corpus.questions, corpus.solutions, corpus.weights, strict=True))
    of_policy = [(r.question + config.prompt_suffix, r.response, r.reward) for r in own]
    # In turns, so that whoever reads only the first few reads both.
    pairs = itertools.chain.from_iterable(itertools.zip_longest(of_policy, of_corpus))
    questions, solutions, weights = zip(*(pair for pair in pairs if pair is not None), strict=True)
    return Texts(list(questions), list(solutions), list(weights), len(own))


def general_texts(criterion: CriterionConfig, seed: int, max_bad_fraction: float) -> Texts:
    """The general text that importance is contrasted with; none if the criterion asks for none.

    Raises:
        DataError: it cannot be read.
    """
    if criterion.contrast is None:
        return Texts()
    corpus = load_corpus(criterion.contrast.data, seed, max_bad_fraction)
    return texts_of(corpus[: criterion.contrast_sequences], "")
