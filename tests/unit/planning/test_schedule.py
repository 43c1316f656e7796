"""Cuts follow the schedule, add up to it, and are refused where they would leave unusable widths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptl_rl.config import ConfigError, ScheduleConfig
from ptl_rl.families import FAMILIES, ModelShape
from ptl_rl.planning.schedule import Cut, check_schedule, halved, planned_cuts

SHAPE = ModelShape(FAMILIES["qwen2"], 192, 768, 4, 4, 2, 48, 512, True, False, False)


def pairs(**schedule):
    return [(cut.channels, cut.layers) for cut in planned_cuts(ScheduleConfig(**schedule))]


def test_orders():
    both = {"channels_per_cycle": 100, "channels_total": 250, "layers_total": 2}
    assert pairs(**both) == [(100, 0), (100, 0), (50, 0), (0, 1), (0, 1)]
    assert pairs(**both, order="layers_then_channels") == [(0, 1), (0, 1), (100, 0), (100, 0), (50, 0)]
    assert pairs(**both, order="alternating") == [(100, 0), (0, 1), (100, 0), (0, 1), (50, 0)]
    assert pairs(**both, order="together") == [(100, 1), (100, 1), (50, 0)]
    assert pairs(layers_total=3, layers_per_cycle=2) == [(0, 2), (0, 1)]
    assert pairs(channels_per_cycle=[5, 3]) == [(5, 0), (3, 0)]


@given(
    st.integers(1, 50),
    st.integers(1, 400),
    st.integers(0, 9),
    st.integers(1, 4),
    st.sampled_from(["channels_then_layers", "layers_then_channels", "alternating", "together"]),
)
def test_cuts_add_up(step, total, layers, layer_step, order):
    schedule = ScheduleConfig(
        channels_per_cycle=step, channels_total=total, layers_total=layers, layers_per_cycle=layer_step, order=order
    )
    cuts = planned_cuts(schedule)
    assert sum(cut.channels for cut in cuts) == total
    assert sum(cut.layers for cut in cuts) == layers
    assert all(0 <= cut.channels <= step and 0 <= cut.layers <= layer_step for cut in cuts)
    assert all(cut.channels or cut.layers for cut in cuts)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"channels_per_cycle": 768, "channels_total": 768}, "removes 768 channels .* intermediate_size is 768"),
        ({"layers_total": 4}, "layers_total is 4, but num_hidden_layers is 4"),
        ({"channels_per_cycle": 100, "channels_total": 200}, "cycle 1 leaves 668 .* multiple of 64 .*; 640 and 704"),
    ],
)
def test_impossible_schedules_are_refused(schedule, message):
    with pytest.raises(ConfigError, match=message):
        check_schedule(ScheduleConfig(**schedule), SHAPE, 64)


def test_possible_schedule_is_accepted():
    check_schedule(ScheduleConfig(channels_per_cycle=128, channels_total=512, layers_total=3), SHAPE, 64)


@given(st.integers(0, 40), st.integers(0, 6), st.integers(1, 64))
def test_halving_keeps_the_sum_and_the_alignment(multiple, layers, alignment):
    cut = Cut(multiple * alignment, layers, 3)
    parts = halved(cut, alignment)
    if parts is None:
        assert cut.channels < 2 * alignment and cut.layers < 2
    else:
        assert sum(p.channels for p in parts) == cut.channels
        assert sum(p.layers for p in parts) == cut.layers
        assert all(p.channels % alignment == 0 and p.planned == 3 and not p.is_empty for p in parts)
