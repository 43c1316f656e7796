"""Which column of a file is the question, the worked solution and the answer: told by their names and the first rows.

``ptl init`` writes it down in the recipe. Where two columns could be meant nothing is guessed, and the user is asked.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.data.known import VERL, known_layout
from ptl_rl.data.records import DataError, asked
from ptl_rl.data.sources import open_source

TESTBED = "testbed:"
FIRST_ROWS = 200
MOSTLY = 0.5
"""Share of the first rows from which on a column counts as filled, or a mark as the corpus's habit."""
BARE_ANSWER_CHARACTERS = 80
"""A longer mean of the only column that answers is that of worked solutions."""
QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input", "task")
SOLUTIONS = (
    *(
        "solution",
        "response",
        "output",
        "completion",
        "rationale",
        "reasoning",
        "chain_of_thought",
        "cot",
        "explanation",
    ),
    *("generation", "generated_solution", "worked_solution", "code"),
)
ANSWERS = (
    *("answer", "final_answer", "ground_truth", "expected_answer", "reference_answer", "correct_answer", "gold"),
    *("target", "label", "result", "short_answer"),
)
TEXTS = ("text", "content", "body", "document", "passage")
GSM8K, NUMINA, METAMATH = "openai/gsm8k", "AI-MO/NuminaMath-CoT", "meta-math/MetaMathQA"
OPENCODER, MBPP = "OpenCoder-LLM/opc-sft-stage2", "google-research-datasets/mbpp"
EXAMPLE = "{question: COLUMN, solution: COLUMN, answer: COLUMN}"


class ColumnError(DataError):
    """Columns that cannot be told apart; the message shows the ``fields`` that would say which is which."""


@dataclass(frozen=True)
class Reading:
    """How a source is to be read."""

    source: SourceConfig
    """With ``fields`` or ``layout`` where it needs them."""
    noticed: str = ""
    """What was noticed, for a comment; empty where nothing is worth a word."""
    columns: tuple[str, ...] = ()
    """That the first rows have; empty of a source that is known by its name."""


