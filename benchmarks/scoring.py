"""What scoring costs beside a bare forward pass over the same batches, in one process, batch by batch in turns.

``python benchmarks/scoring.py smollm2-135m --data gsm8k_train.jsonl`` prints ratios: one criterion, the sums of all of
them, the second moments that ``obs`` needs, the solve for all blocks, compensation for a quarter of the channels, and
the way of the paper's released code (one prompt at a time, sets of ids on the host), extrapolated from one prompt of
each batch. Scoring needs no logits, so the ratios are to two passes: a plain ``model(ids)``, and one that is spared
them, too, which is what the hooks come on top of. Peaks of memory come from processes of their own, as what one pass
leaves in the allocator would hide another's.

``python benchmarks/scoring.py qwen2.5-7b-shape --dtype bfloat16``, on a machine with a GPU, does so there, with random
weights and tokens in a published model's sizes.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from criteria import split
from peak_memory import MIB, PeakGpuMemory, PeakMemory
from real_models import folder_of
from transformers import AutoTokenizer

from ptl_rl.config import CriterionConfig
from ptl_rl.data.encoding import Sequence
from ptl_rl.families import read_shape
from ptl_rl.pruning import engine
from ptl_rl.pruning.choose.choice import Scores, make_plan
from ptl_rl.pruning.command import load_model
from ptl_rl.pruning.compensate.algebra import least_squares, obs_importance
from ptl_rl.pruning.score.criteria import CHANNEL_CRITERIA
from ptl_rl.pruning.score.moments import SecondMoments
from ptl_rl.pruning.score.statistics import Collector, Needs
from ptl_rl.pruning.score.streaming import Listener, on_device


def concatenated(sequences: list[Sequence], count: int, length: int) -> list[Sequence]:
    """``count`` sequences of exactly ``length`` tokens, from the ids of all of them."""
    ids = [token for sequence in sequences for token in sequence.ids]
    if len(ids) < count * length:
        raise typer.BadParameter(f"the data has {len(ids)} tokens, {count} x {length} are wanted")
    return [Sequence(ids[i * length : (i + 1) * length], 0) for i in range(count)]


PLAIN, SPARED = "bare forward pass", "bare forward pass without logits"
RELEASED = "the released code's way"


def nothing(*_: object) -> None:
    """Takes no time."""


@dataclass(frozen=True)
class Way:
    """Something that reads all sequences, in parts, and then works out what it wants."""

    read: Callable[[list[Sequence]], None] = nothing
    finish: Callable[[], object] = nothing


def released_way(model, family, prompts: list[Sequence], remove: int) -> None:
    """One prompt at a time; the ids of every block's lowest activations at the last token, as sets, intersected."""
    seen: dict[int, torch.Tensor] = {}
    blocks = list(model.get_submodule(family.layers).children())
    handles = [
        block.get_submodule(f"{family.mlp}.{family.down_proj}").register_forward_pre_hook(
            lambda _m, inputs, layer=layer: seen.__setitem__(layer, inputs[0][0, -1])
        )
        for layer, block in enumerate(blocks)
    ]
    found: dict[int, set[int]] = {}
    with torch.no_grad():
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt.ids], device=model.device), use_cache=False)
            for layer, hidden_C in seen.items():
                lowest = set(hidden_C.topk(remove, largest=False).indices.tolist())
                found[layer] = found.get(layer, lowest) & lowest
    for handle in handles:
        handle.remove()


