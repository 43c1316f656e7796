"""The judge agrees with a table of answers, each judged in both directions, but for the exceptions that it lists."""

import json
from pathlib import Path

import pytest

from reward.accuracy import answers_equal

ROWS = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text("utf-8").splitlines()]
KINDS = list(dict.fromkeys(row["kind"] for row in ROWS))


def test_the_table_is_large_and_an_exception_has_its_reason():
    assert len({(row["answer"], row["gold"]) for row in ROWS}) == len(ROWS) >= 150
    assert all(row["why"] and row["judged"] != row["equal"] for row in ROWS if "judged" in row)
    assert sum("judged" in row for row in ROWS) <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_agrees_with_the_table(kind):
    wrong = []
    for row in ROWS:
        if row["kind"] == kind:
            expected = row.get("judged", row["equal"])
            pairs = [(row["answer"], row["gold"]), (row["gold"], row["answer"])]
            wrong += [pair for pair in pairs if answers_equal(*pair) != expected]
    assert wrong == []


@pytest.mark.canary
def test_math_verify_still_calls_tiny_values_equal():
    from math_verify import parse, verify

    gold, answer = (parse(rf"$\frac{{1}}{{2^{{{power}}}}}$", parsing_timeout=None) for power in (98, 99))
    assert verify(gold, answer, timeout_seconds=None)
