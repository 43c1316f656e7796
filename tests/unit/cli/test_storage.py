"""A disk that fills up hours into a run is a sentence and a run that resumes, wherever in the driver it shows."""

import errno
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.cli.common import STORAGE_ERRORS
from ptl_rl.config.recipe import load_config
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.loop import Driver, start_run


@pytest.fixture
def run_dir(repository, tmp_path):
    config = load_config(repository / "recipes/demo_restart_cpu.yaml", ["resources.device=cpu"])
    return start_run(config, tmp_path / "run").path


def resume(run_dir, monkeypatch, number: int):
    def fail(self):
        raise OSError(number, os.strerror(number), str(run_dir / "journal.jsonl"))

    monkeypatch.setattr(Driver, "run", fail)
    return CliRunner().invoke(app, ["resume", str(run_dir)])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_is_said_with_how_to_go_on(number, run_dir, monkeypatch):
    result = resume(run_dir, monkeypatch, number)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert f"journal.jsonl: {os.strerror(number)}; finished stages are kept" in result.output
    assert f"continue with: ptl resume {run_dir}" in result.output


def test_other_errors_keep_their_traceback(run_dir, monkeypatch):
    result = resume(run_dir, monkeypatch, errno.EBADF)
    assert result.exit_code == 1 and "unexpected OSError: [Errno 9] Bad file descriptor" in result.output


def test_what_a_full_disk_raises_is_known():
    """/dev/full takes no byte."""
    with pytest.raises(OSError) as caught:
        Journal(Path("/dev/full")).append(Entry(cycle=0, stage="evaluate", metrics={}))
    assert caught.value.errno in STORAGE_ERRORS
