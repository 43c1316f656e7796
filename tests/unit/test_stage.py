"""What a stage's process waits for, with a stand-in for Ray."""

import sys
from types import SimpleNamespace

import pytest

from ptl_rl.config.recipe import parse_config
from ptl_rl.stage import StageContext, StageSpec


@pytest.fixture
def waiting(monkeypatch):
    """Factory: how often Ray was asked for free GPUs until a stage goes on."""

    def wait(free: list[float], whole: float, device: str = "cuda", recovery: str = "grpo", workers: int = 4) -> int:
        asked = iter(free)
        count = []

        def available() -> dict[str, float]:
            count.append(1)
            return {"GPU": next(asked)}

        fake = SimpleNamespace(
            cluster_resources=lambda: {"GPU": whole}, available_resources=available, shutdown=lambda: count.append(0)
        )
        monkeypatch.setitem(sys.modules, "ray", fake)
        monkeypatch.setattr(StageContext, "connect_ray", lambda self: None)
        monkeypatch.setattr("ptl_rl.stage.time.sleep", lambda seconds: None)
        values = {"schedule": {"channels_per_cycle": [128]}, "recovery": [{recovery: {}}]}
        config = parse_config(values | {"resources": {"workers_per_node": workers, "device": device}})
        spec = StageSpec.model_construct(device=device, planned=0, part=0, unlearnable=False)
        StageContext(config, spec).wait_for_workers(seconds=60)
        assert count[-1] == 0  # it leaves Ray again
        return sum(count)

    return wait


def test_a_stage_waits_until_a_former_job_has_let_go_of_its_gpus(waiting):
    assert waiting([0, 2, 4], whole=8) == 3
    assert waiting([4, 5], whole=8, recovery="distill", workers=5) == 2  # the teacher's are among them
    assert waiting([4, 5], whole=5, device="cpu", recovery="distill") == 2  # here they come on top
    assert waiting([2], whole=2) == 1  # never for more than there are


def test_a_stage_does_not_wait_for_ever(waiting, monkeypatch):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr("ptl_rl.stage.time.monotonic", lambda: next(clock))
    with pytest.raises(TimeoutError, match="3 of 4 GPUs are free 60 s after a training has ended"):
        waiting([3] * 9, whole=8)
