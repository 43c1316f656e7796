"""Why a machine's GPUs cannot be used is told from facts alone, in one sentence with the remedy."""

import re

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import parse_config
from ptl_rl.driver import environment
from ptl_rl.driver.environment import CudaFacts, check_gpus, parse_driver, read_cuda, why_no_cuda

GOOD = {"driver": "580.65.06", "devices": 8, "torch": "2.11.0", "cuda": "13.0", "available": True, "usable": 8}


def facts(**changes) -> CudaFacts:
    return CudaFacts(**{**GOOD, **changes})


def recipe(**resources):
    values = {"schedule": {"channels_per_cycle": [64]}, "recovery": {"prompts_per_step": 16}}
    return parse_config({**values, "resources": {"device": "cuda", "workers_per_node": 8, **resources}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"driver": None, "devices": 0}, "this machine has no NVIDIA driver"),
        ({"devices": 0}, r"has the NVIDIA driver 580.65.06, but no GPU is visible here .* --gpus all"),
        ({"cuda": None, "torch": "2.13.0+cpu"}, r"torch 2.13.0\+cpu is a build without CUDA, although .* 8 GPUs"),
        ({"driver": "570.133.20"}, r"driver is 570.133.20, but .* CUDA 13.0, which needs driver 580.65.06 or newer"),
        ({"driver": "525.60.12", "cuda": "12.8"}, r"CUDA 12.8, which needs driver 525.60.13 or newer"),
        ({"visible": ""}, "CUDA_VISIBLE_DEVICES='' hides all 8 GPUs; unset it"),
        ({}, "finds none of 8 GPUs usable; see what nvidia-smi says"),
        ({"torch": None}, "torch is not installed"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(changes, message):
    assert re.search(message, why_no_cuda(facts(available=False, usable=0, **changes)))


def test_usable_gpus_are_no_problem_whatever_the_driver_says():
    assert why_no_cuda(facts()) is None
    assert why_no_cuda(facts(driver="535.10", cuda="13.0")) is None  # with NVIDIA's package for older drivers


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("580.65", "580.65"),
        ("No devices were found", None),
    ],
)
def test_the_driver_is_read_from_the_kernel_modules_words(text, driver):
    assert parse_driver(text) == driver


def test_a_driver_and_its_devices_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(environment, "DEVICE_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    assert (read_cuda().driver, read_cuda().devices) == (None, 0)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.1.2  Tue Mar")
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    found = read_cuda()
    assert (found.driver, found.devices, found.available) == ("470.1.2", 2, False)


def test_gpus_are_counted_where_the_run_starts_its_own_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_gpus(recipe(), "cuda", facts())
    with pytest.raises(ConfigError, match=r"wants 1 x 8 GPUs .* but this machine has 4 \(CUDA_VISIBLE_DEVICES=0,1,2,3"):
        check_gpus(recipe(), "cuda", facts(usable=4, visible="0,1,2,3"))
    with pytest.raises(ConfigError, match=r"wants 2 x 8 GPUs .* a Ray of its own, has 8; .* set RAY_ADDRESS"):
        check_gpus(recipe(nodes=2), "cuda", facts())
    with pytest.raises(ConfigError, match=r"resources\.device: cuda, but the NVIDIA driver is 470\.1"):
        check_gpus(recipe(), "cuda", facts(available=False, driver="470.1"))
    check_gpus(recipe(), "cpu", facts(available=False))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # the head may have none; its nodes are asked
    check_gpus(recipe(), "cuda", facts(available=False, driver=None))


@pytest.mark.parametrize(
    ("asked", "build", "sees_gpu", "joined", "device"),
    [
        ("auto", None, False, False, "cpu"),
        ("auto", None, False, True, "cpu"),
        ("auto", "13.0", False, False, "cpu"),
        ("auto", "13.0", False, "a cluster with GPUs", "cuda"),  # from a head node without
        ("auto", None, False, "a cluster with GPUs", "cpu"),  # this torch could not use them
        ("auto", "13.0", True, False, "cuda"),
        ("cpu", "13.0", True, True, "cpu"),
        ("cuda", None, False, False, "cuda"),
    ],
)
def test_auto_is_what_the_machine_has_or_the_cluster_is_for(asked, build, sees_gpu, joined, device, monkeypatch):
    import torch

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(environment, "cluster_has_gpus", lambda address: joined == "a cluster with GPUs")
    if joined:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu)
    config = parse_config({"schedule": {"channels_per_cycle": [16]}, "resources": {"device": asked}})
    assert environment.detect_device(config) == device


def test_a_cluster_that_does_not_answer_has_no_gpus():
    assert not environment.cluster_has_gpus("127.0.0.1:1")  # at once: Ray itself would try for minutes
    assert not environment.cluster_has_gpus("ray://127.0.0.1:1")


@pytest.mark.parametrize("found", [{"accelerator_type:H100": 1.0, "GPU": 8.0}, {"GPU": 2.0, "CPU": 20.0}])
def test_logical_gpus_are_none(found, monkeypatch):
    import ray

    left = []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: found)
    monkeypatch.setattr(ray, "shutdown", lambda: left.append(True))
    assert environment.cluster_has_gpus("auto") == ("accelerator_type:H100" in found) and left == [True]


@pytest.mark.parametrize(
    ("rows", "oldest"), [([["9.0"], ["7.5"]], 7.5), ([["8.0"]], 8.0), ([["[N/A]"]], None), ([], None)]
)
def test_the_oldest_gpu_decides(rows, oldest, monkeypatch):
    monkeypatch.setattr(environment, "nvidia_smi", lambda query: rows)
    assert environment.oldest_capability() == oldest
