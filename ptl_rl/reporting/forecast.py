"""A run's plan for the reader: cycles, memory by phase, disk, hours, price, and what will not fit."""

from rich.console import Console
from rich.table import Table

from ptl_rl.planning.forecast import Forecast
from ptl_rl.planning.hardware import GIB
from ptl_rl.planning.memory import CPU_OTHERS_GIB, CPU_RL_OTHERS_GIB, Phase
from ptl_rl.tables import text_table

GROUPS = {
    "policy": ("parameters", "gathered", "loading"),
    "optimizer": ("optimizer", "gradients"),
    "reference": ("reference", "parent"),
    "activations": ("activations", "logits"),
    "vLLM": ("vLLM weights", "vLLM work"),
    "cache": ("KV cache",),
    "sums": ("sums", "streams", "transfer", "files"),
    "runtime": ("runtime", "process", "vLLM process"),
}
"""Column to the parts that it adds up."""


def show_forecast(found: Forecast, console: Console) -> None:
    """Print all of a plan."""
    where = f"{found.gpus} workers on {found.device.name}" if found.device.is_cpu else _gpus(found)
    console.print(f"{found.config.name}: {found.model.name}", highlight=False, soft_wrap=True)
    console.print(f"planned for {where}, attention {found.attention}\n", highlight=False)
    console.print(cycle_table(found))
    console.print(memory_table(found))
    for line in lines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for problem in found.problems:
        console.print(f"will not fit: {problem}", style="bold red", highlight=False, soft_wrap=True, markup=False)


def _gpus(found: Forecast) -> str:
    return f"{found.gpus} x {found.device.name} ({found.device.memory_gib:g} GiB each)"


def cycle_table(found: Forecast) -> Table:
    """One row per planned cycle; gate decisions can only add recovery or smaller cuts."""
    first, rows = found.cycles[0].shape, []
    for number, row in enumerate(found.cycles):
        shape = row.shape
        flops = shape.flops_per_token()
        rows.append(
            {
                "cycle": str(number) if number else "original",
                "layers": str(shape.num_hidden_layers),
                "channels": str(shape.intermediate_size),
                "parameters": f"{shape.parameters:,} ({shape.parameters / first.parameters:.0%})",
                "FLOPs/token": f"{flops:,} ({flops / first.flops_per_token():.0%})",
                "steps": row.recoveries,
                "rollouts": f"{row.rollouts:,}" if row.rollouts else "",
                "read tokens": f"{row.read_tokens:,}" if row.read_tokens else "",
                "hours": f"{found.cycle_seconds(number) / 3600:.2f}",
            }
        )
    captions = []
    if rollouts := sum(row.rollouts for row in found.cycles):
        captions.append(f"{rollouts:,} rollouts of at most {found.config.data.max_response_tokens:,} tokens in all")
    if any(row.read_tokens for row in found.cycles):
        captions.append("read tokens: at most; a sequence may be shorter")
    return text_table(rows, caption="; ".join(captions))


def _group(phase: Phase, names: tuple[str, ...]) -> float:
    return sum(phase.parts.get(name, 0.0) for name in names) / GIB


def memory_table(found: Forecast) -> Table:
    """GiB of every phase in the cycle in which it is largest."""
    what = "all processes of a worker" if found.device.is_cpu else "one GPU"
    table = Table(title=f"GiB, {what}, in the cycle where a phase is largest", title_justify="left")
    used = {name: parts for name, parts in GROUPS.items() if any(_group(p, parts) for p in found.phases)}
    for heading in ("phase", "cycle", *used, "in all"):
        table.add_column(heading, justify="left" if heading == "phase" else "right", no_wrap=True)
    if not found.device.is_cpu:
        table.add_column("host/node", justify="right")
    table.add_column("sequences", justify="right")
    for phase in found.phases:
        cells = [_gib(_group(phase, parts)) for parts in used.values()]
        too_much = phase.bytes / GIB > found.device.memory_gib
        host = [] if found.device.is_cpu else [_gib(phase.host / GIB)]
        room = "" if phase.room is None else f"{max(0, int(phase.room)):,}"
        table.add_row(
            phase.name,
            str(phase.cycle),
            *cells,
            _gib(phase.bytes / GIB),
            *host,
            room,
            style="bold red" if too_much else None,
        )
    table.caption = "sequences: of full length, that vLLM's cache holds at once"
    if found.device.is_cpu:
        table.caption += (
            f"; beside the workers some {CPU_OTHERS_GIB:g} GiB for the driver and Ray, {CPU_RL_OTHERS_GIB:g} in RL"
        )
    return table


def _gib(size: float) -> str:
    if not size:
        return ""
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def lines(found: Forecast) -> list[str]:
    """Disk, hours, price, what they rest on, and notes."""
    disk = found.disk
    written = f"disk: {disk.kept / GIB:.1f} GiB stay, {disk.peak / GIB:.1f} GiB at most"
    if disk.extension:
        written += f"; each further round that the gate asks for {disk.extension / GIB:.1f}"
    said = [written]
    if disk.resumable:
        said.append(
            f"checkpoint within a recovery (save_every_steps): {disk.resumable / GIB:.1f} GiB, "
            f"{found.checkpoint_seconds:.0f} s at {found.assumed.disk_gb_per_second:g} GB/s"
        )
    by_stage: dict[str, float] = {}
    for time in found.times:
        by_stage[time.stage] = by_stage.get(time.stage, 0.0) + time.seconds / 3600
    parts = ", ".join(f"{stage} {hours:.2f}" for stage, hours in by_stage.items())
    said.append(f"hours: {found.seconds / 3600:.1f} in all ({parts})")
    if found.price is not None:
        said.append(f"price: {found.price:,.0f} at {found.price_per_gpu_hour:g} per GPU and hour")
    return [
        *said,
        *(f"assumed: {line}" for line in found.assumed.lines(found.device.is_cpu)),
        *(f"note: {n}" for n in found.notes),
    ]
