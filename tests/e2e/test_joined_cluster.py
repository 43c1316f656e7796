"""A joined Ray of four nodes with four logical GPUs each, all on this machine: what is asked of it before stage 1."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config
from ptl_rl.driver import node_check
from ptl_rl.driver.doctor.recipe import check_ray, find_model
from ptl_rl.driver.ray_session import RaySession, WorkersHeld

pytestmark = pytest.mark.stack
NAMESPACE = "a-run-of-ours"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(4):
            cluster.add_node(num_gpus=4, num_cpus=32, include_dashboard=False, object_store_memory=80 << 20)
        yield cluster.address
    finally:
        cluster.shutdown()


def demo(repository: Path, **resources):
    settings = [f"resources.{key}={value}" for key, value in resources.items()]
    return load_config(repository / "recipes/demo_restart_cpu.yaml", settings)


def test_two_nodes_of_eight_are_refused_by_the_command(address, repository, tmp_path):
    recipe, sizes = str(repository / "recipes/demo_restart_cpu.yaml"), {"nodes": 2, "workers_per_node": 8}
    options = [part for key, value in sizes.items() for part in ("--set", f"resources.{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "ptl_rl.cli", "run", recipe, "--run-dir", str(tmp_path / "run"), *options]
    environment = {**os.environ, "RAY_ADDRESS": address}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "the recipe wants 2 nodes with 8 GPUs" in line
    assert "Ray has 4 nodes with 4 GPUs and 32 logical CPUs each; set resources.nodes=4 and" in line
    assert "Traceback" not in result.stderr and not list((tmp_path / "run/logs").iterdir())


def test_every_node_answers_and_what_is_wrong_is_said_of_each(address, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    config = demo(repository, nodes=4, workers_per_node=4, device="cpu")
    model = repository / "ptl_rl/testbed/checkpoints"
    model = next(path for path in sorted(model.iterdir()) if (path / "config.json").exists())
    with RaySession(config, "cpu") as session:
        assert not session.started_here
        node_check.check_nodes(config, "cpu", tmp_path, [model])
        assert not (tmp_path / node_check.MARKS).exists()
        asked = node_check.make_request
        monkeypatch.setattr(node_check, "make_request", lambda *a: {**asked(*a), "files": ["/no/reward.py"]})
        with pytest.raises(ConfigError) as refused:
            node_check.check_nodes(config, "cuda", tmp_path, [model])
        lines = str(refused.value).splitlines()[1:]
        assert sum("/no/reward.py cannot be read there (No such file" in line for line in lines) == 4
        if not Path("/dev/nvidia0").exists():
            assert sum("this machine has no NVIDIA driver" in line for line in lines) == 4
        with pytest.raises(ConfigError, match="has not answered within 0 s; it hangs: end what is at work there"):
            node_check.check_nodes(config, "cpu", tmp_path, [model], seconds=0)


def test_leftovers_of_the_run_are_ended_and_those_of_others_named(address, repository, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", address)
    with RaySession(demo(repository, nodes=4, workers_per_node=4, device="cpu"), "cpu") as session:
        session.wait_for_workers(NAMESPACE, seconds=30)

        class Holder:
            def ready(self) -> bool:
                return True

        def hold(name: str, namespace: str):
            options = {"num_gpus": 1, "num_cpus": 0, "lifetime": "detached", "name": name, "namespace": namespace}
            actor = ray.remote(**options)(Holder).remote()
            ray.get(actor.ready.remote())
            return actor

        hold("left", f"{NAMESPACE}-001-recover.1")
        session.wait_for_workers(NAMESPACE, seconds=10)
        other = hold("busy", "somebody-else")
        with pytest.raises(WorkersHeld, match=r"of 4 x 4 GPUs some are still held after 2 s, by actor busy \(process"):
            session.wait_for_workers(NAMESPACE, seconds=2)
        ray.kill(other)


def test_doctor_asks_the_cluster_that_would_be_joined(address, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    config, run_dir = demo(repository, nodes=4, workers_per_node=4, device="cpu"), tmp_path / "run"
    model, _ = find_model(config)
    joined, nodes = check_ray(config, "cpu", run_dir, model)
    assert (joined.level, nodes.level) == ("ok", "ok") and joined.text.count("4 GPUs, 32 CPUs") == 4
    (found,) = check_ray(demo(repository, nodes=2, workers_per_node=8, device="cpu"), "cpu", run_dir, model)
    assert found.level == "problem" and found.text.endswith("set resources.nodes=4 and resources.workers_per_node=4")
    assert not run_dir.exists()
