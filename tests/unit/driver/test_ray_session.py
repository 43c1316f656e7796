"""What a user sees where the Ray that RAY_ADDRESS names cannot be joined."""

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.driver.ray_session import RaySession
from ptl_rl.recipe import load_config


def test_no_ray_where_the_address_points_to(repository, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127\.0\.0\.1:9: cannot join Ray there .*or unset RAY_ADDRESS"):
        RaySession(load_config(repository / "recipes/demo_grpo_cpu.yaml"), "cpu").__enter__()
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match=r"is Ray Client's.*RAY_ADDRESS=auto"):
        RaySession(load_config(repository / "recipes/demo_grpo_cpu.yaml"), "cpu").__enter__()