def main(
    model: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, testbed, qwen2.5-7b-shape, or a folder.")],
    data: Annotated[str | None, typer.Option(help="jsonl with question and solution; without: random tokens.")] = None,
    sequences: Annotated[int, typer.Option(help="How many.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 3,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the model.")] = "float32",
    peaks: Annotated[bool, typer.Option(help="Also measure peaks of memory.")] = True,
    peak_of: Annotated[str | None, typer.Option(help="Only print this pass's peak, in MiB.", hidden=True)] = None,
) -> None:
    """Time and memory of scoring against a bare forward pass."""
    if model == "testbed":
        from ptl_rl.testbed import CHECKPOINT_DIR as folder
    else:
        folder = folder_of(model)
    shape, policy_model = read_shape(folder), load_model(Path(folder), getattr(torch, dtype))
    place = policy_model.device
    if data is None:
        draw = random.Random(0)
        texts = [Sequence(draw.choices(range(policy_model.config.vocab_size), k=length), 0) for _ in range(sequences)]
    else:
        texts, _ = split(data, None, AutoTokenizer.from_pretrained(folder), sequences * length + length, 0, length)
    chosen = concatenated(texts, sequences, length)
    prunable = engine.PrunableModel(policy_model, shape.family, Path(folder), place, batch_size, 0, 1.0)
    remove = shape.intermediate_size // 4

    plan = make_plan(
        Scores(torch.rand(shape.num_hidden_layers, shape.intermediate_size), torch.ones(shape.num_hidden_layers), []),
        CriterionConfig(),
        remove_channels=remove,
        alignment=1,
        subset_hash="",
        source=Path(folder),
    )
    moments = SecondMoments(shape.num_hidden_layers, shape.intermediate_size, place)

    def bare(part: list[Sequence], **options: int) -> None:
        with torch.no_grad():
            for batch in on_device(prunable.batches(part), place):
                inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT}
                policy_model(**inputs, use_cache=False, **options)

    def scoring(needs: Needs, *others: Listener) -> Way:
        collector = Collector(policy_model, shape.family, shape.intermediate_size, place, needs)
        return Way(lambda part: prunable.read(part, [collector, *others]), lambda: collector.reduce())

    def criterion(name: str) -> Way:
        return scoring(replace(CHANNEL_CRITERIA[name].needs, cosine=False))

    def solve() -> None:
        own = copy(moments)  # the next repeat adds to them; a deep copy of a large model's would not fit on a GPU
        own._upper_CC = dict(moments._upper_CC)
        for layer in own.layers:
            weight_HC, moment_CC = prunable.weight(layer, "down_proj"), own.take(layer)
            importance_C = obs_importance(weight_HC, moment_CC, remove, 1e-3)
            keep = importance_C.topk(shape.intermediate_size - remove).indices.sort().values.tolist()
            least_squares(weight_HC, moment_CC, keep, 1e-3)

    def refit() -> None:
        with tempfile.TemporaryDirectory() as new_weights:
            engine.compensate(prunable, plan, chosen, Path(new_weights))

    ways: dict[str, Callable[[], Way]] = {
        PLAIN: lambda: Way(bare),
        SPARED: lambda: Way(lambda part: bare(part, logits_to_keep=1)),
        "activation and block_influence": lambda: criterion("activation"),
        "rms_contribution and block_influence": lambda: criterion("rms_contribution"),
        "the sums of all criteria": lambda: scoring(Needs()),
        "second moments and block_influence": lambda: scoring(Needs(sums=(), cosine=False), moments),
        "order of removal and new weights, all blocks": lambda: Way(finish=solve),
        "compensation, every block refit": lambda: Way(finish=refit),
        RELEASED: lambda: Way(lambda part: released_way(policy_model, shape.family, part[:1], remove)),
    }
    if peak_of is not None:
        with PeakMemory() if place.type == "cpu" else PeakGpuMemory() as peak:
            way = ways[peak_of]()
            way.read(chosen)
            way.finish()
        print(peak.added_mib)
        return
    parts = [chosen[start : start + batch_size] for start in range(0, sequences, batch_size)]
    report({name: make() for name, make in ways.items()}, parts, repeats, batch_size)
    if not peaks:
        return
    held_mib = sum(weight.nbytes for weight in policy_model.parameters()) / MIB
    print(f"\nPeak of memory above the model's {held_mib:.0f} MiB, in a process that does nothing else:")
    for name in list(ways)[:5]:
        peaks = [peak_in_own_process(name) for _ in range(repeats)]
        print(f"- {name}: {statistics.median(peaks):.1f} MiB", flush=True)


def peak_in_own_process(name: str) -> float:
    """MiB that a pass adds to a process that runs nothing else, and whose allocator returns what is freed."""
    command = [sys.executable, *sys.argv, "--peak-of", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024), "MALLOC_TRIM_THRESHOLD_": str(64 * 1024)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def report(ways: dict[str, Way], parts: list[list[Sequence]], repeats: int, batch_size: int) -> None:
    """Print each way's time against that of both bare passes, the median of all repeats and their range.

    All ways read a batch before any reads the next, so that a machine that is now fast and now slow is so for all.
    """
    seconds = {name: [0.0] * repeats for name in ways}
    names = list(ways)
    for name in names:
        ways[name].read(parts[0])  # warm up
    for repeat in range(repeats):
        for place, part in enumerate(parts):
            turn = (repeat + place) % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name][repeat] += timed(lambda way=ways[name], part=part: way.read(part))
        for name in names:
            scale = batch_size if name == RELEASED else 1
            seconds[name][repeat] = seconds[name][repeat] * scale + timed(ways[name].finish)
    tokens = sum(len(sequence.ids) for part in parts for sequence in part)
    where = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"{torch.get_num_threads()} threads"
    print(f"{tokens} tokens, {where}; medians of {repeats} repeats")
    print("| | seconds | of the bare pass | of one without logits |\n|---|---|---|---|")
    for name, values in seconds.items():
        cells = [f"{statistics.median(values):.2f}"]
        for bare in (PLAIN, SPARED):
            ratios = [value / of for value, of in zip(values, seconds[bare], strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
