"""What a driver finds in its run's folder before it begins: another run's settings, or what a killed one left."""

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.loop import Driver, start_run
from ptl_rl.driver.run_folder import RunFolder
from ptl_rl.driver.state import Stage


class Silent:
    """In place of a display."""

    def __getattr__(self, name: str):
        return lambda *_: None


@pytest.fixture
def config(repository):
    return load_config(repository / "recipes/demo_grpo_cpu.yaml", ["resources.device=cpu"])


def test_a_run_that_is_at_work_keeps_its_settings(config, tmp_path):
    folder = start_run(config, tmp_path / "run")
    with folder.locked(), pytest.raises(ConfigError, match="another ptl process is working on this run"):
        start_run(config.model_copy(update={"seed": 7}), tmp_path / "run")
    assert '"seed": 0' in folder.config.read_text()


def test_settings_that_changed_under_a_driver_are_not_run(config, tmp_path):
    driver = Driver(start_run(config, tmp_path / "run"), lambda _: Silent())
    start_run(config.model_copy(update={"seed": 7}), tmp_path / "run")  # before the driver has the folder
    with pytest.raises(ConfigError, match="another ptl run has just begun a run here"):
        driver.run()


def test_the_work_of_a_journaled_recovery_goes_when_its_driver_was_killed_before(config, tmp_path):
    driver = Driver(start_run(config, tmp_path / "run"), lambda _: Silent())
    folder = RunFolder(tmp_path / "run")
    done, under_way = Stage(1, "recover"), Stage(2, "recover", 1, 1)
    for stage in (done, under_way):
        (folder.work(stage) / "checkpoints").mkdir(parents=True)
    Journal(folder.journal).append(Entry(cycle=1, stage="recover", round=0, metrics={}))
    driver._clean_up_after_earlier_driver()
    assert not folder.work(done).exists() and folder.work(under_way).exists()
