"""Rows of a study differ in what it asks and in nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptl_rl.baselines.slicegpt.rotate import sliced_config
from ptl_rl.config import ConfigError, ScheduleConfig
from ptl_rl.config.recipe import load_config
from ptl_rl.driver.preflight import check_model
from ptl_rl.families import FAMILIES, shape_from_config
from ptl_rl.planning.schedule import planned_cuts, recovery_steps
from ptl_rl.studies.command import demo_recipes, prepare
from ptl_rl.studies.design import STUDIES, design, shared_out, slicegpt_shape
from ptl_rl.testbed.tiny_models import tiny_config, tiny_model

BY_NAME = [(name, recipe) for name in STUDIES for recipe in demo_recipes(name)]


def designed(name, recipe, **changes):
    config = load_config(recipe).model_copy(update=changes)
    _, shape = check_model(config)
    return config, shape, design(name, config, shape)


def steps(config):
    cuts = planned_cuts(config.schedule)
    return {
        entry.method: sum(recovery_steps(config, cut.planned, part) for cut in cuts)
        for part, entry in enumerate(config.recovery)
    }


@pytest.mark.parametrize(("name", "recipe"), BY_NAME, ids=[f"{n}-{r.stem}" for n, r in BY_NAME])
def test_rows_have_the_same_data_and_the_same_steps_in_all(name, recipe):
    config, _, study = designed(name, recipe)
    assert len({row.name for row in study.rows}) == len(study.rows) >= 3
    assert study.reference in {row.name for row in study.rows}
    for row in study.rows:
        made = row.config(seed=2)
        assert made.seed == 2 and made.name == f"{row.name}-seed2"
        assert made.data == config.data and made.evaluation == config.evaluation
        assert (made.gate.max_extensions, made.gate.max_retries, made.gate.on_failure) == (0, 0, "continue")
        if name not in ("step_size", "criteria", "recovery", "table2", "rl", "pace"):
            cycles = len(planned_cuts(made.schedule))
            whole = len(planned_cuts(config.schedule)) * config.calibration.sequences
            assert abs(made.calibration.sequences * cycles - whole) < cycles or row.name == "original"
        for method, count in steps(made).items():
            both = row.name == "cpt-grpo"
            assert count == steps(config)[method] // (2 if both else 1)


def test_the_rl_studys_rows_cut_nothing_and_train_all_steps(repository):
    (shipped,) = demo_recipes("rl")
    by_recipe = {
        shipped: {"grpo": 40, "cpt": 320, "distill": 40},
        repository / "recipes/demo_cpt_grpo_cpu.yaml": {"cpt": 80, "grpo": 10},
        repository / "recipes/demo_restart_cpu.yaml": {"grpo": 16},
    }
    total = {"schedule": ScheduleConfig(channels_per_cycle=128, channels_total=256, alignment=16)}
    for recipe, expected in by_recipe.items():
        for changes in ({}, total if recipe.stem == "demo_restart_cpu" else {}):
            _, _, study = designed("rl", recipe, **changes)
            assert {row.name: steps(row.config(0))[row.name] for row in study.rows} == expected
            for row in study.rows:
                schedule = row.config(0).schedule
                assert schedule.recover_only and not schedule.channels_sum and not schedule.layers_total


@pytest.mark.parametrize("name", ["table1", "iterations"])
def test_cuts_in_one_training_count_as_cuts_of_cycles_do(name, repository):
    cuts, recipe = {"channels_per_cycle": [256, 128], "alignment": 16}, repository / "recipes/demo_restart_cpu.yaml"
    schedules = [ScheduleConfig(mode=mode, **cuts) for mode in ("in_place", "restart")]
    designs = [designed(name, recipe, schedule=schedule)[2].rows for schedule in schedules]
    in_place, restart = ({row.name: row.config(0).calibration.sequences for row in rows} for rows in designs)
    assert in_place == restart
    if name == "table1":
        assert [rows[-1].label for rows in designs] == ["PTL (2 cuts in one training)", "PTL (2 cycles)"]
        assert in_place["prune-once"] == 2 * in_place["ptl"] == 512


def test_a_rate_that_falls_after_the_last_cut_falls_from_the_start_where_a_row_has_cycles(repository):
    config = load_config(
        repository / "recipes/demo_restart_cpu.yaml",
        ["schedule.mode=in_place", "recovery.learning_rate_schedule=cosine_after_cuts"],
    )
    rows = {row.name: row.config(0) for row in design("table1", config, check_model(config)[1]).rows}
    found = {name: made.recovery[0].learning_rate_schedule for name, made in rows.items()}
    assert found.pop("ptl") == "cosine_after_cuts" and rows["ptl"].schedule.mode == "in_place"
    assert set(found.values()) == {"cosine"} and len(found) == 5


def test_the_pace_studys_rows_cut_as_much_in_one_cut_in_six_and_in_as_many_as_it_takes():
    (recipe,) = demo_recipes("pace")
    config, _, study = designed("pace", recipe)
    once, fixed, governed = (row.config(0) for row in study.rows)
    assert [made.schedule.channels_sum for made in (once, fixed, governed)] == [576] * 3
    assert (once.schedule.mode, once.schedule.channels_per_cycle) == ("restart", [576])
    assert (fixed.schedule.mode, fixed.schedule.pace) == ("in_place", "fixed")
    assert fixed.schedule.channels_per_cycle == [200, 144, 96, 64, 40, 32]
    assert governed.schedule == config.schedule and governed.recovery == config.recovery
    assert once.calibration.sequences == 6 * fixed.calibration.sequences == 6 * governed.calibration.sequences
    with pytest.raises(ConfigError, match=r"schedule\.pace must be governed"):
        designed("pace", *demo_recipes("recovery"))


def test_the_rl_study_refuses_a_parent_that_is_the_model_itself():
    (recipe,) = demo_recipes("recovery")
    with pytest.raises(ConfigError, match="set rewards: true for distill, or leave it out"):
        designed("rl", recipe)


@pytest.mark.parametrize("recipe", [*demo_recipes("table1"), *demo_recipes("code")], ids=lambda recipe: recipe.stem)
def test_table1_cuts_to_about_the_same_size(recipe):
    config, shape, study = designed("table1", recipe)
    target = shape.sliced(config.schedule.channels_sum, config.schedule.layers_total).parameters
    sizes = {}
    for row in study.rows:
        schedule = row.config(0).schedule
        sliced = shape.sliced(schedule.channels_sum, schedule.layers_total)
        sizes[row.name] = (slicegpt_shape(shape, row.slicegpt_size) if row.slicegpt_size else sliced).parameters
    assert sizes["original"] == shape.parameters
    assert sizes["ptl"] == sizes["prune-once"] == sizes["prune-once-plain"] == target
    block = shape.parameters - shape.sliced(layers=1).parameters
    assert abs(sizes["shortgpt"] - target) <= block / 2
    assert sizes["slicegpt"] == pytest.approx(target, rel=0.06)
    ptl = next(row for row in study.rows if row.name == "ptl").config(0)
    assert len(planned_cuts(ptl.schedule)) > 1
    once = next(row for row in study.rows if row.name == "prune-once").config(0)
    assert len(planned_cuts(once.schedule)) == 1
    # What the loop's cuts read together, the one cut reads at once.
    assert once.calibration.sequences == len(planned_cuts(ptl.schedule)) * ptl.calibration.sequences


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("size", [16, 32])
def test_slicegpt_sizes_are_those_of_the_model(family, size):
    from ptl_rl.baselines.slicegpt.modeling import SliceGptLlamaForCausalLM

    sizes = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
    shape = shape_from_config(tiny_config(family, **sizes).to_dict(), FAMILIES, "here")
    model = SliceGptLlamaForCausalLM(sliced_config(tiny_model(family, **sizes).config, size))
    assert slicegpt_shape(shape, size).parameters == sum(p.numel() for p in model.parameters())


def test_a_family_without_a_rotated_form_has_no_such_row():
    config = load_config(demo_recipes("table1")[1], ["model.path=testbed:gemma2"])
    _, shape = check_model(config)
    study = design("table1", config, shape)
    assert "slicegpt" not in {row.name for row in study.rows}
    assert any("no SliceGPT row" in note for note in study.notes)


@given(st.integers(1, 300), st.lists(st.floats(0.1, 9), min_size=1, max_size=8))
def test_steps_are_shared_out_whole(total, weights):
    if total < len(weights):
        with pytest.raises(ConfigError, match="cannot be shared out"):
            shared_out(total, weights)
        return
    found = shared_out(total, weights)
    assert sum(found) == total and min(found) >= 1
    assert all(
        abs(part - 1 - (total - len(weights)) * w / sum(weights)) < 1 for part, w in zip(found, weights, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("table3", [], "there are table1"),
        ("order", ["schedule.layers_total=0"], "must remove channels and blocks"),
        ("recovery", ["recovery=[{cpt: {steps: 4}}]"], "list the methods to compare"),
        ("recovery", ["recovery=[{cpt: {steps: 4}}, {cpt: {steps: 9}}, {grpo: {}}]"], "each once"),
        ("table1", ["recovery_of_cycle={1: {cpt: {steps: 9}}}"], "has recovery_of_cycle"),
        ("table2", ["recovery=[{cpt: {steps: 4}}, {distill: {steps: 4}}]"], "must list cpt and grpo"),
        ("iterations", ["schedule={layers_total: 1}"], "must remove channels"),
        ("iterations", ["recovery=[{cpt: {steps: 1}}]"], "cannot be shared out"),
    ],
)
def test_what_cannot_be_varied_is_refused(name, settings, says):
    with pytest.raises(ConfigError, match=says):
        prepare(name, [], settings, None)


def test_several_recipes_have_a_folder_each(tmp_path):
    made = prepare("table1", [], [], tmp_path)
    assert [m.out for m in made] == [tmp_path / "table1-grpo", tmp_path / "table1-cpt"]
    alone = prepare("table1", [demo_recipes("table1")[0]], ["data.test.rows=7"], tmp_path)
    assert [m.out for m in alone] == [tmp_path]
    assert alone[0].command.endswith("--set data.test.rows=7")


def test_the_code_study_wants_a_recipe_that_runs_unit_tests(tmp_path):
    recipe = demo_recipes("table1")[1]
    with pytest.raises(ConfigError, match="must judge programs by their unit tests"):
        prepare("code", [recipe], [], tmp_path)
    made = prepare("code", [], [], tmp_path)
    assert made[0].study.name == "code" and made[0].study.reference == "ptl"
