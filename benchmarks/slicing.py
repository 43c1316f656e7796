"""What slicing a checkpoint costs beside reading and writing the same checkpoint, interleaved in one process.

``python benchmarks/slicing.py smollm2-135m`` also measures the largest memory of each of two ranks.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from real_models import folder_of
from safetensors.torch import load_file, save_file

from ptl_rl.checkpoints.read import checkpoint_files
from ptl_rl.families import read_shape
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import slice_checkpoint

HERE = Path(__file__).resolve().parent
RANK_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[5])
from peak_memory import PeakMemory
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import slice_weights
source, plan, out, rank = Path(sys.argv[1]), PruningPlan.load(Path(sys.argv[2])), Path(sys.argv[3]), int(sys.argv[4])
with PeakMemory() as peak:
    slice_weights(source, plan, out, rank=rank, ranks=2)
print(peak.added_mib)
"""


def plan_of(folder: Path, share: float) -> PruningPlan:
    """Every block loses a random ``share`` of its channels."""
    shape = read_shape(folder)
    width = shape.intermediate_size
    generator = torch.Generator().manual_seed(0)
    kept = width - round(width * share)
    channels = [
        torch.randperm(width, generator=generator)[:kept].sort().values.tolist() for _ in range(shape.num_hidden_layers)
    ]
    return PruningPlan(
        keep_channels=channels,
        keep_layers=list(range(shape.num_hidden_layers)),
        layer_order=[],
        source_intermediate_size=width,
        alignment=1,
        channel_criterion="random",
        layer_criterion="explicit",
        subset_hash="",
        source=str(folder),
    )


def copy(folder: Path, out: Path) -> None:
    """Read all tensors and write them."""
    out.mkdir()
    for file in sorted(set(checkpoint_files(folder).values())):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(tensors, out / file.name, metadata={"format": "pt"})


def main(
    model: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or a folder.")],
    share: Annotated[float, typer.Option(help="Share of the channels that go.")] = 0.25,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 7,
) -> None:
    """Time of slicing against a plain load and save, and memory of each of two ranks."""
    folder = folder_of(model)
    plan = plan_of(folder, share)
    size = sum(file.stat().st_size for file in set(checkpoint_files(folder).values())) / 2**20
    seconds: dict[str, list[float]] = {"load and save": [], "slice and save": []}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(repeats + 1):
            for name in seconds:
                out = Path(place, "out")
                started = time.perf_counter()
                copy(folder, out) if name == "load and save" else slice_checkpoint(folder, plan, out)
                seconds[name].append(time.perf_counter() - started)
                shutil.rmtree(out)
        first = statistics.median(seconds["load and save"][1:])  # the first round warms the page cache
        print(f"{model}, {size:.0f} MiB, {share:.0%} of the channels go; medians of {repeats}")
        print("| | seconds | of load and save | lowest-highest |\n|---|---|---|---|")
        for name, values in seconds.items():
            values = values[1:]
            median, spread = statistics.median(values), f"{min(values) / first:.2f}-{max(values) / first:.2f}"
            print(f"| {name} | {median:.2f} | {median / first:.2f} | {spread} |")
        ranks(folder, plan, Path(place), size)


def ranks(folder: Path, plan: PruningPlan, place: Path, size: float) -> None:
    """Two processes slice their shares at once; the memory that each adds."""
    shape = read_shape(folder)
    plan.save(place / "plan.json")
    out = place / "ranks"
    out.mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, *map(str, (folder, place / "plan.json", out, rank, HERE))],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    layer = 4 * (shape.mlp_matrix_parameters + shape.attention_matrix_parameters) / 2**20
    written = sum(file.stat().st_size for file in out.glob("*")) / 2**20 if all(p.wait() == 0 for p in started) else 0
    for rank, process in enumerate(started):
        assert process.stdout is not None
        added = float(process.stdout.read())
        allowed = size / 2 + 2 * layer
        print(f"rank {rank}: {added:.0f} MiB added; its shard of the source and two layers: {allowed:.0f} MiB")
    print(f"both wrote {written:.0f} MiB")


if __name__ == "__main__":
    typer.run(main)
