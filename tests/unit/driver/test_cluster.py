"""What a recipe needs of every node is counted node by node, as verl reserves it, not in sum."""

import re

import pytest

from ptl_rl.config import ConfigError
from ptl_rl.config.recipe import load_config, parse_config
from ptl_rl.driver import cluster
from ptl_rl.driver.cluster import check_fit, check_layout, living, memory_of_node, node_needs, shared_memory

BASE = {"schedule": {"channels_per_cycle": [64]}}
GRPO = {"prompts_per_step": 16, "rollouts_per_prompt": 8}


def recipe(recovery=GRPO, **resources):
    return parse_config({**BASE, "recovery": recovery, "resources": {"device": "cuda", **resources}})


def node(gpus: int, cpus: int, name: str = "10.0.0.1", alive: bool = True) -> dict:
    resources = {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {}), "memory": 1e9}
    return {"NodeID": f"{name}-{gpus}", "NodeManagerAddress": name, "Alive": alive, "Resources": resources}


def nodes(count: int, gpus: int, cpus: int) -> list[dict]:
    return [node(gpus, cpus, f"10.0.0.{i + 1}") for i in range(count)]


def test_what_verl_reserves(repository):
    both = load_config(repository / "recipes/cpt_grpo_qwen2.5-7b_8xh200.yaml")
    assert node_needs(both, "cuda").cpus == 80  # the SFT trainer: ten beside each of eight GPUs
    rl = load_config(repository / "recipes/grpo_qwen2.5-7b_8xh200.yaml")
    # Three beside each GPU; TransferQueue's controller and eight storages; one in which the others are placed.
    assert (node_needs(rl, "cuda").gpus, node_needs(rl, "cuda").cpus) == (8, 24 + 9 + 1)
    two = recipe(nodes=2, workers_per_node=8)
    assert node_needs(two, "cuda").cpus == 24 + 4 + 1 + 1  # the storages are shared out
    fewer = {**GRPO, "verl": {"transfer_queue.backend.SimpleStorage.num_data_storage_units": 2}}
    assert node_needs(recipe(fewer, workers_per_node=8), "cuda").cpus == 24 + 2 + 1 + 1


def test_a_parent_that_teaches_has_own_workers_on_cpu_alone():
    distill = {"method": "distill", "prompts_per_step": 12, "teacher_workers_per_node": 2}
    config = recipe(distill, workers_per_node=8)
    assert (node_needs(config, "cuda").gpus, node_needs(config, "cuda").cpus) == (8, 24 + 9 + 1)
    config = recipe(distill, device="cpu", workers_per_node=2)
    # One storage on CPUs, and three CPUs beside each of the parent's workers, too.
    assert (node_needs(config, "cpu").gpus, node_needs(config, "cpu").cpus) == (4, 12 + 1 + 1 + 1)


def test_four_nodes_of_four_are_not_two_of_eight():
    config = recipe(nodes=2, workers_per_node=8)
    message = (
        r"wants 2 nodes with 8 GPUs and 30 logical CPUs each .* but Ray has 4 nodes with 4 GPUs and 64 logical CPUs "
        r"each; set resources\.nodes=4 and resources\.workers_per_node=4$"
    )
    with pytest.raises(ConfigError, match=message):
        check_fit(config, "cuda", nodes(4, 4, 64))
    check_fit(config, "cuda", nodes(2, 8, 64))
    check_fit(config, "cuda", [*nodes(2, 8, 64), node(0, 8, "head")])
    check_fit(config, "cuda", nodes(1, 16, 64))  # both packs on one node
    check_fit(recipe(nodes=4, workers_per_node=4), "cuda", nodes(4, 4, 64))


def test_too_few_cpus_beside_the_gpus_are_named_with_the_command():
    cpt = recipe([{"cpt": {}}], workers_per_node=8)
    message = (
        r"1 node with 8 GPUs and 80 logical CPUs \(recovery\.cpt reserves .* but Ray has 1 node with 8 GPUs and 64 "
        r"logical CPUs; start the nodes with ray start --num-cpus=80: nothing is bound"
    )
    with pytest.raises(ConfigError, match=message):
        check_fit(cpt, "cuda", [node(8, 64)])
    check_fit(cpt, "cuda", [node(8, 80)])
    with pytest.raises(ConfigError, match=r"Ray has 1 node with 8 GPUs and 12 .*ray start --num-cpus=34"):
        check_fit(recipe(workers_per_node=8), "cuda", [node(8, 12)])


