"""What a run writes, against numbers worked out by hand."""

import pytest

from ptl_rl.config import CptConfig, GrpoConfig
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.families import FAMILIES, shape_from_config
from ptl_rl.families.published import PUBLISHED
from ptl_rl.planning.disk import disk_use, recovery_peak, saves
from ptl_rl.planning.model import weight_bytes

NAME = "Qwen/Qwen2.5-7B"
QWEN = shape_from_config(PUBLISHED[NAME], FAMILIES, NAME)


def test_ten_cycles_of_7b(repository):
    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")
    found = disk_use(config, QWEN, source_bytes=2)
    # A cut takes 28 x 3 x 3584 x 1024 = 308,281,344 parameters: those of ten cycles are together
    # 10 x 7,615,616,512 - 55 x 308,281,344 = 59,200,691,200. Sliced and recovered are float32 (8 bytes), but for the
    # first sliced one, which has the original's bfloat16: 2 x 7,307,335,168 less.
    assert found.kept == 8 * 59_200_691_200 - 14_614_670_336
    # In the last cycle (4,532,803,072 parameters) verl has two checkpoints of 12 bytes where the recovered will be.
    assert found.peak == found.kept - 4 * 4_532_803_072 + 24 * 4_532_803_072
    assert found.extension == 4 * 7_307_335_168
    assert found.resumable == 12 * 7_307_335_168


def test_no_optimizer_state_after_the_last_step():
    shape, every = QWEN, CptConfig(steps=9, save_every_steps=3)
    assert saves(every, 9) == 2 and saves(every, 10) == 3 and saves(CptConfig(steps=9), 9) == 0
    assert recovery_peak(shape, every, 9) == 24 * shape.parameters
    assert recovery_peak(shape, every, 6) == 16 * shape.parameters  # one of 12 bytes, and the last
    assert recovery_peak(shape, CptConfig(steps=9), 9) == 4 * shape.parameters


def test_compensated_weights_and_rollouts_pass_through():
    values = {
        "schedule": {"channels_per_cycle": [1024]},
        "recovery": {"steps": 2, "prompts_per_step": 8, "rollouts_per_prompt": 4},
        "calibration": {"source": "rollouts"},
        "data": {"max_response_tokens": 96},
    }
    plain = {**values, "criterion": {"channels": "activation", "compensate": "none"}}
    cut = QWEN.sliced(channels=1024)
    found = disk_use(parse_config(plain), QWEN, 2)
    rollouts = 10 * 2 * 8 * 4 * 96
    assert found.peak == 6 * cut.parameters + rollouts and found.kept == 6 * cut.parameters
    # Before recovery the new o_proj and down_proj, float32, lie beside the sliced checkpoint.
    compensated = disk_use(parse_config({**values, "recovery": {"steps": 2}}), QWEN, 8)
    assert compensated.peak == max(12 * cut.parameters, 8 * cut.parameters + 4 * 28 * 3584 * (18944 + 3584)) + (
        10 * 2 * 128 * 8 * 96
    )


@pytest.mark.parametrize(
    ("changes", "as_cut", "beside"),
    [
        ({}, False, 1),  # of an early end
        ({}, True, 3),  # and as many as there are cuts
        ({"channels_per_cycle": [512] * 5}, True, 4),
        ({"pace": "governed", "channels_total": 2048, "channels_per_cycle": 0}, False, 2),
        ({"pace": "governed", "channels_total": 2048, "channels_per_cycle": 0}, True, 5),
    ],
)
def test_what_a_training_in_place_writes_beside_its_checkpoints(changes, as_cut, beside):
    schedule = {"mode": "in_place", "channels_per_cycle": [1024, 1024], **changes}
    found = disk_use(parse_config({"schedule": schedule, "evaluation": {"after_cut": as_cut}}), QWEN, 2)
    cut = QWEN.sliced(channels=sum(schedule["channels_per_cycle"]) if "pace" not in changes else 2048)
    assert found.kept == 4 * cut.parameters * (1 + as_cut)  # the model, and the one right after the last cut
    assert found.peak == (2 * 12 + 4 * beside) * QWEN.parameters + found.kept


def test_a_training_that_is_sliced_on_the_way_writes_that_model_beside_the_one_before():
    schedule = {"mode": "in_place", "channels_per_cycle": [1024, 1024]}
    plain, sliced = (
        disk_use(parse_config({"schedule": {**schedule, "rematerialise": when}}), QWEN, 2)
        for when in ("never", "when_it_pays")
    )
    assert sliced.peak == plain.peak + (12 + 4) * QWEN.sliced(channels=1024).parameters and sliced.kept == plain.kept


def test_what_is_for_dead_rewards_counts_as_another_round_would():
    values = {
        "schedule": {"channels_per_cycle": [1024]},
        "recovery": {"steps": 9, "min_learnable_fraction": 0.1},
        "gate": {"max_extensions": 0},
    }
    rescue = {"recovery_if_unlearnable": [{"cpt": {}}, {"grpo": {}}]}
    plain, rescued = (disk_use(parse_config(values | more), QWEN, 2) for more in ({}, rescue))
    assert (plain.extension, rescued.extension) == (0, 2 * 4 * QWEN.sliced(channels=1024).parameters)


def test_a_recovery_only_writes_no_sliced_checkpoint():
    config = parse_config({"schedule": {"recover_only": True}, "gate": {"max_extensions": 0}})
    found = disk_use(config, QWEN, 2)
    assert found.kept == found.peak == 4 * QWEN.parameters and found.extension == found.resumable == 0


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_type_of_weights_is_read_from_them(dtype, size, make_checkpoint, tmp_path):
    from ptl_rl.checkpoints.write import convert_weights

    folder = make_checkpoint("llama")
    convert_weights(folder, tmp_path, dtype)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert weight_bytes(tmp_path) == size
    (tmp_path / "model.safetensors").unlink()
    assert weight_bytes(tmp_path) == 4  # the configuration's


def test_rl_counts_like_cpt():
    assert saves(GrpoConfig(save_every_steps=4), 12) == 2