@dataclass
class _Rows:
    """The first rows, by column."""

    path: str
    count: int = 0
    texts: dict[str, list[str]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    nested: set[str] = field(default_factory=set)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.texts, *self.numbers, *sorted(self.nested))))

    def add(self, row: dict[str, Any]) -> None:
        self.count += 1
        for name, value in row.items():
            value = value if (text := asked(value)) is None else text
            if isinstance(value, str):
                self.texts.setdefault(str(name), [])
                if value.strip():
                    self.texts[str(name)].append(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                self.numbers[str(name)] = self.numbers.get(str(name), 0) + 1
            elif isinstance(value, list | dict):
                self.nested.add(str(name))

    def filled(self, *, numbers: bool = False) -> list[str]:
        """Columns that mostly hold text, or with ``numbers`` text or a number."""
        held = {name: len(texts) for name, texts in self.texts.items()}
        if numbers:
            held = {name: held.get(name, 0) + self.numbers.get(name, 0) for name in (*self.texts, *self.numbers)}
        return [name for name, count in held.items() if count >= MOSTLY * self.count]

    def mostly(self, column: str, test: Callable[[str], Any]) -> bool:
        texts = self.texts.get(column, [])
        return bool(texts) and sum(bool(test(text)) for text in texts) >= MOSTLY * len(texts)

    def mean_length(self, column: str) -> float:
        texts = self.texts.get(column, [])
        return sum(map(len, texts)) / len(texts) if texts else 0.0

    def refusal(self, problem: str, example: str = EXAMPLE) -> ColumnError:
        nested = f" ({', '.join(sorted(self.nested))} hold lists or mappings, not text)" if self.nested else ""
        return ColumnError(
            f"{self.path}: {problem}; the columns are {', '.join(self.columns)}{nested}. Say which is which with "
            f"`fields`: {example}"
        )


def _plain(name: str) -> str:
    """``Final Answer``, ``finalAnswer`` and ``final_answer`` are the same name."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _called(names: tuple[str, ...], columns: list[str]) -> list[str]:
    """Columns with one of ``names``; the first of these, which is the usual one, alone where it is there."""
    if names[0] in columns:
        return [names[0]]
    wanted = {_plain(name) for name in names}
    return [column for column in columns if _plain(column) in wanted]


def _one(rows: _Rows, part: str, found: list[str]) -> str | None:
    if len(found) > 1:
        raise rows.refusal(f"{' and '.join(found)} could each be the {part}")
    return found[0] if found else None


def first_rows(source: SourceConfig) -> _Rows:
    """The well-formed ones among the first; raises :class:`DataError` where there are none."""
    import pyarrow

    opened = open_source(source, all_columns=True)
    rows = _Rows(source.path)
    try:
        for _, row in itertools.islice(opened.rows(lambda done, total: None), FIRST_ROWS):
            if isinstance(row, dict):
                rows.add(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.path}: cannot be read, or is not what its name says: {error}") from None
    if not rows.columns:
        raise DataError(f"{source.path}: no rows that are JSON objects with columns among the first {FIRST_ROWS}")
    return rows


def read_columns(path: str, fields: FieldMap | None = None) -> Reading:
    """How the rows of ``path`` are to be read.

    Args:
        fields: what the user says; only checked against the columns.

    Raises:
        ColumnError: a column cannot be told.
        DataError: the source cannot be read.
    """
    source = SourceConfig(path=path, fields=fields)
    if path.startswith(TESTBED) or (fields is None and known_layout(source) is not None):
        return Reading(source)
    rows = first_rows(source)
    if fields is not None:
        read = (fields.question, fields.solution, fields.answer) if fields.text is None else (fields.text,)
        missing = [name for name in read if name is not None and name not in rows.columns]
        if missing:
            raise rows.refusal(f"there is no column {' or '.join(map(repr, missing))}")
        return Reading(source, columns=rows.columns)
    layout, why = _known_by_its_habits(rows)
    if layout is not None:
        return Reading(SourceConfig(path=path, layout=layout), why, rows.columns)
    found, why = _by_name(rows)
    return Reading(SourceConfig(path=path, fields=None if found == FieldMap() else found), why, rows.columns)


def _known_by_its_habits(rows: _Rows) -> tuple[str | None, str]:
    """The known corpus that the rows are written as, and by what that shows."""
    columns = set(rows.columns)
    answered = bool(_called(ANSWERS, rows.filled(numbers=True)))
    if columns >= {"prompt", "reward_model"} and "reward_model" in rows.nested:
        return (
            VERL,
            "rows as verl reads them: the answer is reward_model.ground_truth",
        )
    if columns >= {"text", "code", "test_list"}:
        return MBPP, "problems with unit tests, as MBPP has them"
    if columns >= {"instruction", "code", "output"} and not answered:
        return OPENCODER, "instructions and programs, as OpenCoder has them"
    if columns >= {"question", "answer"} and "solution" not in columns and rows.mostly("answer", lambda t: "####" in t):
        return GSM8K, "the answer stands behind #### in the worked solution, as in GSM8K"
    if columns >= {"problem", "solution"} and not answered and rows.mostly("solution", lambda t: "\\boxed" in t):
        return NUMINA, "the answer stands in the solution's \\boxed{}, as in NuminaMath"
    if columns >= {"query", "response"} and not answered and rows.mostly("response", lambda t: "The answer is:" in t):
        return METAMATH, 'the answer stands behind "The answer is:", as in MetaMathQA'
    return None, ""


def _by_name(rows: _Rows) -> tuple[FieldMap, str]:
    """Fields by the names of the columns, and what is worth knowing of them."""
    filled = rows.filled()
    question = _one(rows, "question", _called(QUESTIONS, filled))
    if question is None:
        return _plain_text(rows, filled), ""
    others = [name for name in filled if name != question]
    solution = _one(rows, "worked solution", _called(SOLUTIONS, others))
    answers = _called(ANSWERS, [name for name in rows.filled(numbers=True) if name not in (question, solution)])
    if solution is None and answers == ["answer"]:  # perhaps the worked solution, beside a column of short answers
        short = _called(ANSWERS[1:], [name for name in rows.filled(numbers=True) if name != "answer"])
        if short and rows.mean_length("answer") > BARE_ANSWER_CHARACTERS:
            solution, answers = "answer", short
    answer = _one(rows, "answer", answers)
    if solution is None and answer is None:
        raise rows.refusal(f"{question} is the question, but no column is named as its solution or answer are")
    if solution is not None:
        return FieldMap(question=question, solution=solution, answer=answer), ""
    assert answer is not None
    if rows.mean_length(answer) > BARE_ANSWER_CHARACTERS:
        return FieldMap(question=question, solution=answer, answer=None), f"{answer} holds long texts: solutions"
    return (
        FieldMap(question=question, solution=answer, answer=answer),
        "there are no worked solutions, so scoring reads questions with bare answers",
    )


def _plain_text(rows: _Rows, filled: list[str]) -> FieldMap:
    """Of rows without a question: their only text, or the one that is named as such."""
    found = _called(TEXTS, filled)
    if not found and len(filled) == 1:
        found = filled
    if not found:
        raise rows.refusal(
            "no column is named as a question or a text is", f"{EXAMPLE}, or of plain text {{text: COLUMN}}"
        )
    return FieldMap(text=_one(rows, "text", found))
