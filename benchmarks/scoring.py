"""What scoring costs beside a bare forward pass over the same batches, in one process, interleaved.

``python benchmarks/scoring.py smollm2-135m --data gsm8k_train.jsonl`` prints ratios: one criterion, the sums of all of
them, the second moments that ``obs`` needs, the solve for all blocks, and the way of the paper's released code (one
prompt at a time, sets of ids on the host), extrapolated from a few prompts to the same number of tokens. Peaks of
memory come from processes of their own, as what one pass leaves in the allocator would hide another's.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from criteria import load, split
from peak_memory import MIB, PeakMemory
from real_models import folder_of
from transformers import AutoTokenizer

from ptl_rl.families import read_shape
from ptl_rl.pruning import engine
from ptl_rl.pruning.calibration import Sequence
from ptl_rl.pruning.compensation import least_squares, obs_importance
from ptl_rl.pruning.criteria import CHANNEL_CRITERIA
from ptl_rl.pruning.moments import SecondMoments
from ptl_rl.pruning.statistics import Collector, Needs


def concatenated(sequences: list[Sequence], count: int, length: int) -> list[Sequence]:
    """``count`` sequences of exactly ``length`` tokens, from the ids of all of them."""
    ids = [token for sequence in sequences for token in sequence.ids]
    if len(ids) < count * length:
        raise typer.BadParameter(f"the data has {len(ids)} tokens, {count} x {length} are wanted")
    return [Sequence(ids[i * length : (i + 1) * length], 0) for i in range(count)]


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
            model(input_ids=torch.tensor([prompt.ids]), use_cache=False)
            for layer, hidden_C in seen.items():
                lowest = set(hidden_C.topk(remove, largest=False).indices.tolist())
                found[layer] = found.get(layer, lowest) & lowest
    for handle in handles:
        handle.remove()


def main(
    model: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, testbed, or a folder.")],
    data: Annotated[str, typer.Option(help="jsonl with question and solution.")],
    sequences: Annotated[int, typer.Option(help="How many.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 3,
    peak_of: Annotated[str | None, typer.Option(help="Only print this pass's peak, in MiB.", hidden=True)] = None,
) -> None:
    """Time and memory of scoring against a bare forward pass."""
    if model == "testbed":
        from ptl_rl.testbed import CHECKPOINT_DIR as folder
    else:
        folder = folder_of(model)
    shape, tokenizer, policy_model = read_shape(folder), AutoTokenizer.from_pretrained(folder), load(Path(folder))
    texts, _ = split(data, None, tokenizer, sequences * length + length, 0, length)
    chosen = concatenated(texts, sequences, length)
    policy = engine.Policy(policy_model, shape.family, Path(folder), torch.device("cpu"), batch_size, 0, 1.0)
    remove, cpu = shape.intermediate_size // 4, torch.device("cpu")

    def bare() -> None:
        with torch.no_grad():
            for batch in policy.batches(chosen):
                inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT}
                policy_model(**inputs, use_cache=False, logits_to_keep=1)

    def sums(needs: Needs) -> None:
        collector = Collector(policy_model, shape.family, shape.intermediate_size, cpu, needs)
        policy.read(chosen, [collector])
        collector.reduce()

    def one_criterion(name: str) -> Callable[[], None]:
        return lambda: sums(replace(CHANNEL_CRITERIA[name].needs, cosine=False))

    moments = SecondMoments(shape.num_hidden_layers, shape.intermediate_size, cpu)

    def second_moments() -> None:
        for moment_CC in moments.own_CC.values():
            moment_CC.zero_()
        needs = Needs(sums=(), cosine=False)
        collector = Collector(policy_model, shape.family, shape.intermediate_size, cpu, needs)
        policy.read(chosen, [collector, moments])
        collector.reduce()

    def solve() -> None:
        for layer, moment_CC in moments.own_CC.items():
            weight_HC = policy.weight(layer, "down_proj")
            importance_C = obs_importance(weight_HC, moment_CC, remove, 1e-3)
            keep = importance_C.topk(shape.intermediate_size - remove).indices.sort().values.tolist()
            least_squares(weight_HC, moment_CC, keep, 1e-3)

    few = max(1, sequences // 16)

    def released() -> None:
        released_way(policy_model, shape.family, chosen[:few], remove)

    work: dict[str, tuple[Callable[[], None], float]] = {
        "bare forward pass": (bare, 1),
        "activation and block_influence": (one_criterion("activation"), 1),
        "rms_contribution and block_influence": (one_criterion("rms_contribution"), 1),
        "the sums of all criteria": (lambda: sums(Needs()), 1),
        "second moments and block_influence": (second_moments, 1),
        "order of removal and new weights, all blocks": (solve, 1),
        "the released code's way": (released, sequences / few),
    }
    if peak_of is not None:
        with PeakMemory() as peak:
            work[peak_of][0]()
        print(peak.added_mib)
        return
    report(work, repeats, sequences * length, model)
    held_mib = sum(weight.nbytes for weight in policy_model.parameters()) / MIB
    passes = list(work)[:4]
    for name in passes:
        peaks = [peak_in_own_process(name) for _ in range(repeats)]
        print(f"{name}: peak {statistics.median(peaks):.1f} MiB above the model's {held_mib:.0f} MiB")


def peak_in_own_process(name: str) -> float:
    """MiB that a pass adds to a process that runs nothing else, and whose allocator returns what is freed."""
    command = [sys.executable, *sys.argv, "--peak-of", name]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024), "MALLOC_TRIM_THRESHOLD_": str(64 * 1024)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def report(work: dict[str, tuple[Callable[[], None], float]], repeats: int, tokens: int, model: str) -> None:
    """Run everything in turns and print medians, and medians of each round's ratio to its first."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    next(iter(work.values()))[0]()  # warm up
    for _ in range(repeats):
        for name, (function, factor) in work.items():
            started = time.perf_counter()
            function()
            seconds[name].append((time.perf_counter() - started) * factor)
    firsts = next(iter(seconds.values()))
    print(f"{model}, {tokens} tokens, {torch.get_num_threads()} threads; medians of {repeats}")
    print("| | seconds | of the bare pass | lowest-highest |\n|---|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / first for value, first in zip(values, firsts, strict=True)]
        spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
        print(f"| {name} | {statistics.median(values):.2f} | {statistics.median(ratios):.3f} | {spread} |")


if __name__ == "__main__":
    typer.run(main)
