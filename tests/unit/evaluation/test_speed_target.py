"""The search for a width by measured speed; the measuring itself is done once, with real engines."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptl_rl.evaluation import speed_target
from ptl_rl.evaluation.speed import Spread
from ptl_rl.evaluation.speed_target import MOST_WIDTHS, OutOfReach, channels_for_speed, widest_as_fast
from ptl_rl.testbed import CHECKPOINT_DIR


def speed_of(width, fixed, curve=1.0):
    """Of a model whose token takes ``fixed`` of the original's time whatever the width."""
    return lambda channels: Spread(*[1 / (fixed + (1 - fixed) * (channels / width) ** curve)] * 3)


@given(
    target=st.floats(1.01, 3),
    fixed=st.floats(0, 0.9),
    curve=st.floats(0.5, 2),
    first=st.integers(0, 1100),
    alignment=st.sampled_from([8, 64, 128]),
    width=st.sampled_from([640, 1000, 1024]),
)
@settings(max_examples=300, deadline=None)
def test_what_is_found_was_measured_to_be_fast_enough(target, fixed, curve, first, alignment, width):
    speed, asked = speed_of(width, fixed, curve), []

    def measured(channels):
        asked.append(channels)
        return speed(channels)

    try:
        fast, found = widest_as_fast(target, width, alignment, first, measured)
    except OutOfReach:
        assert speed(alignment).median < target
        return
    assert found[fast].median >= target and not fast % alignment
    assert asked == list(found) and len(asked) <= MOST_WIDTHS, "nothing is measured twice"
    assert all(found[channels].median < target for channels in found if channels > fast)


@pytest.mark.parametrize("fixed", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("first", [8, 320, 632])
def test_where_time_is_linear_in_the_width_the_widest_is_found_in_four(fixed, first):
    speed = speed_of(640, fixed)
    fast, found = widest_as_fast(1.5, 640, 8, first, speed)
    assert speed(fast).median >= 1.5 > speed(fast + 8).median
    assert len(found) <= 4


def test_noise_that_contradicts_itself_ends_the_search():
    """A narrower model is measured as slower than a wider one, twice."""
    speeds = iter([1.3, 1.2, 1.6, 1.4, 1.7, 1.0])
    fast, found = widest_as_fast(1.5, 640, 8, 400, lambda _: Spread(*[next(speeds)] * 3))
    assert found[fast].median == 1.7 and len(found) == MOST_WIDTHS


def test_the_models_that_are_measured_and_what_is_left_behind(monkeypatch):
    seen, told, environment = [], [], dict(os.environ)

    def measure(folders, loads, *, rounds, dtype, tensor_parallel_size, shapes_only, progress):
        values = [json.loads((folder / "config.json").read_text()) for folder in folders]
        seen.append([(value["intermediate_size"], value["num_hidden_layers"]) for value in values])
        assert shapes_only and dtype == "float32" and [load.name for load in loads] == ["saturated"]
        os.environ["VLLM_WITH_A_LEAK"] = "1"
        progress(1, 1)
        speed = speed_of(640, 0.5)(values[1]["intermediate_size"])
        return [None, type("Figures", (), {"speedup": {"saturated": speed}})]

    monkeypatch.setattr(speed_target, "measure", measure)
    arguments = {"layers": 1, "alignment": 8, "dtype": "float32", "tensor_parallel_size": 1}
    gone = channels_for_speed(
        CHECKPOINT_DIR, 1.25, 320, **arguments, progress=lambda what, done, total: None, told=told.append
    )
    assert seen[0] == [(640, 4), (320, 3)], "blocks that go are gone in the candidates alone"
    assert 640 - gone == 384 and told[0].startswith("320 of 640 channels: 1.33 times as fast")
    assert dict(os.environ) == environment
    with pytest.raises(OutOfReach, match=r"8 channels, the fewest .* give less than 2.5"):
        channels_for_speed(CHECKPOINT_DIR, 2.5, 600, **arguments, progress=lambda *_: None, told=told.append)
