"""Where vLLM's time goes on a CPU at a saturated batch, operator by operator: what a smaller model cannot save.

``python benchmarks/speed_profile.py ORIGINAL COMPACTED``: microseconds per generated token of each. Run it alone.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated

import typer

GROUPS = {
    "matrix products": ("linear", "mm", "matmul", "onednn", "gemm"),
    "attention": ("attention", "reshape_and_cache", "rotary"),
    "norms and activation": ("norm", "silu", "gelu"),
    "embedding, sampling and copies": ("embedding", "argmax", "softmax", "index", "copy", "cat", "gather", "to"),
}


def group_of(operator: str) -> str:
    """The first group that an operator's name belongs to."""
    name = operator.lower()
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other operators")


def profile(folder: str, sequences: int, tokens: int) -> dict[str, float]:
    """Microseconds per generated token, by group; ``outside operators`` is Python: scheduling, batching, ..."""
    from ptl_rl.evaluation.command import prepare_machine, quieten_libraries

    quieten_libraries()
    prepare_machine()
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", max_model_len=2 * tokens + 8, max_num_seqs=sequences, enforce_eager=True)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": [10 + (i * 7 + k) % 200 for k in range(tokens)]} for i in range(sequences)]
    llm.generate(prompts, sampling, use_tqdm=False)
    started = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    plain = time.perf_counter() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        llm.generate(prompts, sampling, use_tqdm=False)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        group = group_of(event.key)
        found[group] = found.get(group, 0.0) + event.self_cpu_time_total
    count = sequences * tokens
    shares = {group: value / count for group, value in found.items()}
    shares["outside operators"] = max(0.0, 1e6 * plain / count - sum(shares.values()))
    return shares | {"in all, without the profiler": 1e6 * plain / count}


def main(
    models: Annotated[list[str], typer.Argument(help="Folders; the first is compared with.")],
    sequences: Annotated[int, typer.Option(help="At once.")] = 256,
    tokens: Annotated[int, typer.Option(help="Of prompt and of response.")] = 64,
) -> None:
    """Print a markdown table."""
    columns = []
    for model in models:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            columns.append(pool.submit(profile, model, sequences, tokens).result())
    print("| microseconds per token | " + " | ".join(models) + " |\n|" + "---|" * (len(models) + 1))
    for group in dict.fromkeys(group for column in columns for group in column):
        print(f"| {group} | " + " | ".join(f"{column.get(group, 0):.1f}" for column in columns) + " |")


if __name__ == "__main__":
    typer.run(main)
