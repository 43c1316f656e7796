"""The one schema that every corpus is brought into, and how two records are told to be the same."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ptl_rl.errors import UserError

Progress = Callable[[str, int, int], None]
"""Told what is being read, how much of it is done and how much there is in all, in whatever unit."""


def no_progress(what: str, done: int, total: int) -> None:
    """For callers that show none."""


class DataError(UserError, ValueError):
    """Data that a run cannot use; the message names file, line and remedy."""


class RowError(UserError, ValueError):
    """What is wrong with one row; whoever reads it knows where it stands."""


def plain_text(value: Any, where: str) -> str:
    """A row's text or number as stripped text; ``where`` it stands, for errors.

    Raises:
        RowError: it is neither (the ``repr`` of a list, of true or of NaN is no answer), or empty, or no Unicode.
    """
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    is_finite = is_number and (isinstance(value, int) or math.isfinite(value))
    if not isinstance(value, str) and not is_finite:
        kinds = {list: "a list", dict: "a mapping", bool: "true or false", type(None): "null"}
        kind = str(value) if is_number else kinds.get(type(value), type(value).__name__)
        raise RowError(f"{where} holds {kind}, not text or a number")
    text = str(value).strip()
    if not text:
        raise RowError(f"{where} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{where} holds half of a surrogate pair, which is no character") from None
    return text


def asked(messages: Any) -> str | None:
    """What is asked in a chat of one message, by the user; None for any other value."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        return None
    content = messages[0].get("content")
    return content if messages[0].get("role") == "user" and isinstance(content, str) else None


@dataclass(frozen=True)
class Record:
    """One problem: ``solution`` is the chain of thought, ``answer`` what the boxed result must equal.

    Plain text stands in ``solution``, and the others are empty.
    """

    question: str
    solution: str
    answer: str
    source: str
    id: str

    def reward_sample(self) -> dict[str, Any]:
        """Arguments of a reward function for the reference solution as the response."""
        return {
            "data_source": self.source,
            "solution_str": self.solution,
            "ground_truth": self.answer,
            "extra_info": {"index": 0, "id": self.id},
        }


def content_id(question: str, solution: str) -> str:
    """Stands for the id of a record that has none."""
    return hashlib.sha256((question or solution).encode()).hexdigest()[:16]


def _hash(text: str) -> int:
    normalised = " ".join(text.split()).casefold()
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "little")


def question_key(question: str, solution: str) -> int:
    """64 bits that two records share whose questions (texts, without one) differ in case and white space at most.

    Among ten million records the chance that two others share them is one in 400 000.
    """
    return _hash(question or solution)


def content_key(question: str, solution: str) -> int:
    """The same for question and solution together."""
    return _hash(f"{question}\n\0{solution}")
