"""Fixtures of the reward tests."""

import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def nothing_is_left_behind(tmp_path, monkeypatch):
    """The code reward's folders lie in tmp_path/folders; the test fails if it leaves one, or a process."""
    folders = tmp_path / "folders"
    folders.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    yield
    assert list(folders.iterdir()) == []
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if b"reward.programs.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]
