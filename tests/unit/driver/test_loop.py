"""What a driver may find in its run's folder before it begins: another driver, or another run's settings."""

import pytest
from driven_runs import Told

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.driver.loop import Driver, start_run


@pytest.fixture
def config(repository):
    return load_config(repository / "recipes/demo_restart_cpu.yaml", ["resources.device=cpu"])


def test_a_run_that_is_at_work_keeps_its_settings(config, tmp_path):
    folder = start_run(config, tmp_path / "run")
    with folder.locked(), pytest.raises(ConfigError, match="another ptl process is working on this run"):
        start_run(config.model_copy(update={"seed": 7}), tmp_path / "run")
    assert '"seed": 0' in folder.config.read_text()


def test_settings_that_changed_under_a_driver_are_not_run(config, tmp_path):
    driver = Driver(start_run(config, tmp_path / "run"), lambda _: Told())
    start_run(config.model_copy(update={"seed": 7}), tmp_path / "run")  # before the driver has the folder
    with pytest.raises(ConfigError, match="another ptl run has just begun a run here"):
        driver.run()
