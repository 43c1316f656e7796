"""What a recipe's stages reserve of Ray, node by node, and whether a cluster's nodes have it.

verl packs the workers of one node strictly onto one node and waits without limit until it can, and TransferQueue puts
storage actors onto every node, so sums over the cluster say nothing. A node's CPUs are numbers of bookkeeping: nothing
is bound to them, and a node may be started with more than it has.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptl_rl.config import AnyRecovery, ConfigError, CptConfig, DistillConfig, GrpoConfig, RunConfig

# What verl 0.9.1 reserves of Ray:
RL_CPUS_PER_WORKER = 3  # ResourcePoolManager.max_colocate_count of main_ppo, for the policy's and a teacher's workers
SFT_CPUS_PER_WORKER = 10  # RayResourcePool's own max_colocate_count, in sft_trainer_ray
QUEUE_CONTROLLERS = 1  # TransferQueueController, one CPU
QUEUE_STORAGES = 8  # SimpleStorageUnit, one CPU each, shared out over all nodes, each bound to its node
BUCKET_KEY = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
STORAGES_KEY = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
TRANSIENT = 1  # task runner, agent loops, reward loop and vLLM's servers need one CPU to be placed, and then none


@dataclass(frozen=True)
class NodeNeeds:
    """What ``count`` nodes must have each."""

    count: int
    gpus: int
    cpus: int
    because: str
    """The stage that wants most CPUs."""


@dataclass(frozen=True)
class Node:
    """A living node of a Ray cluster, what it has in all."""

    id: str
    name: str
    gpus: int
    cpus: int


def living(nodes: Sequence[dict[str, Any]]) -> list[Node]:
    """The living ones of ``ray.nodes()``, in the order of their names."""
    found = []
    addresses = Counter(node["NodeManagerAddress"] for node in nodes if node["Alive"])
    for node in nodes:
        if node["Alive"]:
            host, address = node.get("NodeManagerHostname"), node["NodeManagerAddress"]
            name = f"{host} ({address})" if host and host != address else address
            name += f" {node['NodeID'][:8]}" if addresses[address] > 1 else ""
            resources = node["Resources"]
            found.append(Node(node["NodeID"], name, int(resources.get("GPU", 0)), int(resources.get("CPU", 0))))
    return sorted(found, key=lambda node: node.name)


def _storages(config: RunConfig, recovery: AnyRecovery, device: str) -> int:
    from ptl_rl.cpu.checks import verl_cpu_overrides

    stock = verl_cpu_overrides() if device == "cpu" else {}
    chosen = {STORAGES_KEY: QUEUE_STORAGES, **stock, **config.verl, **recovery.verl}[STORAGES_KEY]
    return chosen if isinstance(chosen, int) else QUEUE_STORAGES


def _teachers(recovery: AnyRecovery) -> int:
    return recovery.teacher_workers_per_node if isinstance(recovery, DistillConfig) else 0


def node_needs(config: RunConfig, device: str) -> NodeNeeds:
    """GPUs (logical ones on CPU) and logical CPUs of every node that a run uses, so that no stage waits for ever.

    On CPU a parent that teaches has workers of its own; on GPUs it takes some of the node's.
    """
    resources = config.resources
    workers = resources.workers_per_node
    extra = max(map(_teachers, config.all_recoveries)) if device == "cpu" else 0
    wanted = {"scoring and evaluation": workers}
    for recovery in config.all_recoveries:
        if isinstance(recovery, CptConfig):
            wanted["recovery.cpt"] = SFT_CPUS_PER_WORKER * workers
        elif isinstance(recovery, GrpoConfig):
            teachers = _teachers(recovery) if device == "cpu" else 0
            storages = -(-_storages(config, recovery, device) // resources.nodes)
            cpus = RL_CPUS_PER_WORKER * (workers + teachers) + storages + QUEUE_CONTROLLERS + TRANSIENT
            name = f"recovery.{recovery.method}"
            wanted[name] = max(cpus, wanted.get(name, 0))
    because = max(wanted, key=lambda name: wanted[name])
    return NodeNeeds(resources.nodes, workers + extra, wanted[because], because)


@dataclass(frozen=True)
class SharedMemory:
    """GiB of /dev/shm of a node: what a run cannot do without, and what it may come to use."""

    least: float
    ample: float


def shared_memory(config: RunConfig, device: str) -> SharedMemory:
    """What verl, vLLM and NCCL put into /dev/shm beside Ray's objects, which can lie elsewhere.

    On CPU every worker of the RL trainer hands its weights to vLLM through a bucket there (verl's stock bucket is 2048
    MiB, ours for CPUs 64); on GPUs buckets are GPU memory, and NCCL wants 1 GiB, but a single rank nothing. Each vLLM
    engine has ring buffers of up to 400 MiB. All this is of nodes that have workers; :func:`memory_of_node` knows them.
    """
    workers, rings = config.resources.workers_per_node, 0.4
    if device == "cuda":
        nccl = 1.0 if config.resources.workers > 1 else 0.0
        return SharedMemory(nccl, nccl + rings * workers)
    from ptl_rl.cpu.checks import verl_cpu_overrides

    stock = verl_cpu_overrides()[BUCKET_KEY]
    buckets = [
        {BUCKET_KEY: stock, **config.verl, **recovery.verl}[BUCKET_KEY]
        for recovery in config.all_recoveries
        if isinstance(recovery, GrpoConfig)
    ]
    bucket = max((b for b in buckets if isinstance(b, int)), default=0) / 1024
    engines = bool(buckets) or config.resources.tensor_parallel_size > 1  # else vLLM has one process, which shares none
    return SharedMemory(0.125 * engines + bucket * workers, 0.25 + (bucket + rings) * workers)


def memory_of_node(config: RunConfig, device: str, gpus: int) -> SharedMemory:
    """:func:`shared_memory` of a node with so many GPUs (logical ones on CPU): nothing where no worker can be."""
    return shared_memory(config, device) if gpus else SharedMemory(0.0, 0.0)


def _listed(nodes: Sequence[Node]) -> str:
    kinds = Counter((node.gpus, node.cpus) for node in nodes)
    words = [
        f"{count} node{'s' if count > 1 else ''} with {gpus} GPUs and {cpus} logical CPUs{' each' if count > 1 else ''}"
        for (gpus, cpus), count in kinds.most_common()
    ]
    return ", ".join(words) or "no living node"


def places(nodes: Sequence[Node], gpus: int, cpus: int) -> int:
    """Packed groups of so many GPUs and CPUs that the nodes can hold."""
    return sum(min(node.gpus // gpus, node.cpus // cpus if cpus else node.gpus) for node in nodes)


def _other_layout(nodes: Sequence[Node], workers: int) -> tuple[int, int] | None:
    """Nodes and workers per node by which as many workers would fit."""
    for count in sorted({n for n in range(1, workers + 1) if workers % n == 0}):
        if places(nodes, workers // count, 0) >= count:
            return count, workers // count
    return None


def _start(needs: NodeNeeds, device: str) -> str:
    logical = f" --num-gpus={needs.gpus} (logical on CPU)" if device == "cpu" else ""
    return f"ray start --num-cpus={needs.cpus}{logical}"


def check_layout(config: RunConfig, device: str) -> None:
    """Refuse vLLM engines that would be split over nodes: an evaluation's engine holds its GPUs in one process.

    Where a parent teaches on GPUs, the trainer and its engines have those of a node that the parent leaves.

    Args:
        device: 'cpu' or 'cuda'.

    Raises:
        ConfigError: ``workers_per_node``, or what a parent leaves of them, is no multiple of ``tensor_parallel_size``.
    """
    resources = config.resources
    if resources.workers_per_node % resources.tensor_parallel_size:
        raise ConfigError(
            f"resources: workers_per_node {resources.workers_per_node} is not a multiple of tensor_parallel_size "
            f"{resources.tensor_parallel_size}, but a vLLM engine stays within a node; choose another of the two"
        )
    taken = {_teachers(recovery) for recovery in config.all_recoveries} if device == "cuda" else set()
    for teachers in sorted(taken):
        left = resources.workers_per_node - teachers
        if left < 1 or left % resources.tensor_parallel_size:
            raise ConfigError(
                f"recovery.teacher_workers_per_node: of {resources.workers_per_node} GPUs per node {teachers} for the "
                f"parent leave {max(0, left)} to train on, which is not a positive multiple of "
                f"resources.tensor_parallel_size {resources.tensor_parallel_size}; choose another "
                "recovery.teacher_workers_per_node"
            )


def check_fit(config: RunConfig, device: str, nodes: Sequence[dict[str, Any]]) -> NodeNeeds:
    """Hold what the recipe needs of every node against the nodes that Ray has; returns what it needs.

    Args:
        nodes: as ``ray.nodes()`` gives them.

    Raises:
        ConfigError: in one sentence, what there is and the remedy.
    """
    needs, alive = node_needs(config, device), living(nodes)
    if places(alive, needs.gpus, needs.cpus) < needs.count:
        raise ConfigError(_misfit(config, device, needs, alive))
    if config.needs_answers:
        storages = max(_storages(config, r, device) for r in config.all_recoveries if isinstance(r, GrpoConfig))
        least = -(-storages // len(alive))
        poor = [node.name for node in alive if node.cpus < least]
        if poor:
            raise ConfigError(
                f"resources: TransferQueue binds {least} storage actors of one logical CPU to every node, but "
                f"{', '.join(poor)} has fewer; start it with: ray start --num-cpus={max(least, 4)}"
            )
    return needs


def _misfit(config: RunConfig, device: str, needs: NodeNeeds, alive: Sequence[Node]) -> str:
    each = " each" if needs.count > 1 else ""
    wants = (
        f"resources: the recipe wants {needs.count} node{'s' if needs.count > 1 else ''} with {needs.gpus} GPUs and "
        f"{needs.cpus} logical CPUs{each} ({needs.because} reserves these CPUs, and verl packs a node's workers onto "
        f"one), but Ray has {_listed(alive)}"
    )
    if places(alive, needs.gpus, 0) >= needs.count:
        return f"{wants}; start the nodes with {_start(needs, device)}: nothing is bound to these CPUs"
    other = _other_layout(alive, config.resources.workers) if needs.gpus == config.resources.workers_per_node else None
    if other is not None:
        return f"{wants}; set resources.nodes={other[0]} and resources.workers_per_node={other[1]}"
    if device == "cpu":
        return f"{wants}; start the nodes with {_start(needs, device)}"
    return f"{wants}; add nodes, or lower resources.nodes or resources.workers_per_node"
