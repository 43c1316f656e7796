"""What is made of measured speeds; the measuring itself is in the end-to-end tests."""

import pytest

from ptl_rl.evaluation.speed import Load, Spread, _figures
from ptl_rl.families import read_shape
from ptl_rl.testbed import CHECKPOINT_DIR

LOADS = [Load("batch 1", 1, 8, 8)]


def test_ratios_are_taken_round_by_round():
    first = read_shape(CHECKPOINT_DIR)
    shapes = [first, first.sliced(channels=first.intermediate_size // 2)]
    found = {(0, "batch 1"): [100.0, 50.0, 80.0], (1, "batch 1"): [150.0, 100.0, 80.0]}
    small = _figures("small", 1, shapes, LOADS, found, "bfloat16", context=8)
    assert small.tokens_per_second["batch 1"] == Spread(100.0, 80.0, 150.0)
    assert small.speedup["batch 1"] == Spread(1.5, 1.0, 2.0)
    assert small.weight_bytes == 2 * shapes[1].parameters
    assert small.promised == pytest.approx(shapes[0].flops_per_token(8) / shapes[1].flops_per_token(8))
    assert small.kept("batch 1") == pytest.approx(1.5 / small.promised)
    large = _figures("large", 0, shapes, LOADS, found, "float32", context=8)
    assert large.speedup["batch 1"] == Spread(1.0, 1.0, 1.0) and large.promised == 1.0
