"""The one Ray session of a run: started here on a single machine, joined where one is running (``ray job submit``)."""

import os
import socket
import time
from typing import Any

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.driver.cluster import check_fit, check_layout, living, node_needs, places
from ptl_rl.driver.node_check import check_machine


class WorkersHeld(RuntimeError):
    """GPUs that the next stage needs are not free; the message says what holds them."""


def unreachable(address: str, seconds: float = 5) -> str | None:
    """Why nobody answers at ``host:port``; None if somebody does, or it is no such address ('auto')."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


class RaySession:
    """Context manager; ``address`` is what stage processes join.

    Args:
        device: 'cpu' or 'cuda'.
    """

    def __init__(self, config: RunConfig, device: str) -> None:
        self.config, self.device = config, device
        self.needs = node_needs(config, device)
        self.address = ""
        self.started_here = False

    def __enter__(self) -> "RaySession":
        """Start or join Ray.

        Raises:
            ConfigError: no Ray answers at RAY_ADDRESS, its nodes do not have what the recipe needs, or this machine has
                too little shared memory or room for a Ray of its own.
        """
        import ray

        check_layout(self.config, self.device)
        given = os.environ.get("RAY_ADDRESS")
        self.started_here = not given
        if self.started_here:
            check_machine(self.config, self.device)
            self._start()
        else:
            self._join(str(given))
        self.address = ray.get_runtime_context().gcs_address
        try:
            check_fit(self.config, self.device, ray.nodes())
        except ConfigError:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        import ray

        needs = self.needs
        ray.init(
            address="local",  # another user's Ray on this machine is none of ours
            num_cpus=max(self.config.resources.ray_cpus, needs.count * needs.cpus),
            num_gpus=needs.count * needs.gpus if self.device == "cpu" else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )

    def _join(self, given: str) -> None:
        import ray

        if given.startswith("ray://"):
            raise ConfigError(
                f"RAY_ADDRESS={given} is Ray Client's, whose processes run elsewhere; start `ptl run` on a node of the "
                "cluster with RAY_ADDRESS=auto, or submit it as a job (launch/submit.sh)"
            )
        try:
            if problem := unreachable(given):  # Ray itself tries for minutes
                raise ConnectionError(problem)
            ray.init(log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            token = "" if os.environ.get("RAY_AUTH_MODE") else ", set RAY_AUTH_MODE=token if the head asks for a token"
            raise ConfigError(
                f"RAY_ADDRESS={given}: cannot join Ray there ({reason}); start it (ray start) on the head and on this "
                f"node{token}, or unset RAY_ADDRESS, and the run starts a Ray of its own"
            ) from None

    def wait_for_workers(self, namespaces: str, seconds: float = 120) -> None:
        """Wait until every GPU that the run uses is free again, in the packs that a stage needs.

        Named actors that an ended stage left behind are ended when half of the time is over.

        Args:
            namespaces: what the names of this run's own namespaces begin with.

        Raises:
            WorkersHeld: some are still held after ``seconds``.
        """
        started, ended = time.monotonic(), False
        while not self._are_free():
            waited = time.monotonic() - started
            if waited > seconds:
                raise WorkersHeld(
                    f"of {self.needs.count} x {self.needs.gpus} GPUs some are still held after {seconds:g} s"
                    f"{_holders()}; end what holds them, or wait for it"
                )
            if not ended and waited > seconds / 2:
                _end_leftovers(namespaces)
                ended = True
            time.sleep(0.1)

    def _are_free(self) -> bool:
        import ray
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        nodes = [{**node, "Resources": free.get(node["NodeID"], {})} for node in ray.nodes()]
        return places(living(nodes), self.needs.gpus, 0) >= self.needs.count

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()


def _end_leftovers(namespaces: str) -> None:
    """End named actors of this run's ended stages; Ray itself ends those that nobody named."""
    import ray

    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"].startswith(namespaces):
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
            except ValueError:
                continue  # it ended in between


def _holders() -> str:
    """In words, which living actors and placement groups there are; empty if none is known."""
    import ray
    from ray._private.state import actors

    names: list[str] = []
    for actor in actors(actor_state_name="ALIVE").values():
        place = f"process {actor['Pid']} on {actor['Address']['IPAddress']}"
        names.append(f"actor {actor['Name'] or actor['ActorClassName']} ({place}, job {actor['JobID']})")
    groups: dict[str, dict[str, Any]] = ray.util.placement_group_table()
    for group in groups.values():
        if group["state"] == "CREATED" and any("GPU" in bundle for bundle in group["bundles"].values()):
            names.append(f"placement group {group['name'] or group['placement_group_id']}")
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f", by {', '.join(names[:4])}{more}" if names else ""
