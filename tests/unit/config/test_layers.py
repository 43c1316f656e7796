"""A recipe on a base, and overrides: what is put together, and where an error says that a wrong key stands."""

import subprocess
import sys

import pytest
import yaml

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import as_recipe, load_config, parse_config, read_recipe, save_config

BASE = """
name: parent
data:
  train: {path: a.jsonl, rows: 100}
  corpus: [{path: b.jsonl}, {path: c.jsonl}]
  max_prompt_tokens: 64
schedule: {channels_per_cycle: 64, channels_total: 128}
recovery:
  - grpo: {steps: 4, kl_loss: 0.0}
recovery_of_cycle: {2: [{cpt: {steps: 9}}]}
verl: {trainer.test_freq: 3}
"""


@pytest.fixture
def on_base(tmp_path):
    """Writes a recipe on a base in another folder, and gives the paths of both."""

    def write(own: str, base: str = BASE):
        (tmp_path / "bases").mkdir(exist_ok=True)
        (tmp_path / "bases" / "b.yaml").write_text(base)
        recipe = tmp_path / "r.yaml"
        recipe.write_text("base: bases/b.yaml\n" + own)
        return recipe, tmp_path / "bases" / "b.yaml"

    return write


def test_sections_are_merged_and_lists_and_recoveries_replaced(on_base, monkeypatch):
    recipe, _ = on_base(
        "name: child\n"
        "data: {train: {rows: 7}, corpus: [{path: d.jsonl}], max_response_tokens: 32}\n"
        "recovery: [{cpt: {steps: 2}}]\n"
        "recovery_of_cycle: {1: [{cpt: {steps: 5}}]}\n"
        "verl: {trainer.log_val_generations: 1}\n"
    )
    monkeypatch.chdir(recipe.parent.parent)  # the base is found beside the recipe, wherever one is
    config = load_config(recipe, ["data.train.split=s", "schedule.channels_total=192"])
    assert config.name == "child"
    assert config.data.train.model_dump(exclude_unset=True) == {"path": "a.jsonl", "rows": 7, "split": "s"}
    assert [source.path for source in config.data.corpus] == ["d.jsonl"]
    assert (config.data.max_prompt_tokens, config.data.max_response_tokens) == (64, 32)
    assert (config.schedule.channels_per_cycle, config.schedule.channels_total) == (64, 192)
    assert [(r.method, r.steps) for r in config.recovery] == [("cpt", 2)]
    assert {cycle: [r.steps for r in entries] for cycle, entries in config.recovery_of_cycle.items()} == {1: [5]}
    assert config.verl == {"trainer.test_freq": 3, "trainer.log_val_generations": 1}
    assert read_recipe(recipe)["data"]["train"] == {"path": "a.jsonl", "rows": 7}


def test_a_recovery_of_the_base_stands_unless_the_recipe_has_one(on_base):
    recipe, _ = on_base("seed: 3\n")
    config = load_config(recipe, ["recovery.steps=6"])
    assert [(r.method, r.steps, r.kl_loss) for r in config.recovery] == [("grpo", 6, 0.0)]


def test_a_base_stands_alone(on_base, tmp_path):
    recipe, base = on_base("", "base: c.yaml\n" + BASE)
    with pytest.raises(ConfigError, match=r"r\.yaml: base: .*b\.yaml has a base itself; a recipe has one at most"):
        load_config(recipe)
    base.unlink()
    with pytest.raises(
        ConfigError, match=r"b\.yaml: cannot read the recipe \(the base of .*r\.yaml; copy both\): No such file"
    ):
        load_config(recipe)
    recipe.write_text("base: [a.yaml]\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: base: name one other recipe"):
        load_config(recipe)
    recipe.write_text(BASE)
    with pytest.raises(ConfigError, match="a base is named in the recipe's file alone"):
        load_config(recipe, ["base=b.yaml"])


