"""From scores to a plan: ranks, rounding, thresholds, and notes on all that is not as asked."""

from pathlib import Path

import pytest
import torch

from ptl_rl.config import CriterionConfig
from ptl_rl.pruning.choose.choice import Scores, aligned, below_threshold, make_plan, most_important


@pytest.fixture(autouse=True)
def _any_checkpoint(monkeypatch):
    monkeypatch.setattr("ptl_rl.pruning.choose.choice.checkpoint_hash", lambda folder: "a hash")


def plan_of(importance_LC, remove: int, alignment: int = 1, order=(), **criterion):
    importance_LC = torch.as_tensor(importance_LC)
    scores = Scores(importance_LC, torch.ones(len(importance_LC)), list(order))
    return make_plan(
        scores,
        CriterionConfig(channels="activation", **criterion),
        remove_channels=remove,
        alignment=alignment,
        subset_hash="",
        source=Path("here"),
    )


def test_choice_is_by_rank_and_ties_go_to_the_lower_index():
    assert most_important(torch.tensor([[3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0]]), 2) == [[0, 3], [0, 1]]


@pytest.mark.parametrize(
    ("width", "remove", "alignment", "expected"),
    [
        (1280, 480, 16, 480),
        (1280, 481, 16, 480),
        (1000, 300, 64, 296),
        (1000, 40, 64, 40),
        (1000, 39, 64, 0),
        (64, 63, 64, 0),
        (48, 47, 64, 0),
    ],
)
def test_kept_widths_are_multiples(width, remove, alignment, expected):
    found, notes = aligned(width, remove, alignment)
    assert found == expected
    assert bool(notes) == (found != remove)


def test_rounding_says_what_and_why():
    plan = plan_of(torch.rand(2, 48), 20, alignment=16)
    assert plan.intermediate_size == 32
    assert plan.notes == [
        "16 instead of 20 channels per block go: 28 would stay, which is no multiple of 16 "
        "(alignment x tensor_parallel_size)"
    ]


def test_threshold_spares_what_lies_above_it():
    importance_LC = torch.tensor([[0.1, 0.2, 0.3, 9.0], [0.1, 2.0, 2.0, 2.0]])
    assert below_threshold(importance_LC, [0, 1], 3, None) == (3, [])
    assert below_threshold(importance_LC, [0, 1], 1, 0.5) == (1, [])
    fewest, notes = below_threshold(importance_LC, [0, 1], 3, 0.5)
    assert fewest == 1 and "block 1 has no more below criterion.threshold (0.5 times" in notes[0]
    assert below_threshold(importance_LC, [0], 3, 0.5) == (3, [])  # a block that goes does not decide
    plan = plan_of(importance_LC, 3, threshold=0.5)
    assert plan.keep_channels == [[1, 2, 3], [1, 2, 3]]


def test_nothing_below_the_threshold_leaves_the_model_as_it_is():
    plan = plan_of(torch.ones(2, 48), 16, alignment=16, threshold=0.5)
    assert plan.intermediate_size == 48 and plan.compensate == "none" and len(plan.notes) == 1


def test_whatever_goes_is_compensated_for():
    assert plan_of(torch.rand(3, 48), 0, order=[0]).compensate == "least_squares"
    assert plan_of(torch.rand(3, 48), 16).compensate == "least_squares"
    assert plan_of(torch.rand(3, 48), 0).compensate == "none"
