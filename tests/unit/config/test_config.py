"""The configuration refuses what cannot run, and says what was meant."""

import json

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config, parse_config, read_saved_config, save_config

MINIMAL = {"schedule": {"channels_per_cycle": 64, "channels_total": 128}}


def refused(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **values}, "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ")
    assert "\n" not in message
    return message


def test_minimal_recipe_is_accepted_and_survives_saving(tmp_path):
    config = parse_config(MINIMAL)
    save_config(config, tmp_path / "config.json")
    assert read_saved_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"recovry": {}}, ["recovry", "did you mean 'recovery'"]),
        ({"recovery": {"stpes": 3}}, ["recovery.stpes", "did you mean 'steps'"]),
        ({"data": {"train": {"path": "x", "rowz": 1}}}, ["data.train.rowz", "did you mean 'rows'"]),
        ({"recovery": {"xyzzy": 3}}, ["recovery.xyzzy", "there are steps, learning_rate"]),
        ({"recovery": {"steps": 0}}, ["recovery", "steps 0"]),
        ({"recovery": {"learning_rate": -1}}, ["recovery.learning_rate", "greater than 0"]),
        ({"recovery": {"prompts_per_step": 32, "mini_batch_prompts": 5}}, ["32", "5"]),
        ({"resources": {"workers_per_node": 3, "tensor_parallel_size": 2}}, ["3 workers_per_node", "2"]),
        (
            {"recovery": {"prompts_per_step": 3, "rollouts_per_prompt": 3}, "resources": {"workers_per_node": 2}},
            ["9 sequences", "2 workers"],
        ),
        ({"criterion": {"channels": "wandda"}}, ["criterion", "'wandda' is no criterion", "did you mean 'wanda'"]),
        ({"criterion": {"channels": "xyzzy"}}, ["there are obs, activation", "set criterion.path"]),
        ({"criterion": {"channels": "obs", "threshold": 0.5}}, ["threshold", "obs gives an order"]),
        ({"criterion": {"channels": "ptl_reference"}}, ["set contrast.data"]),
        ({"criterion": {"layers": "explicit"}}, ["layers is explicit and layer_ids []"]),
        ({"criterion": {"layer_ids": [1]}}, ["layers is leave_one_out and layer_ids [1]"]),
        ({"criterion": {"layers": "explicit", "layer_ids": [1, 1]}}, ["[1, 1] must be different"]),
        ({"criterion": {"layers": "explicit", "layer_ids": [1]}}, ["names 1 blocks", "layers_total is 0"]),
        (
            {"criterion": {"channels": "taylor"}, "calibration": {"token_weights": "sensitivity"}},
            ["taylor has gradients of its own"],
        ),
        ({"data": {"train": {"path": "x", "fields": {"text": "t"}}}}, ["data.train.fields.text", "no questions"]),
        ({"data": {"train": []}}, ["data.train: an empty list"]),
        ({"data": {"train": [{"path": "x"}, {"path": "x", "rowz": 1}]}}, ["data.train.1.rowz", "did you mean 'rows'"]),
        ({"data": {"corpus": [{"path": "x", "fields": {"txt": "t"}}]}}, ["corpus.0.fields.txt", "did you mean 'text'"]),
        ({"data": {"train": [{"path": "x", "fields": {"text": "t"}}]}}, ["data.train.0.fields.text", "no questions"]),
        ({"data": {"train": {"path": "x", "fields": {"answer": None}}}}, ["data.train.fields.answer", "judged by"]),
        ({"data": {"test": {"path": "x", "fields": {"answer": None}}}}, ["data.test.fields.answer", "judged by"]),
        ({"data": {"train": {"path": "x", "fields": {}, "layout": "y"}}}, ["data.train: fields and layout both"]),
        ({"data": {"train": [{"path": "hub:/"}]}}, ["data.train.0.path: 'hub:/' names no data set", "hub:OWNER/NAME"]),
        ({"data": {"decontaminate": {"ngam": 9}}}, ["data.decontaminate.ngam", "did you mean 'ngram'"]),
        ({"data": {"deduplicate": "some"}}, ["data.deduplicate: Input should be 'question', 'exact' or 'off'"]),
        (
            {"schedule": {"channels_per_cycle": 64}},
            ["channels_per_cycle is 64", "neither channels_total nor target"],
        ),
        ({"schedule": {"channels_total": 64}}, ["channels_total is 64", "channels_per_cycle is 0"]),
        ({"schedule": {}}, ["nothing to remove"]),
        ({"recovery": [{"grpo": {"kl_to": "parent", "kl_loss": 0}}]}, ["kl_to is parent, but kl_loss is 0"]),
        ({"schedule": {"recover_only": True, "layers_total": 1}}, ["recover_only cuts nothing, but"]),
        ({"schedule": {"channels_per_cycle": [64, 32], "channels_total": 100}}, ["100", "96"]),
    ],
)
def test_wrong_values_are_named(values, parts):
    message = refused(values)
    for part in parts:
        assert part in message