@pytest.mark.parametrize(
    ("own", "base", "settings", "message"),
    [
        ("sed: 3\n", BASE, [], "{recipe}: sed: unknown key; did you mean 'seed'?"),
        ("", BASE + "sed: 3\n", [], "{base}: sed: unknown key; did you mean 'seed'?"),
        ("gate: {max_retris: 1}\n", BASE + "gate: {max_retries: 1}\n", [], "{recipe}: gate.max_retris: "),
        ("gate: {max_retries: 1}\n", BASE + "gate: {max_retris: 1}\n", [], "{base}: gate.max_retris: "),
        ("gate: {max_retries: 1}\n", BASE + "gate: {max_retries: x}\n", ["seed=-1"], "`settings` seed: "),
        ("data: {train: {rows: 0}}\n", BASE, [], "{recipe}: data.train.rows: "),
        ("data: {train: {rows: 1}}\n", BASE.replace("a.jsonl", "[]"), [], "{base}: data.train.path: "),
        ("", BASE.replace("kl_loss", "kl_los"), [], "{base}: recovery.0.grpo.kl_los: "),
        ("recovery: {kl_los: 0}\n", BASE, [], "{recipe}: recovery.kl_los: "),
        ("", BASE, ["recovery.stpes=3"], "`settings` recovery.stpes: unknown key; did you mean 'steps'?"),
        ("", BASE, ["recovery={cpt: {stpes: 3}}"], "`settings` recovery.0.cpt.stpes: unknown key"),
        ("", BASE, ["recovry.steps=3"], "`settings` recovry.steps: recovry: unknown key; did you mean 'recovery'?"),
        (
            "criterion: {channels: wanda}\n",
            BASE,
            ["criterion.contrast.weight=1"],
            "`settings` criterion.contrast.weight: criterion.contrast.data: Field req",
        ),
        ("", BASE, ["data.corpus.1.rowz=3"], "`settings` data.corpus.1.rowz: unknown key"),
        ("", BASE, ["data.corpus=[{path: x, rowz: 3}]"], "`settings` data.corpus.0.rowz: unknown key"),
        ("schedule: {layers_total: 1, recover_only: true}\n", BASE, [], "{recipe} on {base}: schedule: recover_only"),
        ("schedule: {layers_total: 1}\n", BASE.replace("64, channels_total: 128", "0"), [], None),
        ("data: {train: {path: d.jsonl}}\n", BASE.replace("rows: 100", "rowz: 1"), [], "{base}: data.train.rowz: "),
        ("data: {train: [{path: d.jsonl}]}\n", BASE.replace("rows: 100", "rowz: 1"), [], None),
        ("", BASE.replace("schedule", "model"), [], "{base}: model.channels_per_cycle: "),
    ],
)
def test_errors_name_where_the_wrong_key_stands(on_base, own, base, settings, message):
    recipe, path = on_base(own, base)
    if message is None:
        load_config(recipe, settings)
        return
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, settings)
    said = str(caught.value)
    assert said.startswith(message.format(recipe=recipe, base=path)), said
    assert "\n" not in said


