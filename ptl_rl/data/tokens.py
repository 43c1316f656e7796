"""How many tokens a corpus has for a model: estimated from a sample, or counted."""

from dataclasses import dataclass
from typing import Any

from ptl_rl.config import ModelConfig
from ptl_rl.data.corpora import Corpus
from ptl_rl.data.records import Progress, no_progress
from ptl_rl.errors import expanded
from ptl_rl.testbed import shipped_checkpoint

SAMPLE = 2000
BATCH = 256


@dataclass(frozen=True)
class Tokens:
    """Of a whole corpus, without what the chat template adds."""

    questions: int
    solutions: int
    counted: int
    """Records that were read for it."""
    estimate: bool


def local_tokenizer(model: ModelConfig) -> Any | None:
    """The model's tokenizer if it is on this machine; nothing is downloaded."""
    from transformers import AutoTokenizer

    try:
        folder = shipped_checkpoint(model.path) or expanded(model.path)
        tokenizer = AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else model.path,
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
        )
        return tokenizer if _lengths(tokenizer, ["1 + 1 = 2"]) else None  # of a config.json alone: one without a word
    except Exception:  # of many kinds, and each means that there is none to be had here
        return None


def _lengths(tokenizer: Any, texts: list[str]) -> int:
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0


def count_tokens(
    tokenizer: Any, corpus: Corpus, suffix: str, name: str, *, exact: bool = False, progress: Progress = no_progress
) -> Tokens:
    """Tokens of questions, ``suffix`` included, and of solutions.

    Args:
        exact: read every record, not :data:`SAMPLE` of them.
    """
    import numpy

    total = len(corpus)
    counted = total if exact else min(total, SAMPLE)
    sample = corpus.at(numpy.linspace(0, total - 1, counted).round().astype(numpy.int64)) if total else corpus
    questions = solutions = 0
    for start in range(0, counted, BATCH):
        records = list(sample[start : start + BATCH])
        questions += _lengths(tokenizer, [record.question + suffix for record in records if record.question])
        solutions += _lengths(tokenizer, [record.solution for record in records])
        progress(f"counting tokens of {name}", min(start + BATCH, counted), counted)
    scale = total / counted if counted else 0.0
    return Tokens(round(questions * scale), round(solutions * scale), counted, estimate=counted < total)