def test_recipe_files(tmp_path):
    recipe = tmp_path / "r.yaml"
    with pytest.raises(ConfigError, match=r"r\.yaml: cannot read the recipe"):
        load_config(recipe)
    recipe.write_text("name: [")
    with pytest.raises(ConfigError, match=r"r\.yaml: not valid YAML: .*line 1"):
        load_config(recipe)
    recipe.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: a recipe is a YAML mapping of sections, this is list"):
        load_config(recipe)


def test_a_saved_run_of_before_reads_as_it_was(tmp_path):
    """Its settings all stand in its file, those that have another default now, too."""
    values = parse_config(MINIMAL).model_dump(mode="json")
    made = {"config": None, "split": None, "fields": None, "layout": None}
    values["data"] = {
        "train": {"path": "testbed:rl", "rows": 4096, **made},
        "corpus": {"path": "mine.jsonl", "rows": None, **made},
        "validation": {"path": "testbed:validation", "rows": 128, **made},
        "test": {"path": "testbed:test", "rows": 500, **made},
        "prompt_suffix": "",
        "max_prompt_tokens": 128,
        "max_response_tokens": 96,
        "max_bad_fraction": 0.001,
        "deduplicate": "question",
        "decontaminate": {"ngram": 13, "min_overlap": 0.1},
    }
    values["calibration"] |= {"sequences": 256, "max_tokens": 512, "batch_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_saved_config(tmp_path / "config.json")
    again = config.model_dump(mode="json")
    assert {name: value for name, value in again["data"].items() if name != "held_out"} == values["data"]
    assert {**again, "data": None} == {**values, "data": None}
    assert config.evaluation_set("test").path == "testbed:test" and config.evaluation_set("test").rows == 500
    assert config.prompt_suffix == "" and config.data.unnamed_sets(config.needs_answers) == []


def test_defaults_that_depend_on_others():
    def suffix(**values) -> str:
        return parse_config({**MINIMAL, **values}).prompt_suffix

    own = {"train": {"path": "mine.jsonl"}}
    assert suffix(data=own).endswith("put your final answer within \\boxed{}.")
    assert suffix(data=own | {"prompt_suffix": ""}) == "" and suffix(data=own | {"prompt_suffix": "!"}) == "!"
    assert suffix(data=own, evaluation={"judge": "reward"}) == "" and suffix() == ""
    config = parse_config({**MINIMAL, "data": own})
    assert config.evaluation_set("test") is None and config.data.unnamed_sets(True) == ["test", "validation"]
    assert "unknown key; did you mean 'held_out'" in refused({"data": {"heldout": 0.3}})
    assert "data.held_out" in refused({"data": {"held_out": 0.6}})


def test_overrides(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schedule: {channels_per_cycle: 64, channels_total: 128}\n")
    overrides = ["recovery.steps=3", "seed=7", "verl.actor_rollout_ref.actor.entropy_coeff=0.01"]
    config = load_config(recipe, overrides)
    assert (config.recovery[0].steps, config.seed) == (3, 7)
    assert config.verl == {"actor_rollout_ref.actor.entropy_coeff": 0.01}
    with pytest.raises(ConfigError, match="write it as key"):
        load_config(recipe, ["recovery.steps"])
    with pytest.raises(ConfigError, match="seed is a single value"):
        load_config(recipe, ["seed=1", "seed.x=2"])


def test_steps_of_each_cut():
    steps = parse_config({**MINIMAL, "recovery": {"steps": [4, 2]}}).recovery[0]
    assert [steps.steps_of(i) for i in range(4)] == [4, 2, 2, 2]


def test_recovery_is_one_or_a_list(tmp_path):
    assert [r.method for r in parse_config(MINIMAL).recovery] == ["grpo"]
    one = parse_config({**MINIMAL, "recovery": {"method": "cpt", "steps": 4}})
    assert [(r.method, r.steps) for r in one.recovery] == [("cpt", 4)]
    two = parse_config({**MINIMAL, "recovery": [{"cpt": {"steps": 4}}, {"grpo": None}, {"distill": {"topk": 8}}]})
    assert [r.method for r in two.recovery] == ["cpt", "grpo", "distill"]
    save_config(two, tmp_path / "config.json")
    assert read_saved_config(tmp_path / "config.json") == two
    other = parse_config({**MINIMAL, "recovery_of_cycle": {2: [{"cpt": {}}, {"grpo": {}}]}})
    assert [[r.method for r in other.recoveries(cut)] for cut in (0, 1)] == [["grpo"], ["cpt", "grpo"]]
    save_config(other, tmp_path / "config.json")
    assert read_saved_config(tmp_path / "config.json") == other


@pytest.mark.parametrize(
    ("recovery", "parts"),
    [
        ([{"cpt": {"stpes": 3}}], ["recovery.0.cpt.stpes", "did you mean 'steps'"]),
        ([{"grpo": {}}, {"cpt": {"prompts_per_step": 3}}], ["recovery.1.cpt.prompts_per_step", "unknown key"]),
        ([{"method": "sft"}], ["recovery.0", "'grpo', 'cpt', 'distill'"]),
        ([], ["recovery", "at least 1"]),
        ([{"cpt": {"max_tokens": 512, "micro_batch_tokens": 256}}], ["micro_batch_tokens 256", "max_tokens 512"]),
        ([{"cpt": {"cross_entropy": 0}}], ["parent_kl", "nothing to learn"]),
        ([{"distill": {"rewards": True}}], ["rollouts_per_prompt"]),
        ([{"distill": {"teacher_workers_per_node": 3, "teacher_tensor_parallel_size": 2}}], ["multiple", "3", "2"]),
    ],
)
def test_a_wrong_recovery_is_named(recovery, parts):
    message = refused({"recovery": recovery})
    for part in parts:
        assert part in message


def test_a_parent_that_teaches_needs_gpus_of_its_own():
    resources = {"device": "cuda", "workers_per_node": 8}
    distill = {"distill": {"teacher_workers_per_node": 8}}
    assert "leaves none of 8" in refused({"recovery": [distill], "resources": resources})
    shared = {"distill": {"teacher_workers_per_node": 3, "prompts_per_step": 8}}
    assert "shared equally by 5 workers" in refused({"recovery": [shared], "resources": resources})


def test_rollouts_as_calibration_need_a_recovery_that_has_some():
    message = refused({"recovery": [{"cpt": {}}], "calibration": {"source": "rollouts"}})
    assert "no recovery is grpo" in message


def test_the_shipped_reward_is_known_by_its_name_in_every_installation(repository, tmp_path):
    shipped = repository / "reward/programs/reward.py"
    for path in ("code", str(shipped), str(repository / "reward/code.py")):  # the last is of earlier versions
        reward = parse_config({**MINIMAL, "reward": {"path": path}}).reward
        assert reward.path == "code" and reward.file == str(shipped)
    own = parse_config({**MINIMAL, "reward": {"path": str(tmp_path / "code.py")}}).reward
    assert own.path == own.file == str(tmp_path / "code.py")
    assert parse_config(MINIMAL).reward.file is None


def test_a_reward_whose_path_verl_would_not_read_as_it_is_is_refused():
    assert "verl takes ${ in a path for a reference" in refused({"reward": {"path": "/tmp/${x}/mine.py"}})


def test_overrides_reach_into_lists(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schedule: {channels_per_cycle: [64]}\nrecovery: [{cpt: {steps: 2}}, {grpo: {}}]\n")
    config = load_config(recipe, ["recovery.0.cpt.steps=7", "recovery.1.grpo.steps=3"])
    assert [r.steps for r in config.recovery] == [7, 3]
    with pytest.raises(ConfigError, match="recovery is a list of 2; write its place, from 0"):
        load_config(recipe, ["recovery.steps=3"])


def test_data_is_one_source_or_a_list(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "schedule: {channels_per_cycle: 64, channels_total: 128}\n"
        "recovery: {method: cpt}\n"
        "data:\n"
        "  train: [{path: a.jsonl}, {path: b.jsonl, fields: {text: t}}]\n"
        "  deduplicate: off\n"
        "  decontaminate: off\n"
    )
    config = load_config(recipe, ["data.train.1.rows=5", "data.corpus.path=c.jsonl"])
    assert [(s.path, s.rows) for s in config.data.train_sources] == [("a.jsonl", None), ("b.jsonl", 5)]
    assert [s.path for s in config.data.corpus_sources] == ["c.jsonl"]
    assert (config.data.deduplicate, config.data.decontaminate) == ("off", None)
    save_config(config, tmp_path / "config.json")
    assert read_saved_config(tmp_path / "config.json") == config
    again = load_config(recipe, ["data.train={path: d.jsonl}", "data.decontaminate={ngram: 8}", "data.deduplicate=on"])
    assert [s.path for s in again.data.corpus_sources] == ["d.jsonl"]
    assert again.data.decontaminate.ngram == 8 and again.data.deduplicate == "question"
