"""How the rows of a corpus become records: by a field map, or, for corpora that everybody uses, by their name.

A known corpus's answer is taken out of its worked solution where it has no column of its own; a row without one keeps
an empty answer, and only those who need answers drop it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ptl_rl.config import FieldMap, SourceConfig
from ptl_rl.config.data import HUB
from ptl_rl.data.records import DataError, RowError, asked, plain_text


class Parts(NamedTuple):
    """A record's content."""

    question: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Layout:
    """Which columns a row has and what they mean."""

    name: str
    """Changes whenever :attr:`parts` does: prepared copies of the rows are kept under it."""
    columns: tuple[str, ...]
    parts: Callable[[dict[str, Any]], Parts]
    """Raises :class:`RowError` for a row that lacks something."""
    config: str | None = None
    split: str = "train"
    data_dir: str | None = None


def _text(row: dict[str, Any], column: str, part: str) -> str:
    if column not in row:
        raise RowError(
            f"no column {column!r} for the {part}; the row has {', '.join(map(str, row)) or 'none'} (set the fields of "
            "this source)"
        )
    return plain_text(row[column], f"column {column!r} ({part})")


def _question(row: dict[str, Any], column: str) -> str:
    """Of a text, or of a chat in which the user says one thing: the chat template says who speaks."""
    value = row.get(column)
    if isinstance(value, list) and (text := asked(value)) is None:
        who = [str(said.get("role")) if isinstance(said, dict) else type(said).__name__ for said in value[:4]]
        raise RowError(
            f"column {column!r} (question) is a list of {len(value)} ({', '.join(who)}); of chats only those are read "
            "in which the user alone says one text"
        )
    return _text({column: text} if isinstance(value, list) else row, column, "question")


def field_layout(fields: FieldMap, name: str = "", split: str = "train") -> Layout:
    """The layout that a field map describes."""
    if fields.text is not None:
        text = fields.text
        return _text_layout(name or f"text={text!r}", text)
    question, solution, answer = fields.question, fields.solution, fields.answer

    def parts(row: dict[str, Any]) -> Parts:
        found = _question(row, question), _text(row, solution, "solution")
        return Parts(*found, "" if answer is None else _text(row, answer, "answer"))

    columns = (question, solution) if answer is None else (question, solution, answer)
    return Layout(name or f"fields={question!r},{solution!r},{answer!r}", columns, parts, split=split)


def _text_layout(name: str, column: str, data_dir: str | None = None) -> Layout:
    return Layout(name, (column,), lambda row: Parts("", _text(row, column, "text"), ""), data_dir=data_dir)


def _numina(row: dict[str, Any]) -> Parts:
    from reward.accuracy import extract_boxed

    solution = _text(row, "solution", "solution")
    return Parts(_text(row, "problem", "question"), solution, extract_boxed(solution) or "")


def _metamath(row: dict[str, Any]) -> Parts:
    response = _text(row, "response", "solution")
    _, said, answer = response.rpartition("The answer is:")
    return Parts(_text(row, "query", "question"), response, answer.strip() if said else "")


def _gsm8k(row: dict[str, Any]) -> Parts:
    solution, answer = _before_answer(_text(row, "answer", "solution"))
    if not solution:
        raise RowError("column 'answer' (solution) is empty before ####")
    return Parts(_text(row, "question", "question"), solution, answer)


def _before_answer(text: str) -> tuple[str, str]:
    """A worked solution as GSM8K has it, and its answer."""
    solution, _, answer = text.partition("####")
    return re.sub(r"<<[^<>]*>>", "", solution).strip(), answer.strip()  # a calculator's notes, no model should write


def _verl(row: dict[str, Any]) -> Parts:
    """A row as verl's trainers read it; its worked solution is what its maker put into ``extra_info``, if anything."""
    rewarded, extra = row.get("reward_model"), row.get("extra_info")
    if not isinstance(rewarded, dict):
        raise RowError("column 'reward_model' is no mapping with the ground_truth")
    answer = _text(rewarded, "ground_truth", "answer, in reward_model")
    worked = [extra.get(name) for name in ("answer", "solution")] if isinstance(extra, dict) else []
    solution = next((text for text in worked if isinstance(text, str) and text.strip()), answer)
    solution, _ = _before_answer(plain_text(solution, "column 'extra_info' (solution)"))
    return Parts(_question(row, "prompt"), solution or answer, answer)


def _usual(row: dict[str, Any]) -> Parts:
    """By the usual names, or as verl's rows, which nothing else looks like."""
    is_verl = "question" not in row and "reward_model" in row and isinstance(row.get("prompt"), list)
    return _verl(row) if is_verl else _BY_NAME.parts(row)


def _opencoder(row: dict[str, Any]) -> Parts:
    column = "code" if str(row.get("code") or "").strip() else "output"
    return Parts(_text(row, "instruction", "question"), _text(row, column, "solution"), "")


def _mbpp(row: dict[str, Any]) -> Parts:
    from reward.mbpp import mbpp_row

    try:
        made = mbpp_row(row)
    except ValueError as error:
        raise RowError(str(error)) from None
    return Parts(made["question"], made["solution"], made["answer"])


VERL = "verl"
"""No corpus but a form: rows as verl's own scripts write them."""
_BY_NAME = field_layout(FieldMap())
_USUAL = Layout("usual", _BY_NAME.columns, _usual)
_MATH_500 = FieldMap(question="problem")
_MATH_12K = FieldMap(question="problem", solution="answer")  # the hub's copy has no worked solutions
KNOWN = {
    "AI-MO/NuminaMath-CoT": Layout("numina", ("problem", "solution"), _numina),
    "meta-math/MetaMathQA": Layout("metamath", ("query", "response"), _metamath),
    "hiyouga/math12k": field_layout(_MATH_12K, "math12k"),
    "openai/gsm8k": Layout("gsm8k", ("question", "answer"), _gsm8k, config="main"),
    "HuggingFaceH4/MATH-500": field_layout(_MATH_500, "math500", split="test"),
    "OpenCoder-LLM/opc-sft-stage2": Layout(
        "opencoder", ("instruction", "code", "output"), _opencoder, config="educational_instruct"
    ),
    "google-research-datasets/mbpp": Layout(
        "mbpp", ("text", "code", "test_list", "test_setup_code"), _mbpp, config="full"
    ),
    "bigcode/starcoderdata": _text_layout("starcoder", "content", data_dir="python"),
    VERL: Layout("verl", ("prompt", "reward_model", "extra_info"), _verl),
}
"""By their names on the hub."""


def known_layout(source: SourceConfig) -> Layout | None:
    """Of the known corpus that a source is, or is said to be a copy of.

    Raises:
        DataError: no corpus is known by the name that ``layout`` says.
    """
    if source.layout is not None and source.layout not in KNOWN:
        raise DataError(f"{source.path}: layout {source.layout!r} is no known corpus; there are {', '.join(KNOWN)}")
    return KNOWN.get(source.layout or source.path.removeprefix(HUB))


def layout_of(source: SourceConfig) -> Layout:
    """How a source's rows are read: by its ``fields``, else as the known corpus that it is, else by the usual names, or
    as verl's rows where they are such."""
    known = known_layout(source)
    if source.fields is None and known is not None:
        return known
    return _USUAL if source.fields is None else field_layout(source.fields)
