"""Rows of an evaluation set, of the hub or of a local file, as the documents that its task's prompt is made of.

A document is what lm-eval's own copy of the task calls one; local files may hold the hub's columns or this project's
(``question, solution, answer``). Rows keep their order: the first ones are the same whatever reads them.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ptl_rl.config import SourceConfig
from ptl_rl.config.data import TESTBED
from ptl_rl.data.records import DataError, RowError, plain_text
from ptl_rl.data.sources import open_source

Document = dict[str, Any]
ToDocument = Callable[[dict[str, Any]], Document | None]
"""None: the row is no question of this task. Raises :class:`RowError`."""


@dataclass(frozen=True)
class Documents:
    """Questions of one task, in the order of their source."""

    documents: list[Document]
    fingerprint: str
    left_out: int
    """Rows that are no question of the task, as they stand in its prompt."""


def read_documents(sources: Sequence[SourceConfig], to_document: ToDocument, limit: int | None) -> Documents:
    """The first ``limit`` documents of the sources, taken from them in turns; all of them without a limit.

    Raises:
        DataError: a source that cannot be had, or a row that is no question; names file, line and remedy.
    """
    parts = [_of_source(source, to_document, limit) for source in sources]
    turns = itertools.zip_longest(*(part.documents for part in parts))
    documents = [document for turn in turns for document in turn if document is not None][:limit]
    fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Documents(documents, fingerprint, sum(part.left_out for part in parts))


def _of_source(source: SourceConfig, to_document: ToDocument, limit: int | None) -> Documents:
    if source.path.startswith(TESTBED):
        return _of_testbed(source, to_document, limit)
    import pyarrow

    opened = open_source(source, all_columns=True)
    found: list[Document] = []
    left_out = 0
    try:
        for number, row in opened.rows(lambda done, total: None):
            if limit is not None and len(found) == limit:
                break
            document = _document(row, to_document, opened.where.format(number))
            if document is None:
                left_out += 1
            else:
                found.append(document)
    except pyarrow.ArrowException as error:
        raise DataError(f"{source.path}: cannot be read: {error}") from None
    if not found:
        raise DataError(f"{source.path}: no questions" + (f" but {left_out} of the prompt's own" if left_out else ""))
    return Documents(found, opened.fingerprint, left_out)


def _document(row: Any, to_document: ToDocument, where: str) -> Document | None:
    try:
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, dict):
            raise RowError(f"not an object but {type(row).__name__}")
        return to_document(row)
    except RowError as error:
        raise DataError(f"{where}: {error}") from None


def _of_testbed(source: SourceConfig, to_document: ToDocument, limit: int | None) -> Documents:
    from ptl_rl.data.corpora import load_corpus

    corpus = load_corpus(source if limit is None else source.model_copy(update={"rows": limit}), seed=0)
    rows = [{"question": r.question, "solution": r.solution, "answer": r.answer} for r in corpus]
    documents = [document for row in rows if (document := to_document(row)) is not None]
    return Documents(documents, f"{source.path}[{len(documents)}]", len(rows) - len(documents))


def column(row: dict[str, Any], *names: str) -> str:
    """The first of the columns that the row has, as text.

    Raises:
        RowError: it has none of them, or one that is empty or neither text nor a number.
    """
    for name in names:
        if (value := row.get(name)) is not None:
            return plain_text(value, f"column {name!r}")
    raise RowError(f"no column {' or '.join(map(repr, names))}; the row has {', '.join(map(str, row)) or 'none'}")


def gsm8k_document(row: dict[str, Any]) -> Document:
    """``question``, and ``answer``: the worked solution, ``####`` and the result."""
    question, answer = column(row, "question"), column(row, "answer")
    if "####" not in answer:
        answer = f"{column(row, 'solution')}\n#### {answer}"
    return {"question": question, "answer": answer}


def math_document(row: dict[str, Any]) -> Document:
    """``problem``, ``solution`` (with its result in a box) and ``answer``."""
    from reward.accuracy import extract_boxed

    solution = column(row, "solution")
    answer = extract_boxed(solution)
    if not answer:
        raise RowError("column 'solution' has no result in \\boxed{}, which this task compares with")
    return {"problem": column(row, "problem", "question"), "solution": solution, "answer": answer}


def question_document(row: dict[str, Any]) -> Document:
    """``question`` and ``answer``."""
    return {"question": column(row, "question", "problem"), "answer": column(row, "answer")}


def mbpp_document(row: dict[str, Any]) -> Document:
    """``text``, ``code``, ``test_list`` and ``tests``, what :func:`reward.programs.reward.passes` takes."""
    from reward.mbpp import mbpp_row

    try:
        tests = mbpp_row(row)["answer"]
    except ValueError as error:
        raise RowError(str(error)) from None
    shown = [str(test) for test in row["test_list"]]
    if len(shown) < 3:
        raise RowError(f"test_list has {len(shown)} tests, and the prompt shows 3")
    return {
        "task_id": str(row.get("task_id", "")),
        "text": column(row, "text", "prompt"),
        "code": column(row, "code"),
        "test_list": shown,
        "tests": tests,
    }
