"""The search for a width by measured speed, and once the measuring itself, with real engines of random weights."""

import json
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptl_rl.evaluation import speed_target
from ptl_rl.evaluation.speed import Spread
from ptl_rl.evaluation.speed_target import (
    MOST_WIDTHS,
    NotMeasured,
    OutOfReach,
    Wanted,
    channels_for_speed,
    search,
    widest_as_fast,
)
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
        assert speed(alignment).low < target
        return
    assert found[fast].low >= target and not fast % alignment
    assert asked == list(found) and len(asked) <= MOST_WIDTHS, "nothing is measured twice"
    assert all(found[channels].low < target for channels in found if channels > fast)


@pytest.mark.parametrize("fixed", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("first", [8, 320, 632])
def test_where_time_is_linear_in_the_width_the_widest_is_found_in_four(fixed, first):
    speed = speed_of(640, fixed)
    fast, found = widest_as_fast(1.5, 640, 8, first, speed)
    assert speed(fast).low >= 1.5 > speed(fast + 8).low
    assert len(found) <= 4


def test_noise_that_contradicts_itself_ends_the_search():
    """A narrower model is measured as slower than a wider one, twice."""
    speeds = iter([1.3, 1.2, 1.6, 1.4, 1.7, 1.0])
    fast, found = widest_as_fast(1.5, 640, 8, 400, lambda _: Spread(*[next(speeds)] * 3))
    assert found[fast].low == 1.7 and len(found) == MOST_WIDTHS


def test_every_round_must_be_fast_enough():
    with pytest.raises(
        OutOfReach, match=r"no width down to 320 channels, of 640, is so fast; .* reached 1.40, so give"
    ):
        widest_as_fast(1.5, 640, 320, 320, lambda _: Spread(1.6, 1.4, 1.8))


def test_blocks_that_go_are_measured_by_themselves_first():
    speed = speed_of(640, 0.2)

    def faster(channels):
        return Spread(*[1.3 * speed(channels).low] * 3)

    with pytest.raises(OutOfReach, match=r"with fewer blocks it is 1\.30 times as fast already; leave target out"):
        widest_as_fast(1.3, 640, 8, 632, faster, fewer_blocks=True)
    fast, found = widest_as_fast(1.5, 640, 8, 632, faster, fewer_blocks=True)
    assert next(iter(found)) == 640 and faster(fast).low >= 1.5 > faster(fast + 8).low


def wanted(**changes):
    values = {"target": 1.25, "first": 320, "layers": 0, "alignment": 8, "dtype": "float32", "tensor_parallel_size": 1}
    return Wanted(str(CHECKPOINT_DIR), **{**values, **changes})


def test_the_models_that_are_measured(monkeypatch, tmp_path):
    seen, told = [], []

    def measure(folders, loads, *, rounds, dtype, tensor_parallel_size, shapes_only, progress):
        values = [json.loads((folder / "config.json").read_text()) for folder in folders]
        seen.append([(value["intermediate_size"], value["num_hidden_layers"]) for value in values])
        assert all((folder / "tokenizer_config.json").exists() for folder in folders)
        assert shapes_only and dtype == "float32" and [load.name for load in loads] == ["saturated"]
        speed = speed_of(640, 0.5)(values[1]["intermediate_size"])
        return [None, type("Figures", (), {"speedup": {"saturated": speed}})]

    monkeypatch.setattr(speed_target, "measure", measure)
    found = search(wanted(layers=1), tmp_path, lambda **facts: told.append(facts))
    assert seen[:2] == [[(640, 4), (640, 3)], [(640, 4), (320, 3)]], "blocks that go are gone in the candidates alone"
    assert found == 384 and told[1]["channels"] == 320 and told[1]["median"] == pytest.approx(4 / 3)


def test_what_the_process_says_and_how_it_ends(monkeypatch):
    """A stand-in for it, which says what the real one would."""
    lines = {
        "found": [
            "INFO of a library",
            {"what": "speed of 320 channels", "done": 1, "total": 4},
            {"channels": 320, "median": 1.3, "low": 1.2, "high": 1.4},
            {"width": 320},
        ],
        "too slow": [{"out_of_reach": "no width"}],
        "broken": ["INFO of a library"],
    }

    def program(name):
        said = [line if isinstance(line, str) else json.dumps(line) for line in lines[name]]
        ending = "raise RuntimeError('Free memory on device is less than desired')" if name == "broken" else ""
        return f"print({chr(10).join(said)!r})\n{ending}"

    real = speed_target.subprocess.Popen

    def ask(name):
        def popen(command, **options):
            assert command[1:3] == ["-m", "ptl_rl.evaluation.speed_target"] and json.loads(command[3])["first"] == 320
            return real([sys.executable, "-c", program(name)], **options)

        monkeypatch.setattr(speed_target.subprocess, "Popen", popen)
        seen, told = [], {}
        return channels_for_speed(wanted(), lambda *given: seen.append(given), told.__setitem__), seen, told

    assert ask("found") == (320, [("speed of 320 channels", 1, 4)], {320: Spread(1.3, 1.2, 1.4)})
    with pytest.raises(OutOfReach, match="no width"):
        ask("too slow")
    with pytest.raises(NotMeasured, match="could not be timed here: RuntimeError: Free memory on device"):
        ask("broken")
    assert speed_target._reason(["x.SomeError: why", "  raise x", "warnings.warn(1)"], 1) == "x.SomeError: why"
    assert speed_target._reason(["", "a word"], 1) == "a word" and "status 9" in speed_target._reason([], 9)


@pytest.mark.stack
@pytest.mark.skipif(torch.cuda.is_available(), reason="written for vLLM's CPU build")
def test_real_engines_of_random_weights_are_timed():
    """Of the one width that there is; on a busy machine it may be the slower one, but is measured."""
    told = {}
    with suppress(OutOfReach):
        assert channels_for_speed(wanted(target=1.01, alignment=320), lambda *_: None, told.__setitem__) == 320
    assert list(told) == [320] and 0 < told[320].low <= told[320].median <= told[320].high
