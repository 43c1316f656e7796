"""The registry of criteria: the released rule, contrast with general text, and criteria of the user's own."""

import random as python_random

import pytest
import torch

from ptl_rl.config import CHANNEL_CRITERIA as NAMES
from ptl_rl.pruning.score.criteria import (
    CHANNEL_CRITERIA,
    CriterionError,
    activation,
    channel_importance,
    load_criterion,
    needs_of,
    ptl_reference,
    try_out,
)
from ptl_rl.pruning.score.criteria import random as random_criterion
from ptl_rl.pruning.score.statistics import Statistics

CHANNELS = 12


def statistics(seed: int = 0, remove: int = 3, **fields) -> Statistics:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    names = ("sum_LC", "abs_sum_LC", "square_sum_LC", "gate_norm_LC", "up_norm_LC", "down_norm_LC", "down_abs_LC")
    vectors = ("channel_weight_L", "change_sum_L", "cosine_sum_L", "block_weight_L")
    values = {name: numbers(2, CHANNELS) for name in names} | {name: numbers(2) for name in vectors}
    return Statistics(**values, remove_channels=remove, **fields)


def test_recipes_can_name_every_criterion():
    assert set(NAMES) == {*CHANNEL_CRITERIA, "obs"}


def released_rule(reasoning: list[list[float]], general: list[list[float]], remove: int) -> list[int]:
    """The rule as sets, for one block: lists of the last tokens' activations, one per text."""
    best: list[int] = []
    for n in range(1, CHANNELS + 1):
        lowest = set(range(CHANNELS))
        for row in reasoning:
            lowest &= set(sorted(range(CHANNELS), key=lambda j: row[j])[:n])
        highest = set(range(CHANNELS))
        for row in general:
            highest &= set(sorted(range(CHANNELS), key=lambda j: -row[j])[:n])
        found = sorted(lowest - highest)
        if len(found) >= remove:
            return found[:remove]
        if len(found) > len(best):
            best = found
    return best


def places(rows: list[list[float]], descending: bool) -> torch.Tensor:
    sign = -1 if descending else 1
    of_rows = [sorted(range(CHANNELS), key=lambda j: sign * row[j]) for row in rows]
    return torch.tensor([[max(order.index(j) for order in of_rows) for j in range(CHANNELS)]])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("remove", [1, 4, 7])
def test_ptl_reference_is_the_released_rule(seed, remove):
    rng = python_random.Random(seed)
    shared = [rng.gauss(0, 1) for _ in range(CHANNELS)]
    reasoning, general = ([[value + rng.gauss(0, 0.5) for value in shared] for _ in range(texts)] for texts in (3, 5))
    found = statistics(remove=remove)
    found.last_lowest_LC = places(reasoning, descending=False)
    found.general = statistics(last_highest_LC=places(general, descending=True))
    expected = released_rule(reasoning, general, remove)
    gone = (ptl_reference(found)[0] < 1).nonzero().flatten().tolist()
    assert len(gone) == remove
    # If rounding lets fewer go, those are the first by index.
    assert ptl_reference(found)[0].argsort()[: len(expected)].tolist() == expected
    assert set(expected) <= set(gone)
    if len(expected) == remove:
        assert gone == expected


def test_ptl_reference_needs_general_text():
    with pytest.raises(CriterionError, match=r"set criterion\.contrast\.data"):
        ptl_reference(statistics(last_lowest_LC=torch.zeros(2, CHANNELS, dtype=torch.int64)))


def test_contrast_takes_off_relative_importance():
    reasoning, general = statistics(0), statistics(1)
    plain_LC, of_general_LC = activation(reasoning), activation(general)
    reasoning.general = general
    expected_LC = plain_LC / plain_LC.mean(1, keepdim=True) - 0.5 * of_general_LC / of_general_LC.mean(1, keepdim=True)
    torch.testing.assert_close(channel_importance(activation, reasoning, 0.5), expected_LC)


def test_random_follows_from_the_seed():
    first, again, other = (random_criterion(_seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def _seeded(seed: int) -> Statistics:
    found = statistics()
    found.seed = seed
    return found


def write(path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_users_own_criterion(tmp_path):
    path = write(tmp_path / "mine.py", "def mine(statistics):\n    return statistics.abs_sum_LC * 2\n")
    found = statistics()
    importance_LC = channel_importance(load_criterion("mine", path), found, 0)
    torch.testing.assert_close(importance_LC, (found.abs_sum_LC * 2).float())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(statistics): pass\n", "has no function mine"),
        ("import nothing_of_the_kind\n", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_file_without_the_criterion_is_refused(text, message, tmp_path):
    with pytest.raises(CriterionError, match=message):
        load_criterion("mine", write(tmp_path / "mine.py", text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CriterionError, match="no such file"):
        load_criterion("mine", str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("statistics.abs_sum_LC[0]", r"criterion mine must return a tensor of shape \(2, 12\), not \(12,\)"),
        ("3", r"not int"),
        ("statistics.abs_sum_LC * float('nan')", "numbers that are not finite"),
        ("statistics.gradient_sum_LC.abs()", "criterion mine raised AttributeError"),
    ],
)
def test_what_is_no_importance_is_refused(body, message, tmp_path):
    criterion = load_criterion("mine", write(tmp_path / "mine.py", f"def mine(statistics):\n    return {body}\n"))
    with pytest.raises(CriterionError, match=message):
        channel_importance(criterion, statistics(), 0)
    with pytest.raises(CriterionError):  # as it is found before a run begins
        try_out(criterion)


def test_a_users_criterion_says_what_it_reads(tmp_path):
    text = """
from dataclasses import dataclass
from ptl_rl.pruning.criteria import reads

@dataclass
class Scale:
    by: float

@reads(gradients=True)
def mine(statistics):
    return statistics.gradient_sum_LC * Scale(2.0).by
"""
    criterion = load_criterion("mine", write(tmp_path / "mine.py", text))
    assert needs_of(criterion).gradients and not needs_of(criterion).last_tokens
    try_out(criterion)


def test_a_sum_that_a_criterion_does_not_say_it_reads_is_missed_before_the_run(tmp_path):
    text = """
from ptl_rl.pruning.criteria import reads

@reads(sums=("sum",))
def mine(statistics):
    return statistics.square_sum_LC
"""
    with pytest.raises(CriterionError, match="criterion mine returned numbers that are not finite"):
        try_out(load_criterion("mine", write(tmp_path / "mine.py", text)))
    text = text.replace('"sum"', '"squares"')
    with pytest.raises(CriterionError, match="mine reads squares; there are sum, abs_sum, square_sum"):
        load_criterion("mine", write(tmp_path / "other.py", text))
