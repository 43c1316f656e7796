"""``ptl export``, ``report`` and ``compare`` as commands, on a made-up run whose last model is a real, tiny one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from run_folders import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.driver.run_folder import RunFolder


def ptl(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def run(tmp_path, make_checkpoint) -> Path:
    """Its second cycle left a model, with what a recovery leaves beside it."""
    folder = make_run(tmp_path / "run")
    recovered = folder / "cycles/002/recovered"
    shutil.rmtree(recovered)
    shutil.copytree(make_checkpoint("qwen2"), recovered)
    (recovered / "rollouts.jsonl").write_text("of the run alone")
    return folder


def test_an_exported_model_is_the_runs_and_loads_without_the_project(run, tmp_path):
    out = tmp_path / "published/small"
    status, output = ptl("export", run, out, "--dtype", "float32", "--license", "mit", "--name", "Small-1")
    assert (status, output) == (0, f"model: {out}\n")
    assert not (out / "rollouts.jsonl").exists() and [path.name for path in out.parent.iterdir()] == ["small"]
    source = run / "best"
    ids = AutoTokenizer.from_pretrained(out)("Leo has 3 books.", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, AutoTokenizer.from_pretrained(source)("Leo has 3 books.", return_tensors="pt")["input_ids"])
    exported, recovered = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, source))
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, recovered(ids).logits)
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit" and "# Small-1" in card


def test_weights_are_in_the_type_that_was_evaluated_unless_asked_otherwise(run, tmp_path):
    assert ptl("export", run, tmp_path / "out")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_nothing_is_exported_over_something_or_from_nothing(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    status, output = ptl("export", run, tmp_path / "out")
    assert status == 2 and f"error: {tmp_path / 'out'}: exists and is not an empty folder" in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    stopped = make_run(tmp_path / "stopped", decisions=("stop", "stop"))
    status, output = ptl("export", stopped, tmp_path / "new")
    assert status == 2 and "no cycle was accepted, so there is no model but the original to export" in output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["report", "compare", "export"])
def test_a_journal_that_cannot_be_trusted_is_refused(run, tmp_path, command):
    with (run / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"cycle": 3}) + "\n")
    status, output = ptl(command, run, *([tmp_path / "out"] if command == "export" else []))
    assert status == 2 and f"error: {run / 'journal.jsonl'}:12: not a journal line: Field required" in output


def test_a_model_that_changed_since_its_stage_is_not_exported(run, tmp_path):
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    for line in lines:
        if line["artefact"] == "cycles/002/recovered":
            line["files"] = RunFolder(run).files_of(line["artefact"])
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    weights = run / "cycles/002/recovered/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    status, output = ptl("export", run, tmp_path / "out")
    assert status == 2 and f"error: {weights}: is not what its stage wrote" in output
    weights.write_bytes(before)
    assert ptl("export", run, tmp_path / "out")[0] == 0
