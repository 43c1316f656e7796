"""A model that is not what it seems is refused by every command, before anything reads it."""

import json
import shutil
from pathlib import Path

import pytest
from data_rows import run_config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import parse_config
from ptl_rl.driver import preflight
from ptl_rl.driver.prompt_checks import check_tokenizer
from ptl_rl.errors import PathError, check_plain, resume_command
from ptl_rl.models import check_tokenizer as check_vocabulary
from ptl_rl.models import load_tokenizer, resolve_model

DATA = ["--data", "testbed:rl", "--set", "data.rows=8"]


@pytest.fixture
def model(make_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "model"))


def commands(model: Path, out: Path) -> list[list[str]]:
    plan = out.with_name("plan.json")
    keep = {"keep_channels": [list(range(48))] * 3, "keep_layers": [0, 1, 2], "layer_order": [], "alignment": 1}
    keep |= {"source_intermediate_size": 48, "channel_criterion": "random", "layer_criterion": "explicit"}
    plan.write_text(json.dumps(keep | {"subset_hash": "", "source": "", "compensate": "none"}))
    return [
        ["score", str(model), *DATA, "--remove-layers", "1", "--out", str(out)],
        ["slice", str(model), str(plan), str(out), "--no-check"],
        ["slicegpt", str(model), str(out), *DATA, "--remove", "8"],
        ["eval", str(model), "--tasks", "boxed", "--data", "boxed=testbed:test", "--limit", "2", "--out", str(out)],
    ]


def refused(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and says in result.output and "Traceback" not in result.output, result.output


def recipe(tmp_path: Path, **model):
    return parse_config(run_config(tmp_path).model_dump() | {"model": model})


def test_every_command_holds_the_weights_against_the_configuration(model, tmp_path):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"model_type": "qwen2"}))
    for arguments in [*commands(model, tmp_path / "out"), ["speed", str(model)]]:
        refused(arguments, f"error: {model}: the weights are not those of its config.json, a qwen2")
    assert not (tmp_path / "out").exists()
    for config, setting in (
        (recipe(tmp_path, path=str(model)), "model.path"),
        (recipe(tmp_path, path="testbed", parent=str(model)), "model.parent"),
    ):
        with pytest.raises(ConfigError, match=f"{setting}: .*the weights are not those of its config.json"):
            preflight.check_model(config)


def test_every_command_refuses_weights_that_are_no_numbers(model, tmp_path, monkeypatch):
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for arguments in [*commands(model, tmp_path / "out"), ["speed", str(model)]]:
        refused(arguments, "model.norm.weight holds values that are infinite or not a number")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "tokenizer.json: is a Git LFS pointer"),
        ("tokenizer.json", "", "tokenizer.json: is empty"),
        ("tokenizer.json", "{}", "has no tokenizer that transformers can load"),
        ("tokenizer_config.json", "[]", "has no tokenizer that transformers can load"),
        ("tokenizer_config.json", "null", "has no tokenizer that transformers can load"),
        ("tokenizer_config.json", "{", "has no tokenizer that transformers can load"),
    ],
)
def test_tokenizers_that_cannot_be_read(name, content, says, model, tmp_path):
    (model / name).write_text(content)
    score, _, slicegpt, evaluate = commands(model, tmp_path / "out")
    for arguments in (score, slicegpt, evaluate):
        refused(arguments, says)
    with pytest.raises(ConfigError, match=says):
        check_tokenizer(recipe(tmp_path, path=str(model)), model)


@pytest.mark.parametrize("changes", [{"rope_parameters": "long"}, {"rms_norm_eps": []}, {"bos_token_id": {}}])
def test_settings_that_transformers_cannot_read(changes, model, tmp_path):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | changes))
    for arguments in commands(model, tmp_path / "out"):
        refused(arguments, f"error: {model}/config.json: transformers cannot read it (")
    with pytest.raises(ConfigError, match=rf"model\.path: {model}/config\.json: transformers cannot read it"):
        check_tokenizer(recipe(tmp_path, path=str(model)), model)


def test_a_folder_without_a_tokenizer_and_one_that_knows_no_text(model):
    values = json.loads((model / "tokenizer.json").read_text())
    values["model"] |= {"vocab": {}, "merges": []}
    (model / "tokenizer.json").write_text(json.dumps(values | {"added_tokens": []}))
    with pytest.raises(ConfigError, match="its tokenizer makes nothing of text"):
        load_tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer \(none of tokenizer\.json"):
        load_tokenizer(model)
    (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "own.Own"]}}')
    check_vocabulary(model)  # its code has one, or makes one


def test_a_tokenizer_of_another_model(model):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"vocab_size": 200}))
    with pytest.raises(ConfigError, match=r"its tokenizer has 3.. tokens, but the model 200 embeddings"):
        load_tokenizer(model)


def test_a_chat_template_that_cannot_be_put_to_a_question(model, tmp_path):
    config = recipe(tmp_path, path=str(model))
    check_tokenizer(config, model)
    for template in ("{% if %}", "{{ raise_exception('no user may speak') }}", "{{ messages[7]['content'] }}"):
        (model / "chat_template.jinja").write_text(template)
        with pytest.raises(ConfigError, match="its chat template cannot be put to a question"):
            check_tokenizer(config, model)


@pytest.mark.parametrize("mark", ["[1]", "*", "?", "${x}"])
def test_paths_that_vllm_and_verl_would_not_read(mark, model, tmp_path):
    with pytest.raises(PathError, match="rename the folder"):
        check_plain(tmp_path / mark)
    odd = model.rename(tmp_path / f"a{mark}")
    config = recipe(tmp_path, path=str(odd))
    with pytest.raises(ConfigError, match=r"model\.path: .* rename the folder"):
        preflight.check_model(config)
    with pytest.raises(PathError, match="rename the folder"):
        preflight.check(recipe(tmp_path, path="testbed"), tmp_path / f"run{mark}")
    refused(commands(odd, tmp_path / "out")[3], "rename the folder")
    refused(["speed", str(odd)], "rename the folder")


def test_names_too_long_for_a_file_system():
    with pytest.raises(ConfigError, match=r"model: xxxx.*: File name too long"):
        resolve_model("x" * 5000, setting="model")


def test_what_is_shown_to_go_on_with_is_quoted():
    assert resume_command(Path("runs/a-1")) == "ptl resume runs/a-1"
    assert resume_command(Path("my runs/it's $1")) == "ptl resume 'my runs/it'\"'\"'s $1'"
