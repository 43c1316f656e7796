"""What is found wrong before Ray starts, and cannot be shown end to end without breaking the machine."""

from collections import namedtuple

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.driver import preflight
from ptl_rl.recipe import load_config

Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_the_run_would_fill_is_refused(repository, tmp_path, monkeypatch):
    config = load_config(repository / "recipes/demo_grpo_cpu.yaml")
    _, shape = preflight.check_model(config)
    cycles = len(config.schedule.channels_per_cycle)
    needed = shape.parameters * 4 * (2 * cycles + 1)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(2**40, 0, needed - 1))
    with pytest.raises(ConfigError, match=r"the run writes up to .* GiB of checkpoints, .* choose another --run-dir"):
        preflight.check_disk(config, shape, tmp_path / "not" / "there" / "yet")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(2**40, 0, needed))
    preflight.check_disk(config, shape, tmp_path)
