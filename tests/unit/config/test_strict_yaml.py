"""What YAML's plain loader takes without a word, or cannot take, is refused in a sentence with its line."""

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import field_map, load_config, override_text, read_saved_config
from ptl_rl.config.strict_yaml import read_yaml_text

LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)
TOWER = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [[[[[[[[*a{i - 1}]]]]]]]]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nname: x\nseed: 2\n", "the key 'seed' twice in one mapping, first in line 1; keep one in line 3"),
        ("gate: {max_retries: 1, 'max_retries': 2}", "the key 'max_retries' twice"),
        ("recovery_of_cycle: {1: {cpt: {}}, '1': {grpo: {}}}", "the key '1' twice"),
        ("recovery: [{grpo: {steps: 1, steps: 2}}]", "the key 'steps' twice"),
        ("x: &a {k: 1}\ny: &b {k: 2}\nz: {<<: *a, <<: *b}", "the key '<<' twice"),
        ("verl: " + "[" * 3000 + "]" * 3000, "too many mappings and lists within one another"),
        ("- " * 3000, "too many mappings and lists within one another"),
        ("verl: &a {b: [*a]}", "a value that holds itself by an alias"),
        ("verl: &a\n  ? *a\n  : 1", "a value that holds itself by an alias"),
        (LAUGHS, "aliases that come to too many values"),
        (TOWER, "values too deep"),
        ("seed: " + "1" * 5000, "Exceeds the limit (4300 digits)"),
        ("name: 2020-13-45", "month must be in 1..12"),
        ('data: {prompt_suffix: "\\ud83d"}', "half of a surrogate pair"),
        ("seed: !!int ''", "not valid YAML"),
        ("seed: !!bool x", "not valid YAML"),
        ("seed: !!timestamp x", "not valid YAML"),
        ("{[a]: 1}", "unhashable key"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, says, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text, errors="surrogatepass")
    with pytest.raises(ConfigError) as error:
        load_config(recipe)
    assert str(error.value).startswith(f"{recipe}: not valid YAML: ") and says in str(error.value), str(error.value)
    assert "\n" not in str(error.value) and "unicode string" not in str(error.value)


def test_what_yaml_means_by_it_is_read():
    assert read_yaml_text("x: &a {k: 1, l: 1}\ny:\n  <<: *a\n  k: 2\n", "r")["y"] == {"k": 2, "l": 1}
    assert read_yaml_text("a: {k: 1}\nb: {k: 1}\nc: [{k: 1}, {k: 1}]", "r")["c"] == [{"k": 1}, {"k": 1}]
    assert read_yaml_text("a: &a [1, 2]\nb: [*a, *a]", "r")["b"] == [[1, 2], [1, 2]]
    assert read_yaml_text("", "r") is None and read_yaml_text('"\\ud83d\\ude00"', "r") == "\U0001f600"


@pytest.mark.parametrize("text", ["1" * 5000, "2020-13-45", "{a: 1, a: 2}", "&a [*a]", "[" * 3000, "!!int ''"])
def test_overrides_and_fields_are_read_alike(text, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schedule: {layers_total: 1}\n")
    with pytest.raises(ConfigError, match=r"`settings` .seed=.*not valid YAML"):
        load_config(recipe, [f"seed={text}"])
    with pytest.raises(ConfigError, match=r"`fields` .*not valid YAML"):
        field_map(text, "`fields`")


def test_values_of_python_that_no_recipe_can_hold():
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(ConfigError, match="`settings` verl: list is no value of YAML"):
        override_text("verl", deep)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"\xff\xfe", b"", b"{", b"[" * 3000, b'{"seed": ' + b"1" * 5000 + b"}"]
)
def test_a_damaged_configuration_of_a_run_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: not a run's configuration \(.*is this a run folder\?"):
        read_saved_config(tmp_path / "config.json")
