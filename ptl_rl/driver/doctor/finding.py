"""What a check of ``ptl doctor`` says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """``problem``: it would stop a run (of the recipe, if there is one); ``warning``: it may, or costs something."""

    topic: str
    level: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""


def ok(topic: str, text: str) -> Finding:
    return Finding(topic, "ok", text)


def warning(topic: str, text: str, remedy: str = "") -> Finding:
    return Finding(topic, "warning", text, remedy)


def problem(topic: str, text: str, remedy: str = "") -> Finding:
    return Finding(topic, "problem", text, remedy)


def of_error(topic: str, error: Exception) -> Finding:
    """Of a refusal, which names its remedy itself."""
    return Finding(topic, "problem", str(error))
