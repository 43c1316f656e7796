import itertools
import math

import pytest

from ptl_rl.evaluation.intervals import accuracy_interval, paired


def test_interval_of_many_results_is_that_of_the_normal_approximation():
    correct = [1.0] * 300 + [0.0] * 100
    low, high = accuracy_interval(correct)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.006)
    assert high == pytest.approx(0.75 + half, abs=0.006)
    assert accuracy_interval(correct) == (low, high)


def test_results_that_are_all_alike_give_a_point():
    assert accuracy_interval([1.0] * 20) == (1.0, 1.0)
    assert accuracy_interval([0.0]) == (0.0, 0.0)


def test_paired_test_of_few_problems_is_exact():
    first, second = [1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 0, 1]
    found = paired(first, second)
    # Of the 2^5 ways in which five differences may be signed, two are as one-sided as these.
    signs = list(itertools.product((-1, 1), repeat=5))
    expected = sum(abs(sum(sign)) == 5 for sign in signs) / len(signs)
    assert found.p_value == pytest.approx(expected)
    assert (found.gained, found.lost) == (0, 5)
    assert found.difference == pytest.approx(-5 / 8)
    assert found.low < found.difference < found.high


def test_equal_models_do_not_differ_and_different_lengths_are_refused():
    assert paired([1, 0, 1], [1, 0, 1]).p_value == 1.0
    with pytest.raises(ValueError, match="3 and 2 results"):
        paired([1, 0, 1], [1, 0])


def test_a_small_difference_among_many_problems_is_found_and_noise_is_not():
    first = [1.0, 0.0] * 500
    better = [1.0 if index % 25 == 1 else value for index, value in enumerate(first)]
    assert paired(first, better).p_value < 0.001
    mixed = [1 - value if index % 10 in (2, 3) else value for index, value in enumerate(first)]
    assert paired(first, mixed).p_value > 0.5
