"""Cuts follow the schedule, add up to it, and are refused where they would leave unusable widths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptl_rl.config import ConfigError, ScheduleConfig
from ptl_rl.config.pruning import TargetConfig
from ptl_rl.config.recipe import parse_config
from ptl_rl.families import FAMILIES, ModelShape
from ptl_rl.planning.schedule import (
    Cut,
    channels_for,
    check_cuts,
    check_schedule,
    geometric,
    halved,
    planned_cuts,
    settled,
)

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


@given(st.integers(2, 200), st.integers(1, 12), st.data())
def test_geometric_cuts_leave_the_same_share_each(width, count, data):
    alignment = data.draw(st.sampled_from([1, 16]))
    total = data.draw(st.integers(1, width - 1))
    cuts = geometric(width * alignment, total * alignment, count, alignment)
    assert sum(cuts) == total * alignment and all(cut > 0 and cut % alignment == 0 for cut in cuts)
    assert len(cuts) <= count
    exact = [width * ((width - total) / width) ** (number / count) for number in range(count + 1)]
    left = [width * alignment - sum(cuts[:number]) for number in range(len(cuts) + 1)]
    assert all(min(abs(x * alignment - found) for x in exact) <= alignment / 2 for found in left)


def config_of(**schedule):
    return parse_config({"schedule": {"alignment": 16, **schedule}, "recovery": [{"grpo": {}}]})


@given(
    st.sampled_from(["parameters", "intermediate_size", "flops"]),
    st.floats(0.3, 0.99),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([1, 16, 128]),
)
def test_as_many_channels_go_as_a_target_takes_and_no_more(name, share, as_share, layers, alignment):
    def size(gone: int, layers: int = layers) -> int:
        shape = SHAPE.sliced(gone, layers)
        return shape.flops_per_token() if name == "flops" else getattr(shape, name)

    wanted = share * size(0, 0)
    target = TargetConfig(**{name: share if as_share else wanted})
    if not size(SHAPE.intermediate_size - alignment) <= wanted < size(0):
        with pytest.raises(
            ConfigError, match=rf"schedule\.target\.{name} is .* (the fewest that may stay|without los)"
        ):
            channels_for(target, SHAPE, layers, alignment)
        return
    gone = channels_for(target, SHAPE, layers, alignment)
    assert (SHAPE.intermediate_size - gone) % alignment == 0
    assert size(gone) <= wanted < size(gone - alignment)


def test_a_schedule_that_leaves_its_cuts_to_the_model():
    config = config_of(pace="geometric", cuts=3, target={"intermediate_size": 0.125})
    found = settled(config, SHAPE).schedule
    assert (found.pace, found.channels_per_cycle, found.channels_sum) == ("fixed", [384, 192, 96], 672)
    assert not found.is_open and settled(settled(config, SHAPE), SHAPE).schedule == found
    config = config_of(channels_per_cycle=256, target={"parameters": 0.5})
    found = settled(config, SHAPE).schedule
    assert (found.channels_per_cycle, found.channels_total) == (256, 512)
    assert SHAPE.sliced(512).parameters <= SHAPE.parameters / 2 < SHAPE.sliced(496).parameters
    config = config_of(mode="in_place", pace="governed", target={"flops": 0.6}, patience=3)
    found = settled(config, SHAPE).schedule
    assert found.channels_sum == channels_for(TargetConfig(flops=0.6), SHAPE, 0, 16) and found.patience == 3
    by_speed = config_of(mode="in_place", pace="governed", target={"tokens_per_second": 1.25})
    assert settled(by_speed, SHAPE).schedule.channels_sum == channels_for(TargetConfig(flops=0.8), SHAPE, 0, 16)
    by_speed = config_of(channels_per_cycle=16, target={"tokens_per_second": 100})
    assert settled(by_speed, SHAPE).schedule.channels_sum == SHAPE.intermediate_size - 16, "measuring decides"
    blocks_do = config_of(channels_per_cycle=16, layers_total=2, target={"tokens_per_second": 1.01})
    assert settled(blocks_do, SHAPE).schedule.channels_sum == 16, "if FLOPs are right; that is seen when it is measured"
    many = config_of(pace="geometric", cuts=9, target={"tokens_per_second": 1.01})
    assert len(settled(many, SHAPE).schedule.channel_steps) < 9
    check_cuts(many.model_copy(update={"recovery_of_cycle": {9: []}}), SHAPE)
    with pytest.raises(ConfigError, match="768 channels a layer, the fewest that may stay"):
        settled(config_of(channels_per_cycle=16, target={"tokens_per_second": 2}, alignment=768), SHAPE)
    plain = config_of(channels_per_cycle=[64])
    assert settled(plain, SHAPE) is plain
    with pytest.raises(ConfigError, match="between 768 and 736 channels there are only 2 cuts of equal shares"):
        settled(config_of(pace="geometric", cuts=5, channels_total=32), SHAPE)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"pace": "geometric", "cuts": 3, "channels_total": 1000}, "removes 1000 channels per layer, but intermediate"),
        ({"channels_per_cycle": 8, "target": {"flops": 0.5}, "layers_total": 9}, "layers_total is 9, but num_hidden_"),
        ({"channels_per_cycle": 8, "target": {"flops": 0.5}, "alignment": 1024}, "is 768; at least 1024 must stay"),
        (
            {"channels_per_cycle": 8, "target": {"flops": 0.8}, "layers_total": 2},
            r"flops is 0\.8, which the model has with 2 blocks fewer without losing any channels; leave target out",
        ),
        (
            {"channels_per_cycle": 8, "target": {"parameters": 0.1}, "layers_total": 1},
            "with 16 channels a layer, the fewest that may stay, and 1 blocks fewer it is",
        ),
    ],
)
def test_open_schedules_that_no_model_of_this_shape_can_have(schedule, message):
    with pytest.raises(ConfigError, match=message):
        settled(config_of(**schedule), SHAPE)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"target": {"parameters": 0.5}}, "target is set but channels_per_cycle is 0"),
        ({"target": {}, "channels_per_cycle": 8}, "target has nothing; give one of parameters, intermediate_size"),
        ({"target": {"parameters": 0.5, "flops": 0.5}, "channels_per_cycle": 8}, "target has .*; give one of"),
        ({"target": {"parameters": 0.5}, "channels_per_cycle": 8, "channels_total": 16}, "leave out channels_total"),
        ({"target": {"parameters": 0.5}, "channels_per_cycle": [8]}, "leave out channels_total, and the list"),
        ({"pace": "geometric", "channels_total": 64}, "pace is geometric and cuts is None; geometric needs their numb"),
        ({"cuts": 3, "channels_per_cycle": [64]}, "pace is fixed and cuts is 3; geometric needs their number, and onl"),
        ({"pace": "geometric", "cuts": 2}, "pace geometric finds the cuts itself: set channels_total or target"),
        ({"pace": "geometric", "cuts": 2, "channels_total": 64, "channels_per_cycle": 8}, "and no channels_per_cycle"),
        ({"recover_only": True, "target": {"flops": 0.5}}, "recover_only cuts nothing"),
        ({"recover_only": True, "pace": "geometric"}, "recover_only cuts nothing"),
    ],
)
def test_targets_and_paces_that_do_not_go_together(schedule, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**schedule)
