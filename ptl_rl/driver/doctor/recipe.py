"""What one recipe asks for: its model, type and attention, room for the run, and the nodes of the Ray that it joins."""

import os
from dataclasses import dataclass
from pathlib import Path

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.driver import preflight
from ptl_rl.driver.cluster import check_fit, check_layout, living, node_needs
from ptl_rl.driver.doctor.finding import Finding, of_error, ok, problem, warning
from ptl_rl.driver.node_check import check_nodes
from ptl_rl.driver.preflight import check_disk, check_model
from ptl_rl.driver.prompt_checks import check_tokenizer
from ptl_rl.driver.ray_session import unreachable
from ptl_rl.errors import resolved
from ptl_rl.families import ModelShape
from ptl_rl.planning.hardware import nvidia_smi
from ptl_rl.planning.schedule import settled

BYTES_OFFLOADED = 12
"""Of host memory for a parameter: itself and Adam's two moments, in float32."""


@dataclass(frozen=True)
class Model:
    """The recipe's, where it was found."""

    folder: Path
    shape: ModelShape


def find_model(config: RunConfig) -> tuple[Model | None, Finding]:
    """The model as a run would find it, except that nothing is downloaded."""
    name = config.model.path
    if name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).is_dir():
        folder = _cached(name)
        if folder is None:
            offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
            text = f"{name} is not in the hub's cache of this machine"
            if offline:
                return None, problem("model", f"{text}, and HF_HUB_OFFLINE is set", f"hf download {name} elsewhere")
            return None, warning("model", f"{text}; the run would download it", f"hf download {name}")
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})
    try:
        folder, shape = check_model(config)
        check_tokenizer(config, folder)
    except ConfigError as error:
        return None, of_error("model", error)
    return Model(folder, shape), ok("model", f"{folder}, {shape.parameters / 1e6:.1f} million parameters")


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    from ptl_rl.models import WEIGHT_PATTERNS

    try:
        folder = Path(snapshot_download(name, allow_patterns=WEIGHT_PATTERNS, local_files_only=True))
    except Exception:  # the hub client raises many kinds; all mean that it is not there
        return None
    return folder if list(folder.glob("*.safetensors")) else None


def check_attention(config: RunConfig, device: str, model: Model) -> Finding:
    """What ``model.attention`` comes to, and the type beside it."""
    try:
        attention = preflight.check_attention(config, device, model.folder)
    except ConfigError as error:
        return of_error("attention", error)
    if attention.note:
        return warning("attention", attention.note)
    return ok("attention", f"{attention.name}, {config.model.dtype}")


def check_dtype(config: RunConfig, device: str) -> Finding:
    """bfloat16 needs GPUs of compute capability 8 or more; CPUs compute it slowly."""
    dtype = config.model.dtype
    if device == "cpu" and dtype == "bfloat16":
        return warning("dtype", "bfloat16 is slow on most CPUs", "set model.dtype to float32")
    old = [row[0] for row in nvidia_smi("compute_cap") if float(row[0]) < 8] if device == "cuda" else []
    if old and dtype == "bfloat16":
        text = f"bfloat16, but the GPUs are of compute capability {old[0]}, older than 8.0"
        return problem("dtype", text, "use newer GPUs (A100, H100), or model.dtype float32")
    return ok("dtype", dtype)


def check_room(config: RunConfig, model: Model, run_dir: Path) -> Finding:
    """For the run's checkpoints."""
    try:
        check_disk(settled(config, model.shape), model.shape, model.folder, resolved(run_dir))
    except ConfigError as error:
        return of_error("disk", error)
    return ok("disk", f"room for the run in {run_dir}")


def offloaded_gib(config: RunConfig, shape: ModelShape) -> float:
    """Host memory per node for what recoveries with ``offload`` put there."""
    if not any(recovery.offload for recovery in config.all_recoveries):
        return 0.0
    return BYTES_OFFLOADED * shape.parameters / config.resources.nodes / 2**30


def check_ray(config: RunConfig | None, device: str, run_dir: Path | None, model: Model | None) -> list[Finding]:
    """The Ray at RAY_ADDRESS and its nodes against the recipe; nothing is started, except one task per node.

    Args:
        run_dir: asks every node whether it shares this folder, and for everything else that is checked before stage 1.
    """
    given = os.environ.get("RAY_ADDRESS")
    try:
        if config is not None:
            check_layout(config, device)
        if not given:
            return [ok("Ray", _own(config, device))]
        if reason := unreachable(given):
            remedy = "start it (ray start --head), or unset RAY_ADDRESS, and the run starts its own"
            return [problem("Ray", f"nobody answers at RAY_ADDRESS={given} ({reason})", remedy)]
        return _joined(config, device, run_dir, model)
    except ConfigError as error:
        return [of_error("Ray", error)]


def _own(config: RunConfig | None, device: str) -> str:
    if config is None:
        return "RAY_ADDRESS is not set: a run starts its own"
    needs = node_needs(config, device)
    cpus = max(config.resources.ray_cpus, needs.cpus * needs.count)
    return (
        f"RAY_ADDRESS is not set: the run starts its own with {cpus} logical CPUs ({needs.because} wants {needs.cpus})"
    )


def _joined(config: RunConfig | None, device: str, run_dir: Path | None, model: Model | None) -> list[Finding]:
    import ray

    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return [problem("Ray", f"cannot be joined: {reason}", "start it on this node, too (ray start)")]
    try:
        nodes = ray.nodes()
        names = ", ".join(f"{node.name}: {node.gpus} GPUs, {node.cpus} CPUs" for node in living(nodes))
        findings = [ok("Ray", f"joined; {names}")]
        if config is None:
            return findings
        check_fit(config, device, nodes)
        if run_dir is not None:
            existed = run_dir.exists()
            try:
                notes = check_nodes(config, device, resolved(run_dir), [model.folder] if model else [])
            finally:
                if not existed and run_dir.is_dir():
                    run_dir.rmdir()
            findings.append(ok("nodes", "all share the run folder and have the same files and packages"))
            findings += [warning("nodes", note, "a stage waits two minutes for GPUs; ask again then") for note in notes]
        return findings
    finally:
        ray.shutdown()
