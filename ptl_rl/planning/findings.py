"""What of a plan will not fit, each with the settings that would mend it, and what is worth knowing."""

from ptl_rl.config import CptConfig
from ptl_rl.families import ModelShape
from ptl_rl.planning.duration import BYPASS
from ptl_rl.planning.hardware import GIB
from ptl_rl.planning.memory import Phase, Planned
from ptl_rl.planning.schedule import Cut

KERNEL_WIDTH = 128
"""Channels that 4-bit (Marlin) and block FP8 kernels of one GPU want multiples of."""
_MORE = "more GPUs (resources.nodes, workers_per_node)"


def findings(planned: Planned, shape: ModelShape, found: list[Phase], cuts: list[Cut]) -> tuple[list[str], list[str]]:
    """Sentences for what will not fit, and notes."""
    problems = [problem for phase in found if (problem := _problem(planned, phase))]
    return problems, [*_widths(planned, shape, cuts), *_overrides(planned)]


def _problem(planned: Planned, phase: Phase) -> str | None:
    limit = planned.device.memory_gib
    if phase.room is not None and phase.room < 1:
        return (
            f"{phase.name}: vLLM's cache has no room for one sequence of full length beside the weights; "
            f"{_serving_remedy(planned, phase)}"
        )
    needed = phase.bytes / GIB
    if planned.device.is_cpu:
        needed = needed * planned.config.resources.workers + phase.others_gib
    if needed <= limit:
        return None
    what = "all processes" if planned.device.is_cpu else f"a {planned.device.name}"
    whose = f"but this machine has {limit:.1f}" if planned.device.is_cpu else f"but it has {limit:.1f}"
    return f"{phase.name} (cycle {phase.cycle}): {needed:.1f} GiB on {what}, {whose}; {_remedy(planned, phase)}"


def _serving_remedy(planned: Planned, phase: Phase) -> str:
    resources = planned.config.resources
    if phase.name.endswith("teacher"):
        return "raise recovery.teacher_tensor_parallel_size"
    if phase.name == "evaluate":
        return f"raise resources.tensor_parallel_size ({resources.tensor_parallel_size})"
    return (
        f"raise resources.gpu_memory_utilization ({resources.gpu_memory_utilization:g}) or "
        f"resources.tensor_parallel_size ({resources.tensor_parallel_size}), or lower data.max_response_tokens"
    )


def _remedy(planned: Planned, phase: Phase) -> str:
    config, calibration = planned.config, planned.config.calibration
    if phase.name == "slice in place":
        return "set schedule.rematerialise to never"
    if phase.name.startswith(("score", "slice")):
        sums = phase.parts.get("sums", 0.0)
        if sums > 0.5 * phase.bytes:
            now = "no limit" if calibration.moments_gib is None else f"{calibration.moments_gib:g}"
            return f"lower calibration.moments_gib ({now}), or {_MORE}"
        return f"lower calibration.batch_size ({calibration.batch_size}) or calibration.max_tokens, or {_MORE}"
    if phase.name.endswith("rollouts"):
        share = config.resources.gpu_memory_utilization
        return f"lower resources.gpu_memory_utilization ({share:g}), or set recovery.offload to true"
    if phase.name == "evaluate":
        return "raise resources.tensor_parallel_size"
    return _training_remedy(planned, phase)


def _training_remedy(planned: Planned, phase: Phase) -> str:
    state = sum(phase.parts.get(name, 0.0) for name in ("parameters", "gradients", "optimizer"))
    if state > 0.8 * planned.device.memory_gib * GIB:
        return f"parameters, gradients and optimizer alone take {state / GIB:.1f}; {_MORE}"
    method = phase.name.removeprefix("recover: ").split(":")[0]
    recovery = next(r for r in planned.config.all_recoveries if r.method == method)
    remedies = []
    if not recovery.gradient_checkpointing:
        remedies.append("set recovery.gradient_checkpointing to true")
    if isinstance(recovery, CptConfig):
        remedies.append(f"lower recovery.micro_batch_tokens ({recovery.micro_batch_tokens})")
        if not recovery.reshard_after_forward:
            remedies.append("set recovery.reshard_after_forward to true")
    else:
        remedies.append(f"lower recovery.micro_batch_sequences ({recovery.micro_batch_sequences})")
        if not recovery.offload and not phase.name.endswith("update"):
            remedies.append("set recovery.offload to true")
    return ", ".join([*remedies, f"or take {_MORE}"])


def _widths(planned: Planned, shape: ModelShape, cuts: list[Cut]) -> list[str]:
    """Widths that would have to be served without quantization."""
    parallel, wrong, width = planned.config.resources.tensor_parallel_size, [], shape.intermediate_size
    for cut in cuts:
        width -= cut.channels
        if cut.channels and width % (KERNEL_WIDTH * parallel):
            wrong.append(str(width))
    if planned.device.is_cpu or not wrong:
        return []
    each = f" x tensor_parallel_size {parallel}" if parallel > 1 else ""
    return [
        f"channels {', '.join(wrong)} are no multiples of {KERNEL_WIDTH}{each}: 4-bit (Marlin) and block FP8 kernels "
        f"refuse them; set schedule.alignment to {KERNEL_WIDTH} if the model is to be quantized"
    ]


def _overrides(planned: Planned) -> list[str]:
    config = planned.config
    keys = {*config.verl, *(key for recovery in config.all_recoveries for key in recovery.verl)} - {BYPASS}
    return [f"verl keys of the recipe are not looked at: {', '.join(sorted(keys))}"] if keys else []
