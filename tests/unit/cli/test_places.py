"""Places that a user names and that cannot be: a sentence and status 2, before anything is read."""

import os

import pytest
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.driver import preflight
from ptl_rl.errors import PathError, check_run_dir, check_sockets, expanded

LONG = "x" * 300
DEEP = "/".join(["x" * 200] * 25)


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def demo(repository, monkeypatch):
    monkeypatch.setattr(preflight, "check_model", lambda config: pytest.fail("the model was looked at"))
    return repository / "recipes/demo_restart_cpu.yaml"


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """As the file system says it of a place that is mounted so; permissions do not keep root out."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    return tmp_path


@pytest.mark.parametrize(
    ("place", "says"),
    [("FILE", "FILE: FILE is a file, not a folder"), ("FILE/run", "FILE/run: FILE is a file"), (LONG, "too long for a"),
     (DEEP, "--run-dir /"), ("loop", "loop: symbolic links that lead in a circle")],
)  # fmt: skip
def test_a_run_dir_that_cannot_be(place, says, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "loop").symlink_to("loop")
    errors = refused("run", demo, "--set", "resources.device=cpu", "--run-dir", place.replace("FILE", str(file)))
    assert says.replace("FILE", str(file)) in errors, errors


def test_a_run_dir_that_cannot_be_written_to(demo, read_only):
    errors = refused("run", demo, "--set", "resources.device=cpu", "--run-dir", read_only / "run")
    assert f"{read_only / 'run'}: {read_only} cannot be written to; choose another place" in errors


@pytest.mark.parametrize("place", [LONG, DEEP, "FILE", "FILE/run", "loop"])
@pytest.mark.parametrize("command", [["resume"], ["report"], ["compare"], ["plan"], ["data"]])
def test_paths_that_are_none(command, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("[]")
    (tmp_path / "loop").symlink_to("loop")
    refused(*command, place.replace("FILE", str(tmp_path / "file")))


@pytest.mark.parametrize(
    "setting", ["data.train.path", "data.test.path", "model.path", "reward.path", "criterion.path"]
)
@pytest.mark.parametrize("place", [LONG + ".jsonl", DEEP, '"a\\0b.jsonl"'])
def test_paths_in_a_recipe_that_are_none(setting, place, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = repository / "recipes/demo_restart_cpu.yaml"
    extra = ["--set", "criterion.channels=mine"] if setting == "criterion.path" else []
    refused("run", recipe, "--set", "resources.device=cpu", "--set", f"{setting}={place}", *extra)


def test_a_file_behind_a_name_that_no_path_may_have():
    with pytest.raises(PathError, match="no path may hold the character 0"):
        expanded("a\0b")


def test_a_place_for_sockets_that_is_too_long_is_said_first(demo, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 80)
    run = ["run", demo, "--set", "resources.device=cpu", "--run-dir", tmp_path / "run"]
    assert "Ray's sockets below /tmp/xxx" in (errors := refused(*run)) and "set TMPDIR to a folder of at most" in errors
    assert not (tmp_path / "run").exists()
    assert "vLLM's sockets below /tmp/xxx" in refused("eval", "testbed", "--tasks", "gsm8k")
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 60)  # room for vLLM's, and the Ray that is joined has its own place
    check_sockets()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "y" * 60)
    assert "set RAY_TMPDIR to a folder" in refused(*run)


def test_a_folder_that_a_runs_files_go_below_may_be_long(tmp_path):
    check_run_dir(tmp_path / "x" / ("y" * 255))
