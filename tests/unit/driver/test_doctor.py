"""``ptl doctor`` names what was planted, each with its remedy, and calls a sound machine sound."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from ptl_rl.cli import app
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.driver import doctor
from ptl_rl.driver.cluster import SharedMemory
from ptl_rl.driver.doctor import finding, machine, recipe, stack
from ptl_rl.driver.environment import CudaFacts
from ptl_rl.errors import RAY_SOCKET, SOCKET_BYTES

GPUS = CudaFacts("580.65.06", 8, "2.11.0", "13.0", True, 8, None)


def run_doctor(*arguments: str, files: int = 0, **environment: str) -> tuple[int, list[dict]]:
    """Exit status and findings of the real command."""

    def limit() -> None:
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    clean = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR")}
    command = [sys.executable, "-m", "ptl_rl.cli", "doctor", "--json", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**clean, **environment}, preexec_fn=limit
    )
    return result.returncode, json.loads(result.stdout) if result.stdout else [result.stderr]


def test_planted_problems_are_named_by_the_command(repository, tmp_path):
    lock, blocked = tmp_path / "edited.lock", tmp_path / "file"
    text = (repository / "requirements/cpu.lock").read_text()
    assert "\ntransformers==5.9.0\n" in text
    lock.write_text(text.replace("\ntransformers==5.9.0\n", "\ntransformers==5.8.0\n"))
    blocked.touch()
    status, findings = run_doctor(
        str(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml"),
        *("--lock", str(lock), "--run-dir", str(blocked / "run")),
        files=512,
        TMPDIR=str(tmp_path / ("long" * 12)),
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    problems = {f["topic"]: f for f in findings if f["level"] == "problem"}
    assert status == 1
    expected = {
        "packages": ("transformers is 5.9.0, wanted ==5.8.0", "setup"),
        "GPUs": ("", ""),
        "open files": ("512, can be raised to 512; Ray wants at least 4096", "ulimit -n 65536"),
        "sockets": ("at most 107 go", "TMPDIR=/tmp"),
        "disk": (f"{blocked} is no folder", "choose another"),
        "model": ("Qwen/Qwen2.5-7B is not in the hub's cache", "hf download"),
    }
    for topic, (text, remedy) in expected.items():
        assert text in problems[topic]["text"] and remedy in problems[topic]["remedy"], problems[topic]
    assert not any(f["level"] == "problem" and f["topic"] in ("Python", "names", "imports") for f in findings)


def test_a_sound_machine_and_a_bad_recipe(repository, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    # Above, the real command has imported vLLM, too.
    monkeypatch.setitem(stack.IMPORTS, "cpu", "from ptl_rl.cpu import checks; checks.assert_cpu_platform_active()")
    doctor = ["doctor", "--json", str(repository / "recipes/demo_restart_cpu.yaml"), "--set"]
    result = CliRunner().invoke(app, [*doctor, "resources.device=cpu", "--run-dir", str(tmp_path / "run")])
    findings = json.loads(result.stdout)
    assert result.exit_code == 0, [f for f in findings if f["level"] == "problem"]
    topics = {f["topic"] for f in findings}
    assert topics >= {"Python", "packages", "imports", "open files", "shared memory", "model", "attention", "Ray"}
    assert not (tmp_path / "run").exists()
    result = CliRunner().invoke(app, [*doctor, "recovery.stpes=3"])
    assert result.exit_code == 2 and "did you mean 'steps'" in result.stderr
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1


def levels(found) -> list[str]:
    return [f.level for f in (found if isinstance(found, list) else [found])]


def test_packages_are_held_against_a_lock(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(
        "# a comment\n--prefer-binary\nnumpy==0.1 \\\n    --hash=sha256:00\n"
        "rich>=1  # any\nno-such-package==1.0\nold==1; python_version < '3'\n"
    )
    wanted = stack.read_lock(lock)
    assert [r.name for r in wanted] == ["numpy", "rich", "no-such-package"]
    first, second = stack.check_packages(wanted, "lock", "install")
    assert first.level == "problem" and first.text.startswith("numpy is ") and "wanted ==0.1" in first.text
    assert second.level == "warning" and "no-such-package is not installed" in second.text
    assert levels(stack.check_packages([Requirement("rich>=1")], "lock", "")) == ["ok"]


def test_a_build_of_torch_is_no_other_version(monkeypatch):
    monkeypatch.setattr(stack, "version", lambda name: "2.13.0+cpu")
    assert levels(stack.check_packages([Requirement("torch==2.13.0")], "lock", "")) == ["ok"]
    assert levels(stack.check_packages([Requirement("torch==2.11.0")], "lock", "")) == ["problem"]


def test_without_a_checkout_the_projects_own_metadata_count(monkeypatch):
    monkeypatch.setattr(stack, "find_lock", lambda device: None)
    assert {r.name for r in stack.declared()} >= {"verl", "transformers", "ray"}
    assert not {r.name for r in stack.declared()} & {"pytest", "lm-eval"}  # extras
    assert levels(stack.check_installed("cpu", None)) == ["ok"]


def test_the_stack_is_imported(monkeypatch):
    monkeypatch.setitem(stack.IMPORTS, "cpu", "import no_such_module_here")
    found = stack.check_imports("cpu")
    assert found.level == "problem" and "No module named 'no_such_module_here'" in found.text
    monkeypatch.setattr(stack, "entry_points", lambda group: [])
    assert "PYTHONPATH alone does not do" in stack.check_imports("cpu").remedy


def test_gpus(monkeypatch):
    monkeypatch.setattr(stack, "nvidia_smi", lambda query: [["NVIDIA H200", "143771", "4"]] * 8)
    (found,) = stack.check_cuda(GPUS, "cuda", 8)
    assert found.level == "ok" and found.text.startswith("8 x NVIDIA H200 140 GiB, driver 580.65.06, torch 2.11.0")
    assert levels(stack.check_cuda(GPUS, "cuda", 16)) == ["problem"]
    monkeypatch.setattr(stack, "nvidia_smi", lambda query: [["NVIDIA H200", "143771", "90000"]])
    assert "GPU 0: 88 GiB" in stack.check_cuda(GPUS, "cuda", 0)[1].text
    (found,) = stack.check_cuda(CudaFacts("535.1", 8, "2.11.0", "13.0"), "cuda", 0)
    assert found.level == "problem" and "needs driver 580.65.06" in found.text


def test_flash_attention_is_missed_on_gpus_alone(monkeypatch):
    monkeypatch.setattr(stack, "flash_problem", lambda: "the package flash-attn is not installed")
    assert stack.check_flash_attention("cpu").level == "ok"
    found = stack.check_flash_attention("cuda")
    assert found.level == "warning" and "three times the tokens" in found.text and "wheel" in found.remedy


@pytest.mark.parametrize(
    ("limits", "level"),
    [((1024, 1024), "problem"), ((1024, 1 << 20), "ok"), ((8192, 8192), "warning"), ((256, -1), "ok")],
)
def test_open_files_count_as_far_as_ray_can_raise_them(limits, level):
    assert machine.check_open_files(limits).level == level


def test_socket_paths():
    assert levels(machine.check_socket_paths(Path("/tmp/ray"), "/tmp")) == ["ok"]
    room = SOCKET_BYTES - len("/" + RAY_SOCKET)
    assert levels(machine.check_socket_paths(Path("/" + "x" * (room - 1)), "/tmp")) == ["ok"]
    assert levels(machine.check_socket_paths(Path("/" + "x" * room), "/tmp")) == ["problem"]
    assert levels(machine.check_socket_paths(Path("/tmp/ray"), "/" + "x" * 80)) == ["problem"]


def test_ports(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(machine, "PORTS", {port: "a Ray head"})
        (found,) = machine.check_ports(joined=False)
        assert found.level == "warning" and f"{port} (a Ray head)" in found.text and "--port=6380" in found.remedy
        assert machine.check_ports(joined=True) == []
    assert levels(machine.check_ports(joined=False)) == ["ok"]


def test_names_that_nobody_resolves(monkeypatch):
    assert machine.check_names().level == "ok"
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    found = machine.check_names()
    assert found.level == "problem" and "'127.0.0.1 no-such-host.invalid'" in found.remedy


def test_shared_memory():
    memory = SharedMemory(1.0, 4.2)
    found = [machine.check_shared_memory(memory, free) for free in (64 << 20, 2 << 30, 8 << 30)]
    assert levels(found) == ["problem", "warning", "ok"]
    assert "--shm-size=5g" in found[0].remedy


def test_a_head_without_gpus_wants_no_shared_memory(repository):
    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")
    head = CudaFacts(None, 0, "2.11.0", "13.0", False, 0, None)
    wanted = [doctor.wanted_memory(config, "cuda", joined, gpus) for joined, gpus in ((1, head), (1, GPUS), (0, head))]
    assert [memory.least for memory in wanted] == [0, 1, 1]


def test_memory_and_compiler(monkeypatch, tmp_path):
    assert machine.check_memory(1.0, "a run takes").level == "ok"
    assert "offloaded, take about 4096" in machine.check_memory(4096, "offloaded, take").text
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.check_compiler("cpu").level == "ok"
    assert machine.check_compiler("cuda").level == "problem"


def test_host_memory_for_what_is_offloaded(repository):
    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")

    class Shape:
        parameters = 7_600_000_000

    assert recipe.offloaded_gib(config, Shape()) == pytest.approx(84.9, abs=0.1)
    assert recipe.offloaded_gib(load_config(repository / "recipes/demo_restart_cpu.yaml"), Shape()) == 0


def test_ray_at_an_address(monkeypatch, repository):
    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (found,) = recipe.check_ray(config, "cuda", None, None)
    assert found.level == "ok" and "64 logical CPUs (recovery.grpo wants 34)" in found.text
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    (found,) = recipe.check_ray(config, "cuda", None, None)
    assert found.level == "problem" and "nobody answers at RAY_ADDRESS=127.0.0.1:9 (Connection refused)" in found.text


def test_a_node_whose_gpus_are_held_is_a_warning(monkeypatch, repository, tmp_path):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    nodes = [
        {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": {"GPU": 8, "CPU": 80}} for name in "ab"
    ]
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(recipe, "check_nodes", lambda *_: ["b: all its GPUs are held now"])
    config = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")
    found = recipe.check_ray(config, "cuda", tmp_path, None)
    assert [finding.level for finding in found] == ["ok", "ok", "warning"]
    assert found[2].text == "b: all its GPUs are held now" and "ask again" in found[2].remedy


def test_a_recipes_own_mistakes(repository, tmp_path):
    values = {"schedule": {"channels_per_cycle": [64]}, "model": {"path": str(tmp_path / "none")}}
    model, found = recipe.find_model(parse_config(values))
    assert model is None and found.level == "problem" and "is not a folder" in found.text
    config = load_config(repository / "recipes/demo_restart_cpu.yaml", ["model.attention=flash_attention_2"])
    model, found = recipe.find_model(config)
    assert model is not None and found.text.endswith("2.0 million parameters")
    assert "has no CPU build" in recipe.check_attention(config, "cpu", model).text
    unasked = shutil.copytree(model.folder, tmp_path / "model")
    (unasked / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    unusable, found = recipe.find_model(
        load_config(repository / "recipes/demo_restart_cpu.yaml", [f"model.path={unasked}"])
    )
    assert unusable is None and found.level == "problem" and "no users here" in found.text
    assert recipe.check_dtype(parse_config({**values, "model": {"path": "x/y"}}), "cpu").level == "warning"


def test_one_problem_makes_it_fail():
    assert not doctor.stops([finding.ok("a", ""), finding.warning("b", "")])
    assert doctor.stops([finding.ok("a", ""), finding.problem("b", "")])