def test_one_message_tells_of_every_file(on_base):
    recipe, base = on_base("sed: 3\nnam: x\n", BASE + "gat: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, ["recovery.stpes=1"])
    said = str(caught.value)
    assert said.count(str(recipe)) == said.count(str(base)) == said.count("`settings` recovery.stpes: ") == 1, said
    assert said.index(str(recipe)) < said.index("sed: ") < said.index("nam: ") and f"{base}: gat: " in said


SHORT, NAMED, LISTED = "recovery: {steps: 2}", "recovery: {grpo: {steps: 2}}", "recovery: [{grpo: {steps: 2}}]"


@pytest.mark.parametrize("written", [SHORT, NAMED, LISTED, "recovery: [{method: grpo, steps: 2}]", "seed: 1"])
@pytest.mark.parametrize(
    "key", ["recovery.steps", "recovery.grpo.steps", "recovery.0.steps", "recovery.0.grpo.steps"]
)  # fmt: skip
def test_a_setting_of_a_single_recovery_is_reached_however_it_is_written(written, key, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"schedule: {{layers_total: 1}}\n{written}\n")
    config = load_config(recipe, [f"{key}=4", "recovery.learning_rate=0.5", "recovery.verl={a.b: 1}"])
    (recovery,) = config.recovery
    assert (recovery.method, recovery.steps, recovery.learning_rate) == ("grpo", 4, 0.5)
    assert recovery.verl == {"a.b": 1}


def test_overrides_know_the_method_of_each_recovery(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schedule: {layers_total: 1}\nrecovery: [{cpt: {steps: 2}}, {steps: 3}]\n")
    config = load_config(recipe, ["recovery.0.max_tokens=64", "recovery.1.kl_loss=0.5", "recovery.1.grpo.steps=5"])
    assert (config.recovery[0].max_tokens, config.recovery[1].kl_loss, config.recovery[1].steps) == (64, 0.5, 5)
    with pytest.raises(ConfigError, match=r"the recipe has cpt there, .* write 'recovery\.0={METHOD"):
        load_config(recipe, ["recovery.0.grpo.steps=5"])
    with pytest.raises(ConfigError, match="recovery is a list of 2; write its place, from 0"):
        load_config(recipe, ["recovery.2.steps=5"])
    recipe.write_text("schedule: {layers_total: 1}\n")
    assert load_config(recipe, ["recovery.cpt.steps=5"]).recovery[0].method == "cpt"
    assert load_config(recipe, ["recovery.method=cpt", "recovery.steps=5"]).recovery[0].steps == 5
    assert load_config(recipe, ["recovery={cpt: {steps: 5}}", "recovery.steps=6"]).recovery[0].steps == 6
    recipe.write_text(f"schedule: {{layers_total: 1}}\n{LISTED}\n")
    with pytest.raises(ConfigError, match=r"the recipe has grpo there, .* write 'recovery={METHOD"):
        load_config(recipe, ["recovery.cpt.steps=5"])
    assert load_config(recipe, ["recovery.method=cpt"]).recovery[0].method == "cpt"


def shipped(repository):
    return sorted([*repository.glob("recipes/*.yaml"), *repository.glob("ptl_rl/studies/recipes/*.yaml")])


def test_shipped_recipes_name_their_recoveries_and_load_again_as_they_are_resolved(repository, tmp_path):
    assert len(shipped(repository)) > 15
    for recipe in shipped(repository):
        values, config = read_recipe(recipe), load_config(recipe)
        assert [list(entry) for entry in values["recovery"]] == [[r.method] for r in config.recovery], recipe
        (tmp_path / "one.yaml").write_text(as_recipe(config))
        assert load_config(tmp_path / "one.yaml") == config, recipe


def test_what_a_recipe_resolves_to_keeps_what_is_not_a_default(tmp_path):
    values = {
        "schedule": {"channels_per_cycle": [64, 32], "order": "together"},
        "data": {
            "decontaminate": "off",
            "deduplicate": "off",
            "prompt_suffix": "\nThink.",
            "validation": {"path": "x"},
        },
        "recovery": [{"grpo": {}}, {"cpt": {"warmup_ratio": None, "learning_rate": 1e-6, "verl": {"optim.lr": 2e-5}}}],
        "recovery_of_cycle": {2: [{"distill": {"topk": 8}}]},
        "recovery_if_unlearnable": [{"cpt": {"steps": 9}}],
    }
    values["recovery"][0]["grpo"]["min_learnable_fraction"] = 0.1
    config = parse_config(values)
    text = as_recipe(config)
    assert "- grpo: {min_learnable_fraction: 0.1}" in text and "method" not in text and "watchdog" not in text
    (tmp_path / "one.yaml").write_text(text)
    assert load_config(tmp_path / "one.yaml") == config


def test_plan_prints_the_resolved_recipe_and_a_saved_run_is_whole(on_base, tmp_path):
    recipe, _ = on_base("model: {path: /nowhere}\n")
    command = [sys.executable, "-m", "ptl_rl.cli", "plan", str(recipe), "--resolved", "--set", "recovery.steps=6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (tmp_path / "one.yaml").write_text(done.stdout)
    config = load_config(recipe, ["recovery.steps=6"])
    assert load_config(tmp_path / "one.yaml") == config and "base" not in done.stdout
    save_config(config, tmp_path / "config.json")
    assert '"path": "a.jsonl"' in (tmp_path / "config.json").read_text()


def test_the_readme_of_the_recipes_names_every_base(repository):
    stated = {recipe.name: yaml.safe_load(recipe.read_text()).get("base") for recipe in shipped(repository)}
    bases = {name: base for name, base in stated.items() if base}
    table = (repository / "recipes" / "README.md").read_text().split("| recipe | its base |\n|---|---|\n")[1]
    rows = [line.split("`") for line in table.split("\n\n")[0].splitlines()]
    assert {row[1]: row[3] for row in rows} == bases and len(bases) > 3


def test_verl_keys_are_dotted_however_a_recipe_its_base_and_overrides_write_them(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "schedule: {channels_per_cycle: [64]}\nverl: {actor.lr: 1, trainer: {a: 1, b: 2}}\n"
    )
    recipe = tmp_path / "own.yaml"
    recipe.write_text("base: base.yaml\nverl: {actor: {lr: 2}}\nrecovery: [{grpo: {verl: {actor: {clip: 0.1}}}}]\n")
    config = load_config(recipe)
    assert config.verl == {"actor.lr": 2, "trainer.a": 1, "trainer.b": 2}
    assert config.recovery[0].verl == {"actor.clip": 0.1}
    overrides = ["verl.actor={lr: 3}", "verl.trainer.a=4", "recovery.verl.actor.clip=0.2"]
    config = load_config(recipe, overrides)
    assert config.verl == {"actor.lr": 3, "trainer.a": 4, "trainer.b": 2}
    assert config.recovery[0].verl == {"actor.clip": 0.2}


@pytest.mark.parametrize("text", ["verl: {SETTINGS}", "recovery: [{cpt: {verl: {SETTINGS}}}]"])
def test_a_verl_key_that_is_given_nested_and_dotted_is_refused(tmp_path, text):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("SETTINGS", "optim.lr: 1, optim: {lr: 2}"))
    with pytest.raises(ConfigError, match=r"recipe\.yaml: .*verl: optim\.lr is given twice, nested and dotted"):
        load_config(recipe)


@pytest.mark.parametrize("text", ["verl: {SETTINGS}", "recovery: [{cpt: {verl: {SETTINGS}}}]"])
@pytest.mark.parametrize("settings", ["model: {lora_rank: 8}", "actor_rollout_ref.model.lora_adapter_path: here"])
def test_adapters_are_refused_as_the_next_cut_would_be_without_them(tmp_path, text, settings):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("SETTINGS", settings))
    with pytest.raises(ConfigError, match=r"recipe\.yaml: .*lora_\w+: \w+: adapters \(LoRA\) are not in the weights"):
        load_config(recipe)
    recipe.write_text("schedule: {recover_only: true}\n" + text.replace("SETTINGS", "model: {lora_rank: 0}"))
    load_config(recipe)
