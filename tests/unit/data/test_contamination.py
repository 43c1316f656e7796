"""Planted copies of evaluation questions are found however they are dressed up; what is merely alike stays."""

import pyarrow
import pytest

from ptl_rl.config import DecontaminateConfig
from ptl_rl.data.contamination import Evaluation, NgramIndex, Question, whole_key, word_hits, words
from ptl_rl.data.records import Record, question_key
from ptl_rl.data.store import store_of

LONG = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May?"
)
OTHER = (
    "A regular hexagon and a regular pentagon share the side $\\overline{AD}$, as shown; what is the degree measure of "
    "the angle $BAC$ between them?"
)
SHORT = "Compute $\\sin 60^\\circ + 2$."


def hits(rows: list[tuple[str, str]], questions=(OTHER, LONG, SHORT), **settings) -> dict[int, int]:
    """Row to question, by place."""
    records = [Record(question, solution, "", "s", str(i)) for i, (question, solution) in enumerate(rows)]
    asked = [Question(f"data.test {i}", text, question_key(text, ""), False) for i, text in enumerate(questions)]
    found = word_hits(store_of(records, "memory"), Evaluation(asked), DecontaminateConfig(**settings))
    assert ((found.shares > 0) & (found.shares <= 1)).all()
    return dict(zip(found.rows.tolist(), found.questions.tolist(), strict=True))


DRESSED = [
    LONG,
    LONG.upper(),
    "  ".join(LONG.split()).replace(". ", ".\n\n"),
    LONG.replace(",", "").replace(".", ";").replace("?", "!!"),
    LONG.replace(" ", "\u00a0"),
    LONG.replace("clips", "\uff43\uff4c\uff49\uff50\uff53"),  # full-width letters
    "**Problem 7.** " + LONG + " (Answer with a number.)",
    " ".join(LONG.split()[:24]),  # a part of it
]


@pytest.mark.parametrize("text", DRESSED)
@pytest.mark.parametrize("place", ["question", "solution", "text"])
def test_planted_copies_are_found(text, place):
    filler = (
        "Once upon a time there was something else entirely, and nobody counted any clips at all in those days. " * 9
    )
    planted = {
        "question": (text, "72"),
        "solution": ("Read this.", filler + text + filler),
        "text": ("", filler + text),
    }
    rows = [("What is the first question here?", filler), planted[place], ("And what is the last one?", filler)]
    assert hits(rows) == {1: 1}


ALIKE = [
    "Natalia sold clips to 50 of her friends in June, and then she sold half as many clips in July. How many clips?",
    "How many clips did Natalia sell in April and May?",  # a part that is shorter than 13 words
    "And then she sold half as many clips in May.",
    "Natalia sells shells to her friends in April, then half as many in May; how many shells are sold altogether?",
]


@pytest.mark.parametrize("text", ALIKE)
def test_what_is_alike_stays(text):
    assert hits([(text, "And so on. " * 20)]) == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (SHORT, True),
        ("compute \\sin 60^\\circ  + 2", True),
        ("COMPUTE: $\\sin{60}^{\\circ}+2$!", True),
        ("Compute $\\sin 60^\\circ - 2$.", False),
        ("Compute $\\sin 6.0^\\circ + 2$.", False),
        ("Compute $\\sin 60^\\circ + 20$.", False),
        ("Compute $\\cos 60^\\circ + 2$.", False),
        ("Compute $\\sin 60^\\circ + 2$. Then compute $\\cos 60^\\circ$.", False),
    ],
)
def test_short_questions_are_compared_whole(text, found):
    assert hits([("Something", "else"), (text, "s")]) == ({1: 2} if found else {})
    assert hits([("", text)]) == ({0: 2} if found else {})  # plain text


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("What is 3.5?", "what is 3.5", True),
        ("What is 3.5?", "What is 35?", False),
        ("Is x-y positive?", "Is xy positive?", False),
        ("A well-known fact", "A well known fact.", True),
        ("Tom's age", "Tom’s age", True),
        ("What is 5!?", "What is 5?", False),
        ("(2+3)*4", "2+(3*4)", False),
        ("2 < 3", "2 > 3", False),
    ],
)
def test_what_is_the_same_whole(left, right, same):
    assert (whole_key(left) == whole_key(right)) == same


def test_the_least_overlap():
    half = " ".join(LONG.split()[:20])
    assert hits([(half, "")], min_overlap=0.3) == {0: 1} and hits([(half, "")], min_overlap=0.9) == {}
    thirteen = " ".join(LONG.split()[:13])
    assert hits([(thirteen, "")], min_overlap=0) == {0: 1} and hits([(thirteen, "")], min_overlap=0.2) == {}
    assert hits([(thirteen, "")], ngram=14, min_overlap=0) == {}
    assert hits([(ALIKE[2], "")], ngram=5, min_overlap=0) == {0: 1}
    repeated = (thirteen + " . ") * 30  # the same run of words counts once
    assert hits([("", repeated)], min_overlap=0.9) == {}


def test_runs_do_not_cross_from_row_to_row():
    split = LONG.split()
    assert hits([("", " ".join(split[:12])), ("", " ".join(split[12:23]))], min_overlap=0) == {}


def test_the_question_that_overlaps_most_is_named():
    mostly = LONG.replace("April", "March")
    assert hits([(LONG, "")], questions=(mostly, LONG)) == {0: 1}
    assert hits([(LONG, "")], questions=(LONG, mostly)) == {0: 0}


def test_rows_are_counted_through_all_batches():
    rows = [(f"Nothing {i}", "of note") for i in range(5000)]
    rows[4321] = (LONG, "72")
    rows[17] = (SHORT, "")
    assert hits(rows) == {4321: 1, 17: 2}


def test_nothing_to_compare():
    assert hits([("a", "b")], questions=()) == {}
    assert hits([("???", "!!!")], questions=("...", "$$")) == {}


def test_words():
    texts = pyarrow.array(["It's  $x_1^2$—NOT Straße!", "", "中文 題"])
    assert words(texts).to_pylist() == [["it", "s", "x", "1", "2", "not", "straße"], [""], ["中文", "題"]]
    index = NgramIndex([Question("a", "x y z x y z", 0, False)], 3)
    assert index.sizes.tolist() == [3]


def test_what_many_questions_share_is_a_template():
    """As in MBPP: the question's own words are few, and what surrounds them is the same in all."""
    asked = "Write a function to find {}. The program has to pass these tests: assert {}({}) == True. Answer with the "
    asked += "whole program in one block that starts with python and ends with three backticks."
    names = ["max", "min", "sum", "mean", "mode"]
    questions = [asked.format(f"the {name} of a list", name, i) for i, name in enumerate(names)]
    other = asked.format("whether a number is odd", "odd", 9)
    assert hits([(other, "")], questions) != {}  # five may share by chance: copies of one another
    questions.append(asked.format("the length of a list", "length", 7))
    assert hits([(other, ""), (questions[2], ""), ("", "See: " + questions[5])], questions) == {1: 2, 2: 5}
    # Six copies of one question are no template, and a question of template words alone is compared whole.
    assert hits([(LONG, "")], [LONG] * 6) == {0: 0}
    bare = asked.split(". ", 2)[2]
    assert hits([(bare, ""), (other, "")], [*questions, bare]) == {0: 6}
