"""``ptl slicegpt`` as a command: a folder that loads, its sizes in words, and refusals with status 2."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ptl_rl.baselines import slicegpt
from ptl_rl.cli import app

DATA = ["--data", "testbed:rl", "--set", "data.rows=12", "--set", "calibration.sequences=12"]


def ptl(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["slicegpt", *(str(argument) for argument in arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_a_model_with_a_narrower_stream(make_checkpoint, tmp_path):
    source, out = make_checkpoint("llama"), tmp_path / "made/narrow"
    status, output = ptl(source, out, *DATA, "--remove", "25%")
    assert status == 0, output
    assert "residual stream 32 -> 24 units" in output and f"sliced model: {out}" in output
    slicegpt.register()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    before = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(source).parameters())
    after = sum(weight.numel() for weight in model.parameters())
    assert f"{before:,} -> {after:,} parameters ({after / before:.0%})" in output
    facts = json.loads((out / slicegpt.NOTE).read_text())
    assert (facts["source"], facts["hidden_size"], facts["source_hidden_size"]) == (str(source), 24, 32)
    assert [path.name for path in out.parent.iterdir()] == ["narrow"]  # nothing half-made beside it
    status, output = ptl(source, out, *DATA, "--remove", "25%")
    assert status == 2 and f"error: {out}: exists and is not an empty folder" in output


@pytest.mark.parametrize(
    ("family", "arguments", "said"),
    [
        ("llama", ["--remove", "much"], "error: --remove much: give a number of units, or a percentage as 25%"),
        ("llama", ["--remove", "100%"], "error: --remove 100%: the residual stream has 32 units, and 0 would stay"),
        ("llama", ["--remove", "8", "--set", "calibration.sequence=4"], "did you mean 'sequences'?"),
        ("llama", ["--remove", "8", "--set", "data.path=nothing.jsonl"], "nothing.jsonl: no such file"),
        ("gemma2", ["--remove", "8"], "so SliceGPT has no form for it; it takes "),
    ],
)
def test_what_cannot_be_sliced_is_refused_and_leaves_nothing(make_checkpoint, tmp_path, family, arguments, said):
    status, output = ptl(make_checkpoint(family), tmp_path / "out", *DATA, *arguments)
    assert status == 2 and output.startswith("error: ") and said in output
    assert list(tmp_path.iterdir()) == []
