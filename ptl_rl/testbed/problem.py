"""What the test bed's generators share: a problem, the splits by meaning, and the stream of distinct ones."""

import hashlib
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

SPLITS = {"pretrain": (0, 80), "rl": (80, 92), "validation": (92, 95), "test": (95, 100)}
"""Split name to its range of hash buckets (percent): a problem belongs to one split whatever seed made it."""
LEVELS = (1, 2, 3, 4, 5)
EASY = (1, 2, 3)
"""What a split's name alone means."""
EXHAUSTED = 200_000
"""So many problems drawn in a row that are seen or of another split: there are no more."""


@dataclass(frozen=True)
class Problem:
    """A question, a worked solution, and what an answer is judged by."""

    id: str
    question: str
    solution: str
    answer: str
    level: int
    template: str
    form: str
    """What is computed, whatever the words: problems with the same form are one problem.

    Two word problems have one form where their answers are the same expression of the same numbers, up to the laws of
    algebra: which summand or factor comes first, in which order things happen, and how a sum is multiplied do not
    count. To double a number is one thing, to add it twice another. Two programs have one form where they give the
    same results for :data:`ptl_rl.testbed.programs.PROBES`.
    """


def split_of(form: str) -> str:
    """The one split that a problem's form belongs to, by its hash."""
    bucket = hash_of(form) % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def hash_of(text: str) -> int:
    """64 bits that depend on the text alone, on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def id_of(prefix: str, question: str) -> str:
    """A name that only depends on the question."""
    return f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:16]}"


Draw = Callable[[random.Random, int], Problem | None]
"""Makes a problem of a level, or none of what it drew."""


def distinct(draw: Draw, split: str, seed: int, levels: Collection[int] = EASY) -> Iterator[Problem]:
    """Endless stream of problems of one split, no two of one form.

    Args:
        draw: makes one.
        split: one of :data:`SPLITS`; the splits share no form, whatever the seeds.
        seed: the same seed gives the same stream.
        levels: of :data:`LEVELS`. Each is drawn as often; those that are harder to draw well come less often.

    Raises:
        ValueError: for an unknown split or level, or where no more problems are found.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if not levels or not set(levels) <= set(LEVELS):
        raise ValueError(f"unknown level among {sorted(levels)}; there are {', '.join(map(str, LEVELS))}")
    rng, chosen = random.Random(f"{split}-{seed}"), sorted(set(levels))
    seen: set[str] = set()
    in_vain = 0
    while in_vain < EXHAUSTED:
        problem = draw(rng, rng.choice(chosen))
        if problem is None or problem.form in seen or split_of(problem.form) != split:
            in_vain += 1
            continue
        in_vain = 0
        seen.add(problem.form)
        yield problem
    raise ValueError(f"the split {split!r} has no more than {len(seen)} problems of levels {chosen}; ask for fewer")
