"""Accuracy: what counts as the same answer, in whatever thread the question comes."""

import threading
import time
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import accuracy
from reward.accuracy import accuracy_reward


@pytest.fixture
def no_judge(monkeypatch):
    """The fast path must decide alone."""
    accuracy._is_equal.cache_clear()
    monkeypatch.setattr(accuracy, "default_pool", lambda: pytest.fail("asked math-verify"))


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        ("42", "42", 1.0),
        ("42.", "42", 1.0),
        ("$42$", "42", 1.0),
        ("+042", "42", 1.0),
        ("-0", "0", 1.0),
        ("1,234", "1234", 1.0),
        (r"10\,000", "10{,}000", 1.0),
        ("9" * 5000, "9" * 5000, 1.0),
        ("43", "42", 0.0),
        ("-42", "42", 0.0),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", 1.0),
        (r"\left( 1, 2 \right)", "(1,2)", 1.0),
        (r"\text{Tuesday}", "Tuesday", 1.0),
        ("", "42", 0.0),
        (r"\!", "42", 0.0),
        ("x" * 2000, "42", 0.0),
    ],
)
def test_plain_answers_need_no_math_verify(no_judge, answer, gold, reward):
    assert accuracy_reward(f"so \\boxed{{{answer}}}", gold) == reward


@pytest.mark.parametrize("response", ["42", "The answer is 42.", "$42$", r"\boxed{42", r"\boxed{4} \boxed{41}"])
def test_only_the_last_box_counts(no_judge, response):
    assert accuracy_reward(response, "42") == 0.0


def test_a_truncated_last_box_leaves_the_one_before(no_judge):
    assert accuracy_reward(r"\boxed{42}, or better \boxed{4", "42") == 1.0


@given(st.integers())
def test_an_integer_equals_itself_and_not_its_successor(number):
    assert accuracy_reward(f"\\boxed{{{number}}}", number) == 1.0
    assert accuracy_reward(f"\\boxed{{{number:,}}}", str(number)) == 1.0
    assert accuracy_reward(f"\\boxed{{{number + 1}}}", str(number)) == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "reward"),
    [
        (r"\frac12", "0.5", 1.0),
        ("3/4", "0.75", 1.0),
        (r"5 \text{ cm}", "5", 1.0),
        ("5", r"5\text{ cm}", 1.0),
        (r"50\%", "50", 1.0),
        ("50", r"50\%", 1.0),
        ("0.5", "50%", 1.0),
        (r"40\%", r"50\%", 0.0),
        (r"\$18.90", "18.9", 1.0),
        ("[1, 2)", r"\left[1,2\right)", 1.0),
        ("[1,2]", "[1,2)", 0.0),
        (r"\{3,2,1\}", r"\{1,2,3\}", 1.0),
        ("(2,1)", "(1,2)", 0.0),
        ("(1.0, 2.0)", "(1,2)", 1.0),
        ("A", r"\text{(A)}", 1.0),
        ("B", r"\text{(A)}", 0.0),
        ("(x+1)^2", "x^2+2x+1", 1.0),
        (r"2\sqrt2", r"\sqrt{8}", 1.0),
        ("x=5", "5", 1.0),
        (r"90^\circ", "90", 1.0),
        ("1 2", "12", 0.0),
        ("about 5 or 6", "6", 0.0),
        ("4, 5, 6", "5", 0.0),
        ("\ud800 \u2028 é", "5", 0.0),
    ],
)
def test_math_verify_decides_the_rest(answer, gold, reward):
    assert accuracy_reward(f"so \\boxed{{{answer}}}", gold) == reward


def test_works_in_many_threads_at_once():
    rewards: dict[int, float] = {}

    def ask(number: int) -> None:
        # Even numbers are answered right; each thread must get its own verdict.
        answer = number if number % 2 == 0 else number + 1
        rewards[number] = accuracy_reward(rf"\boxed{{\frac{{{2 * answer}}}{{2}}}}", str(number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {number: float(number % 2 == 0) for number in range(16)}


def test_repeated_answers_are_judged_once(monkeypatch):
    class Counting:
        asked: ClassVar[list[tuple[str, str]]] = []

        def judge(self, gold, answer):
            self.asked.append((gold, answer))
            return "timeout"

    monkeypatch.setattr(accuracy, "default_pool", Counting)
    accuracy._is_equal.cache_clear()
    assert [accuracy_reward(r"\boxed{9^{9^9}}", "7/2") for _ in range(8)] == [0.0] * 8
    accuracy._is_equal.cache_clear()
    assert Counting.asked == [("7/2", "9^{9^9}")]


def test_normalising_long_runs_of_space_is_linear():
    start = time.process_time()
    accuracy_reward("\\boxed{a" + " " * 500_000 + "b}", "a" + " " * 500_000 + "b")
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("gold", ["", "  "])
def test_an_empty_ground_truth_is_an_error_of_the_data(gold):
    with pytest.raises(ValueError, match="ground truth is empty"):
        accuracy_reward(r"\boxed{1}", gold)