def test_dead_nodes_do_not_count_and_cpus_are_needed_on_the_head_too():
    config = recipe(workers_per_node=8)
    with pytest.raises(ConfigError, match="but Ray has no living node; add nodes, or lower"):
        check_fit(config, "cuda", [node(8, 64, alive=False)])
    with pytest.raises(ConfigError, match=r"binds 4 storage actors .* to every node, but head has fewer"):
        check_fit(config, "cuda", [node(0, 0, "head"), node(8, 64)])
    check_fit(recipe([{"cpt": {}}], workers_per_node=4), "cuda", [node(0, 0, "head"), node(8, 64)])
    with pytest.raises(ConfigError, match=r"ray start --num-cpus=12 --num-gpus=3 \(logical on CPU\)"):
        check_fit(
            recipe(device="cpu", workers_per_node=3, recovery={**GRPO, "prompts_per_step": 3}), "cpu", [node(0, 2)]
        )


def test_nodes_of_one_host_are_told_apart():
    one, other = node(4, 8), {**node(4, 8), "NodeID": "another-id"}
    assert len({found.name for found in living([one, other])}) == 2
    named = living([{**node(1, 1), "NodeManagerHostname": "gpu-7"}])[0].name
    assert named == "gpu-7 (10.0.0.1)"


def test_an_engine_stays_within_a_node():
    check_layout(recipe(nodes=2, workers_per_node=4, tensor_parallel_size=2), "cuda")
    split = recipe(
        {"prompts_per_step": 3, "rollouts_per_prompt": 2}, nodes=2, workers_per_node=3, tensor_parallel_size=2
    )
    with pytest.raises(ConfigError, match=r"workers_per_node 3 is not a multiple of tensor_parallel_size 2"):
        check_layout(split, "cuda")


@pytest.mark.parametrize("place", ["recovery", "recovery_of_cycle"])
def test_the_gpus_that_a_parent_leaves_hold_whole_engines(place):
    def config(workers: int, teachers: int, **resources):
        entry = {"distill": {"prompts_per_step": 7 * 6 * 8, "teacher_workers_per_node": teachers}}
        recoveries = {"recovery": [entry]} if place == "recovery" else {"recovery_of_cycle": {1: [entry]}}
        return parse_config({**BASE, **recoveries, "resources": {"workers_per_node": workers, **resources}})

    odd = config(8, 1, tensor_parallel_size=2, device="cuda")
    message = (
        r"recovery\.teacher_workers_per_node: of 8 GPUs per node 1 for the parent leave 7 to train on, which is not a "
        r"positive multiple of resources\.tensor_parallel_size 2; choose another recovery\.teacher_workers_per_node$"
    )
    with pytest.raises(ConfigError, match=message):
        check_layout(odd, "cuda")
    check_layout(config(8, 2, tensor_parallel_size=2, device="cuda"), "cuda")
    check_layout(config(8, 1, tensor_parallel_size=2, device="auto"), "cpu")  # a parent has workers of its own there
    with pytest.raises(ConfigError, match="of 2 GPUs per node 2 for the parent leave 0 to train on"):
        check_layout(config(2, 2, device="auto"), "cuda")


def test_shared_memory_follows_the_bucket_of_weights():
    config = recipe(device="cpu", workers_per_node=2)
    assert shared_memory(config, "cpu").least == 0.125 + 2 * 64 / 1024
    key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    large = recipe({**GRPO, "verl": {key: 2048}}, device="cpu", workers_per_node=2)
    assert shared_memory(large, "cpu").least == 0.125 + 2 * 2
    assert shared_memory(recipe([{"cpt": {}}], device="cpu", workers_per_node=2), "cpu").least == 0  # no buckets
    split = recipe([{"cpt": {}}], device="cpu", workers_per_node=2, tensor_parallel_size=2)
    assert shared_memory(split, "cpu").least == 0.125  # the processes of one vLLM engine
    assert shared_memory(recipe(workers_per_node=8), "cuda").least == 1.0  # buckets are GPU memory there
    assert re.fullmatch(r"4\.2\d*", str(shared_memory(recipe(workers_per_node=8), "cuda").ample))


def test_shared_memory_is_wanted_where_nccl_has_several_ranks():
    one, two, apart = recipe(workers_per_node=1), recipe(workers_per_node=2), recipe(nodes=2, workers_per_node=1)
    assert [shared_memory(config, "cuda").least for config in (one, two, apart)] == [0, 1, 1]
    assert memory_of_node(two, "cuda", gpus=0).least == 0  # a cluster's head
    assert memory_of_node(two, "cuda", gpus=2).least == 1


def test_verl_still_reserves_what_is_counted():
    import inspect
    from dataclasses import fields

    from verl.single_controller.ray.base import RayResourcePool, ResourcePoolManager

    from ptl_rl.recovery.verl_config import composed

    pool = inspect.signature(RayResourcePool.__init__).parameters["max_colocate_count"].default
    manager = next(f.default for f in fields(ResourcePoolManager) if f.name == "max_colocate_count")
    assert (pool, manager) == (cluster.SFT_CPUS_PER_WORKER, cluster.RL_CPUS_PER_WORKER)
    storages = composed("ppo_trainer", {}).transfer_queue.backend.SimpleStorage.num_data_storage_units
    assert storages == cluster.QUEUE_STORAGES
