"""What slicing a checkpoint costs beside reading and writing the same checkpoint, interleaved in one process.

``python benchmarks/slicing.py smollm2-135m`` also measures the largest memory of each of two ranks.
"""

import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from peak_memory import PeakMemory
from real_models import folder_of
from safetensors.torch import load_file, save_file

from ptl_rl.checkpoints.headers import checkpoint_files
from ptl_rl.config import CriterionConfig
from ptl_rl.families import read_shape
from ptl_rl.pruning.choose.choice import Scores, make_plan
from ptl_rl.pruning.plan import PruningPlan
from ptl_rl.pruning.slice.slicing import slice_checkpoint, slice_weights


def plan_of(folder: Path, share: float) -> PruningPlan:
    """Every block loses a random ``share`` of its channels."""
    shape = read_shape(folder)
    layers, width = shape.num_hidden_layers, shape.intermediate_size
    importance_LC = torch.rand(layers, width, generator=torch.Generator().manual_seed(0))
    criterion, scores = CriterionConfig(compensate="none"), Scores(importance_LC, torch.ones(layers), [])
    remove = round(width * share)
    return make_plan(scores, criterion, remove_channels=remove, alignment=1, subset_hash="", source=folder)


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
        ranks(folder, plan, Path(place, "ranks"), size)


def added_mib(folder: Path, plan: PruningPlan, out: Path, rank: int) -> float:
    """What one of two ranks adds to its process."""
    with PeakMemory() as peak:
        slice_weights(folder, plan, out, rank=rank, ranks=2)
    return peak.added_mib


def ranks(folder: Path, plan: PruningPlan, out: Path, size: float) -> None:
    """Two processes slice their shares at once; the memory that each adds."""
    shape = read_shape(folder)
    out.mkdir()
    layer = 4 * (shape.mlp_matrix_parameters + shape.attention_matrix_parameters) / 2**20
    # A process each: what one pass leaves in the allocator would hide another's.
    pools = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(2)]
    found = [pool.submit(added_mib, folder, plan, out, rank) for rank, pool in enumerate(pools)]
    for rank, added in enumerate(found):
        allowed = size / 2 + 2 * layer
        print(f"rank {rank}: {added.result():.0f} MiB added; its shard of the source and two layers: {allowed:.0f} MiB")
    print(f"both wrote {sum(file.stat().st_size for file in out.glob('*')) / 2**20:.0f} MiB")


if __name__ == "__main__":
    typer.run(main)
