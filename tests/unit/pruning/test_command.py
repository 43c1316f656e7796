"""``ptl score`` and ``ptl slice`` as a user calls them, on a folder of any supported family."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.families import FAMILIES

DATA = ["--data", "testbed:rl", "--set", "data.rows=12", "--set", "calibration.batch_size=4"]
CUT = ["--remove-channels", "50%", "--alignment", "8"]


def ptl(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_score_and_slice(family, make_checkpoint, tmp_path):
    source, scores, out = make_checkpoint(family), tmp_path / "scores", tmp_path / "sliced"
    status, output = ptl("score", source, *DATA, *CUT, "--remove-layers", 1, "--out", scores)
    assert status == 0, output
    assert "keeps 2 blocks of 24 channels, of 3 of 48" in output
    assert load_file(scores / "scores.safetensors")["importance_LC"].shape == (3, 48)
    status, output = ptl("slice", source, scores, out)
    assert status == 0 and "logits differ from the masked original's by" in output
    sliced = AutoModelForCausalLM.from_pretrained(out)
    assert (sliced.config.num_hidden_layers, sliced.config.intermediate_size) == (2, 24)
    assert sliced(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    status, output = ptl("slice", source, scores, out)
    assert status == 2 and "exists and is not an empty folder" in output
    status, output = ptl("slice", make_checkpoint(family, seed=1), scores, tmp_path / "other")
    assert status == 2 and "is another model; score that one" in output


def test_shipped_models_by_their_name_and_others_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no folder of that name here
    status, output = ptl("score", "testbed:llama", *DATA, "--remove-layers", 1, "--out", "scores")
    assert status == 0 and "keeps 5 blocks of 768 channels, of 6 of 768" in output, output
    assert ptl("slice", "testbed:llama", "scores", "sliced", "--no-check")[0] == 0
    for name, message in (
        ("testbed:bert", "model: testbed:bert: no such checkpoint"),
        ("llama", "model: llama is not"),
    ):
        for arguments in (["score", name, *DATA, "--out", "other"], ["slice", name, "scores", "other"]):
            status, output = ptl(*arguments)
            assert status == 2 and message in output


def test_general_text_and_another_criterion(make_checkpoint, tmp_path):
    text = tmp_path / "english.jsonl"
    text.write_text("".join(json.dumps({"text": f"The {i}th morning was cold."}) + "\n" for i in range(9)))
    options = ["--set", "criterion.channels=ptl_reference", "--set", "criterion.compensate=none"]
    options += ["--set", f"criterion.contrast={json.dumps({'data': {'path': str(text), 'fields': {'text': 'text'}}})}"]
    source = make_checkpoint("llama")
    status, output = ptl("score", source, *DATA, *CUT, "--out", tmp_path / "scores", *options)
    assert status == 0, output
    plan = json.loads((tmp_path / "scores" / "plan.json").read_text())
    assert plan["channel_criterion"] == "ptl_reference" and plan["compensate"] == "none"
    assert ptl("slice", source, tmp_path / "scores" / "plan.json", tmp_path / "out", "--no-check")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--remove-channels", "110%"], "each block has 48 channels, so 0 to 47 can go"),
        (["--remove-channels", "half"], "give a number of channels, or a percentage"),
        (["--remove-layers", "3"], "the model has 3 blocks, so 0 to 2 can go"),
        (["--set", "criterion.channels=wandda"], "did you mean 'wanda'?"),
        (["--set", "criterion.chanels=wanda"], "did you mean 'channels'?"),
        (
            ["--set", "criterion.layers=explicit", "--set", "criterion.layer_ids=[1]"],
            "names 1 blocks, but --remove-layers",
        ),
        (["--set", "criterion.channels=obs", "--set", "criterion.threshold=0.5"], "obs gives an order; choose another"),
        (["--set", "criterion={"], "--set 'criterion={': not valid YAML"),
        (["--set", "calibration.source=both"], "only a run has rollouts"),
        (["--remove-channels", "inf%"], "give a number of channels, or a percentage"),
        (["--set", "data.rows=null"], "the test bed is endless; set rows"),
        (["--remove-channels", "24", "--alignment", "64"], "--remove-channels 24: no channels go: between 24 and 48"),
    ],
)
def test_wrong_settings_of_score_are_refused(arguments, message, make_checkpoint, tmp_path):
    status, output = ptl("score", make_checkpoint("llama"), *DATA, "--out", tmp_path / "scores", *arguments)
    assert status == 2
    assert message in output
    assert not (tmp_path / "scores" / "plan.json").exists()


def test_unsupported_models_are_refused_with_the_list(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_local_experts": 8}))
    for arguments in (
        ["score", tmp_path, *DATA, "--out", tmp_path / "s"],
        ["slice", tmp_path, _plan(tmp_path), tmp_path / "o"],
    ):
        status, output = ptl(*arguments)
        assert status == 2
        assert "'mixtral' is a mixture of experts (num_local_experts is 8)" in output
        assert "supported: gemma2, gemma3_text, llama, mistral, qwen2, qwen3" in output


def _plan(folder, **changes):
    values = {
        "keep_channels": [[0], [0], [0]],
        "keep_layers": [0, 1, 2],
        "layer_order": [],
        "source_intermediate_size": 64,
        "alignment": 1,
        "channel_criterion": "random",
        "layer_criterion": "explicit",
        "subset_hash": "",
        "source": "",
    }
    path = folder / "a_plan.json"
    path.write_text(json.dumps({**values, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the plan is of a model with 3 blocks of 64 channels, but"),
        ({"compensate": "least_squares"}, "is missing; score again, or set its compensate to none"),
        ({"alignment": 0}, "not a pruning plan: alignment: Input should be greater than or equal to 1"),
        ({"keep_layers": "all"}, "not a pruning plan: keep_layers: Input should be a valid array"),
    ],
)
def test_plans_of_something_else_are_refused(changes, message, make_checkpoint, tmp_path):
    status, output = ptl("slice", make_checkpoint("llama"), _plan(tmp_path, **changes), tmp_path / "out")
    assert status == 2
    assert message in output
    assert not (tmp_path / "out").exists()


def test_a_missing_plan_is_named(make_checkpoint, tmp_path):
    status, output = ptl("slice", make_checkpoint("llama"), tmp_path / "none.json", tmp_path / "out")
    assert status == 2 and "none.json: cannot read the plan: No such file" in output
