"""What the test bed's generators share: a problem, the splits, and the stream of distinct ones."""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPLITS = {"pretrain": (0, 80), "rl": (80, 92), "validation": (92, 95), "test": (95, 100)}
"""Split name to its range of hash buckets (percent): a question belongs to one split whatever seed made it."""
LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Problem:
    """A question, a worked solution, and what an answer is judged by."""

    id: str
    question: str
    solution: str
    answer: str
    level: int
    template: str


def split_of(question: str) -> str:
    """The one split that a question belongs to, by hash of its text."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def id_of(prefix: str, question: str) -> str:
    """A name that only depends on the question."""
    return f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:16]}"


def distinct(draw: Callable[[random.Random], Problem | None], split: str, seed: int) -> Iterator[Problem]:
    """Endless stream of distinct problems of one split.

    Args:
        draw: makes one, or none from what it drew.
        split: one of :data:`SPLITS`; the splits share no question, whatever the seeds.
        seed: the same seed gives the same stream.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    while True:
        problem = draw(rng)
        if problem is None or problem.question in seen or split_of(problem.question) != split:
            continue
        seen.add(problem.question)
        yield problem
