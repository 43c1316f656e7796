"""Ray is started with what verl reserves; where none can be joined, or GPUs stay held, a user is told in a sentence."""

from types import SimpleNamespace

import pytest
import ray
from driven_runs import Told

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.driver import loop, ray_session
from ptl_rl.driver.loop import Driver, StageFailed, start_run
from ptl_rl.driver.ray_session import RaySession, WorkersHeld


@pytest.mark.parametrize(
    ("recipe", "settings", "device", "expected"),
    [
        ("cpt_grpo_qwen2.5-7b_8xh200", [], "cuda", (80, None)),  # the SFT trainer's ten beside each GPU, not 64
        ("grpo_qwen2.5-7b_8xh200", [], "cuda", (64, None)),  # GPUs are Ray's to find
        ("grpo_qwen2.5-7b_8xh200", ["resources.ray_cpus=200"], "cuda", (200, None)),
        ("demo_distill_cpu", [], "cpu", (64, 2)),
    ],
)
def test_a_ray_of_the_runs_own_has_enough_logical_cpus(repository, monkeypatch, recipe, settings, device, expected):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started = {}
    gpus = 8 if device == "cuda" else 2
    resources = {"CPU": 200.0, "GPU": float(gpus)}
    nodes = [{"NodeID": "n", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": resources}]
    monkeypatch.setattr(ray, "init", lambda **arguments: started.update(arguments))
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:1"))
    monkeypatch.setattr(ray_session, "check_machine", lambda *_: None)
    config = load_config(repository / f"recipes/{recipe}.yaml", settings)
    with RaySession(config, device) as session:
        assert session.started_here and session.address == "10.0.0.1:1"
    assert (started["num_cpus"], started["num_gpus"]) == expected


class Session:
    """In place of a RaySession."""

    started_here, address = False, "none"

    def __init__(self, *_) -> None: ...

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None: ...

    def wait_for_workers(self, namespaces: str) -> None:
        raise WorkersHeld(f"held, and not by {namespaces}")


@pytest.fixture
def driver(repository, tmp_path, monkeypatch) -> Driver:
    monkeypatch.setenv("PTL_RUN_ID", "before")  # what the driver sets goes with the test
    monkeypatch.setattr(loop, "RaySession", Session)
    config = load_config(repository / "recipes/demo_restart_cpu.yaml", ["resources.device=cpu"])
    return Driver(start_run(config, tmp_path / "run"), lambda config: Told())


def test_the_nodes_of_a_joined_cluster_are_asked_before_the_first_stage(driver, monkeypatch):
    def refuse(config, device, run_dir, models):
        raise ConfigError(f"asked of {run_dir.name} and {models[0].name}")

    monkeypatch.setattr(loop, "check_nodes", refuse)
    with pytest.raises(ConfigError, match="asked of run and qwen2"):
        driver.run()
    assert list(driver.folder.logs.iterdir()) == []


def test_what_could_not_be_looked_at_is_shown(driver, monkeypatch):
    driver.display = told = Told()
    monkeypatch.setattr(loop, "check_nodes", lambda *_: ["gpu-2: all its GPUs are held now"])
    with pytest.raises(StageFailed):
        driver.run()
    assert told.notes == ["gpu-2: all its GPUs are held now"]


def test_a_stage_whose_gpus_stay_held_fails_with_a_sentence(driver, monkeypatch):
    monkeypatch.setattr(Session, "started_here", True)
    monkeypatch.setattr(loop, "check_nodes", None)  # not called: a Ray of its own
    message = rf"stage 000-evaluate cannot start: held, and not by {driver.run_id}\n  continue with: ptl resume"
    with pytest.raises(StageFailed, match=message):
        driver.run()


def test_no_ray_where_the_address_points_to(repository, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127\.0\.0\.1:9: cannot join Ray there .*or unset RAY_ADDRESS"):
        RaySession(load_config(repository / "recipes/demo_restart_cpu.yaml"), "cpu").__enter__()
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match=r"is Ray Client's.*RAY_ADDRESS=auto"):
        RaySession(load_config(repository / "recipes/demo_restart_cpu.yaml"), "cpu").__enter__()
