"""Runs that the real driver drives in seconds."""

from collections.abc import Callable, Iterator

import pytest
from driven_runs import DrivenRun, replace_stages, search_path, small_config


@pytest.fixture
def make_driven(tmp_path, monkeypatch) -> Iterator[Callable[..., DrivenRun]]:
    """Factory of a run folder whose stages are stand-ins; sections of the recipe are its arguments."""
    monkeypatch.setenv("PTL_RUN_ID", "before")  # what the driver sets goes with the test
    monkeypatch.setenv("PYTHONPATH", search_path())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    replace_stages(monkeypatch.setattr)
    made = []

    def make(**sections) -> DrivenRun:
        made.append(DrivenRun(tmp_path / "run", small_config(**sections)))
        return made[-1]

    yield make
    for run in made:
        for process in run.processes():  # of a test that failed
            process.kill()
