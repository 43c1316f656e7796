"""A command ends with a sentence for what a user can mend, and with a kept traceback for everything else."""

import errno
import tempfile

import pytest
import torch
from typer.testing import CliRunner

from ptl_rl import api
from ptl_rl.cli import app
from ptl_rl.cli.common import in_options, make_console
from ptl_rl.errors import OutputError, UserError, check_new_file, check_new_folder
from ptl_rl.families import UnsupportedModelError


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PTL_TRACEBACK", raising=False)


def slice_with(error: Exception, monkeypatch):
    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr(api, "slice", fail)
    return CliRunner().invoke(app, ["slice", "testbed", "plan.json", "out"])


def test_what_the_user_can_mend_is_one_sentence(monkeypatch):
    result = slice_with(UnsupportedModelError("config.json: no such family; use another"), monkeypatch)
    assert (result.exit_code, result.output.strip()) == (2, "error: config.json: no such family; use another")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError, KeyError])
def test_errors_of_python_and_of_libraries_are_not_called_bad_input(kind, monkeypatch):
    result = slice_with(kind("of a library"), monkeypatch)
    assert result.exit_code == 1 and f"unexpected {kind.__name__}: " in result.output


def test_what_the_user_can_mend_is_refused_whatever_else_it_is(monkeypatch):
    for error in (OutputError("out: exists"), UserError("out: exists")):
        assert slice_with(error, monkeypatch).exit_code == 2


def test_memory_that_runs_out_is_not_called_bad_input(monkeypatch, tmp_path):
    result = slice_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), monkeypatch)
    assert result.exit_code == 1
    assert "error: unexpected OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in result.output
    assert "not about what was given" in result.output and "Traceback (most" not in result.output
    (log,) = tmp_path.glob("ptl-error-*.log")
    assert str(log) in result.output
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and "test_errors.py" in text and "CUDA out of memory" in text


def test_the_traceback_is_shown_on_request_and_where_it_cannot_be_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PTL_TRACEBACK", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    result = slice_with(ZeroDivisionError("division by zero"), monkeypatch)
    assert result.exit_code == 1 and "Traceback (most recent call last)" in result.output
    assert "ptl-error" not in result.output


def test_a_full_disk_is_neither(monkeypatch, tmp_path):
    result = slice_with(OSError(errno.ENOSPC, "No space left on device", "/models/x.safetensors"), monkeypatch)
    assert result.exit_code == 1
    assert result.output.strip() == "error: /models/x.safetensors: No space left on device"
    assert not list(tmp_path.glob("ptl-error-*"))


OPTIONS = {"remove_channels": "--remove-channels", "settings": "--set", "licence": "--license", "model": "MODEL"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`remove_channels` 9x: give a number", "--remove-channels 9x: give a number"),
        ("`settings` 'a': write it as key", "--set 'a': write it as key"),
        ("`settings` remove_channels: unknown key", "--set remove_channels: unknown key"),
        ("`model`: no is not a folder", "MODEL: no is not a folder"),
        ("x.yaml: exists; see `licence` and `elsewhere`", "x.yaml: exists; see --license and `elsewhere`"),
        ("settings a.yaml: no such file; remove_channels/x", "settings a.yaml: no such file; remove_channels/x"),
    ],
)
def test_parameters_are_called_as_the_command_calls_them(message, expected):
    assert in_options(message, OPTIONS) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "RECIPE", "--set", "price_per_gpu_hour=3"], "--set price_per_gpu_hour: unknown key"),
        (["plan", "RECIPE", "--set", "recovery.steps="], "--set recovery.steps"),
        (["plan", "RECIPE", "--json", "--resolved"], "--json and --resolved print different things"),
        (["plan", "RECIPE", "--gpu", "h20"], "--gpu: h20 is not known"),
        (["doctor", "--set", "seed=1"], "--set: they change a recipe, and none is named"),
        (["doctor", "--lock", "/no/lock"], "--lock /no/lock: no such file"),
        (["score", "testbed", "--data", "testbed:rl", "--out", "o", "--remove-layers", "9"], "--remove-layers 9: the"),
        (["eval", "testbed", "--tasks", "boxed"], "--tasks boxed: whose questions? Name them: --data boxed=FILE"),
        (["eval", "testbed", "--tasks", "gsm8k", "--data", "gsm8k=hub:/"], "--data gsm8k: path: 'hub:/' names no data"),
        (["plan", "~nosuchuser/r.yaml"], "cannot read the recipe"),
        (["score", "~nosuchuser/m", "--data", "testbed:rl", "--out", "o"], "there is no such user"),
        (["score", "testbed", "--data", "~nosuchuser/x.jsonl", "--out", "o"], "there is no such user"),
    ],
)
def test_refusals_in_the_command_lines_words(arguments, says, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(repository / "recipes/demo_restart_cpu.yaml")
    result = CliRunner().invoke(app, [recipe if part == "RECIPE" else part for part in arguments])
    assert (result.exit_code == 2 and f"error: {says}" in result.output) or says in result.output, result.output
    assert "`" not in result.output and "Traceback" not in result.output


def test_paths_are_printed_as_they_are(capsys):
    make_console().print("runs/:cat:/best", soft_wrap=True)
    assert capsys.readouterr().out == "runs/:cat:/best\n"


def test_a_model_without_a_vocabulary_is_refused(make_checkpoint, tmp_path):
    """transformers makes an empty tokenizer of config.json alone, by which every text is empty."""
    folder = make_checkpoint("llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    score = ["score", str(folder), "--data", "testbed:rl", "--set", "data.rows=8", "--remove-layers", "1"]
    for arguments in ([*score, "--out", str(tmp_path / "o")], ["eval", str(folder), "--tasks", "gsm8k"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and f"error: {folder}: has no tokenizer (none of tokenizer.json" in result.output


def test_places_to_write_to(tmp_path):
    (tmp_path / "file").write_text("x")
    check_new_folder(tmp_path / "a/b")
    check_new_file(tmp_path / "page.html")
    for check, place, says in [
        (check_new_folder, tmp_path, "exists and is not an empty folder"),
        (check_new_folder, tmp_path / "file", "exists and is not an empty folder"),
        (check_new_folder, tmp_path / "file/a", "is a file, not a folder"),
        (check_new_file, tmp_path, "is a folder; name a file"),
        (check_new_file, tmp_path / "none/page.html", "none is no folder"),
    ]:
        with pytest.raises(OutputError, match=says):
            check(place)


def test_every_error_of_ours_that_users_can_mend_is_one_kind():
    from ptl_rl.config import ConfigError
    from ptl_rl.data.records import DataError
    from ptl_rl.driver.journal import JournalError
    from ptl_rl.pruning.plan import PlanError
    from ptl_rl.pruning.score.criteria import CriterionError
    from ptl_rl.pruning.score.streaming import CalibrationError

    kinds = [ConfigError, DataError, JournalError, PlanError, CriterionError, CalibrationError, UnsupportedModelError]
    assert all(issubclass(kind, UserError) for kind in kinds)


def test_a_model_whose_weights_cannot_be_read_is_refused(make_checkpoint, tmp_path):
    folder = make_checkpoint("llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    arguments = ["score", str(folder), "--data", "testbed:test", "--set", "data.rows=8", "--remove-layers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert f"error: {weights}: cannot be read (" in result.output
    assert "download or write it again" in result.output
