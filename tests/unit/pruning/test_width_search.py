"""The search for the largest cut: where it ends, and in how many trials."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptl_rl.pruning.choose.width_search import WidthSearch


@settings(max_examples=300)
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=160),
    st.floats(1e-4, 3),
    st.sampled_from([1, 16, 128]),
)
def test_the_search_ends_at_a_width_that_fits_beside_one_that_does_not(growth, limit, alignment):
    damages = list(itertools.accumulate(growth))[::-1]  # any that falls with the width
    widths = [alignment * (place + 1) for place in range(len(damages))]
    search, tried = WidthSearch(widths, limit), []
    while (place := search.next()) is not None:
        assert place not in tried
        tried.append(place)
        assert search.found(place, damages[place]) == (damages[place] <= limit)
    fitting = [width for width, damage in zip(widths, damages, strict=True) if damage <= limit]
    assert tried[0] == 0 and len(tried) <= 24
    if not fitting:
        assert search.high == len(widths) and tried[-1] == len(widths) - 1  # the message quotes the last
    else:
        found = widths[search.high]
        assert damages[search.high] <= limit and found - fitting[0] <= max(0, 0.1 * found)


@pytest.mark.parametrize("power", [1.5, 3.0, 4.5])
def test_the_search_takes_few_trials_where_damage_follows_a_power_of_the_width(power):
    """64 of 640 channels were asked for; each trial costs a compensation."""
    widths = list(range(64, 640, 16))
    for limit in (0.03, 0.1, 0.3):
        search, tried = WidthSearch(widths, limit), 0
        while (place := search.next()) is not None:
            search.found(place, 1.2 * (64 / widths[place]) ** power)
            tried += 1
        assert tried <= 6
