"""A command ends with a sentence for what a user can mend, and with a kept traceback for everything else."""

import errno
import tempfile

import pytest
import torch
from typer.testing import CliRunner

from ptl_rl import api
from ptl_rl.cli import app
from ptl_rl.cli.common import in_options
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


@pytest.mark.parametrize(
    ("message", "options", "expected"),
    [
        ("remove_channels 9x: give a number", ["remove_channels"], "--remove-channels 9x: give a number"),
        ("criterion.max_tokens: too large", ["max_tokens"], "criterion.max_tokens: too large"),
        ("/a/run_dir/x: gone; choose another run_dir", ["run_dir"], "/a/run_dir/x: gone; choose another --run-dir"),
        ("data x=y: no such file", ["data"], "--data x=y: no such file"),
        ("data.train: no rows", ["data"], "data.train: no rows"),
        ("setting 'a': write it as key", ["settings"], "--set 'a': write it as key"),
        ("settings change a recipe", ["settings"], "--set change a recipe"),
        ("a.yaml: exists; set `force`, or take force", ["force"], "a.yaml: exists; set --force, or take force"),
        ("data x=y: the data are bad", [], "data x=y: the data are bad"),
    ],
)
def test_parameters_are_called_as_the_command_calls_them(message, options, expected):
    assert in_options(message, options) == expected


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
