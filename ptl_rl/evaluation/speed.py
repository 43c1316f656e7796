"""How fast models generate in vLLM, measured side by side: each in a process of its own, their turns interleaved.

What else a machine does changes from minute to minute; taking turns, every round of one model has a round of the
others beside it, and ratios are taken round by round.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ptl_rl.errors import check_sockets
from ptl_rl.families import ModelShape, read_shape

SATURATED = "saturated"


@dataclass(frozen=True)
class Load:
    """What is asked of an engine at once: so many prompts of so many tokens, and responses of a fixed length."""

    name: str
    sequences: int
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Spread:
    """Of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class ModelSpeed:
    """One model's figures; ratios are to the first model's."""

    model: str
    parameters: int
    weight_bytes: int
    """Of the parameters in the type that they are served in."""
    flops_per_token: int
    flops_per_token_without_head: int
    tokens_per_second: dict[str, Spread]
    """Generated tokens, by load."""
    speedup: dict[str, Spread]
    """Ratios of :attr:`tokens_per_second`, round by round."""
    promised: float
    """The first model's FLOPs per token, output head and attention included, over this one's."""

    def kept(self, load: str) -> float:
        """The share of the promised speedup that is there."""
        return self.speedup[load].median / self.promised


def usual_loads(sequences: int = 128, prompt_tokens: int = 64, response_tokens: int = 64) -> list[Load]:
    """One request at a time, and so many at once that the device is kept busy."""
    return [
        Load("batch 1", 1, prompt_tokens, response_tokens),
        Load(SATURATED, sequences, prompt_tokens, response_tokens),
    ]


# In the process of one model.
_engine: Any = None


def end_with(parent: int) -> None:
    """A parent that is killed cannot end its processes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _start(
    folder: str, dtype: str, window: int, sequences: int, memory: float, tensor_parallel_size: int, shapes_only: bool
) -> int:
    """Load a model; returns the size of its vocabulary."""
    global _engine
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    from ptl_rl.cpu import checks, vllm_alias

    os.environ.update(checks.cuda_env_vars())
    from vllm import LLM

    vllm_alias.register()
    try:
        _engine = LLM(
            model=folder,
            dtype=dtype,
            max_model_len=window,
            max_num_seqs=sequences,
            gpu_memory_utilization=memory,
            tensor_parallel_size=tensor_parallel_size,
            enforce_eager=checks.is_cpu_only(),
            enable_prefix_caching=False,  # rounds repeat their prompts
            seed=0,
            load_format="dummy" if shapes_only else "auto",
        )
    except Exception as error:  # of any kind; some of vLLM's cannot be sent to the process that asks
        raise RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    # What comes now is the noise of a process that ends; errors reach the caller as exceptions.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return int(_engine.llm_engine.model_config.get_vocab_size())


def _measure(load: Load, vocabulary: int) -> float:
    """Generated tokens per second of one round."""
    import random

    from vllm import SamplingParams

    draw = random.Random(load.sequences)
    prompts = [
        {"prompt_token_ids": [draw.randrange(10, vocabulary) for _ in range(load.prompt_tokens)]}
        for _ in range(load.sequences)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=load.response_tokens, ignore_eos=True)
    started = time.perf_counter()
    _engine.generate(prompts, sampling, use_tqdm=False)
    return load.sequences * load.response_tokens / (time.perf_counter() - started)


def measure(
    folders: list[Path],
    loads: list[Load],
    *,
    rounds: int,
    dtype: str,
    tensor_parallel_size: int = 1,
    shapes_only: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ModelSpeed]:
    """Every model under every load, ``rounds`` times, in turns; a first round of each is not counted.

    Args:
        dtype: float32 or bfloat16.
        tensor_parallel_size: GPUs that share one model; each model needs so many, or shares them with the others.
        shapes_only: the folders have no weights; random ones are as fast.
    """
    check_sockets()
    shapes = [read_shape(folder) for folder in folders]
    window = max(load.prompt_tokens + load.response_tokens for load in loads) + 8
    sequences = max(load.sequences for load in loads)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    found: dict[tuple[int, str], list[float]] = {}
    with ExitStack() as stack:
        spawn = get_context("spawn")
        pools = [stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for _ in folders]
        arguments = (dtype, window, sequences, 0.85 / len(folders), tensor_parallel_size, shapes_only)
        vocabularies = [
            pool.submit(_start, str(folder), *arguments).result() for pool, folder in zip(pools, folders, strict=True)
        ]
        total, done = (rounds + 1) * len(loads) * len(folders), 0
        for number in range(rounds + 1):
            for load in loads:
                turns = list(range(len(folders)))
                for index in turns if number % 2 else reversed(turns):
                    speed = pools[index].submit(_measure, load, vocabularies[index]).result()
                    if number:
                        found.setdefault((index, load.name), []).append(speed)
                    done += 1
                    progress(done, total)
    context = window // 2
    return [_figures(str(folder), index, shapes, loads, found, dtype, context) for index, folder in enumerate(folders)]


def _figures(
    model: str,
    index: int,
    shapes: list[ModelShape],
    loads: list[Load],
    found: dict[tuple[int, str], list[float]],
    dtype: str,
    context: int,
) -> ModelSpeed:
    shape, first = shapes[index], shapes[0]
    return ModelSpeed(
        model=model,
        parameters=shape.parameters,
        weight_bytes=shape.parameters * (4 if dtype == "float32" else 2),
        flops_per_token=shape.flops_per_token(),
        flops_per_token_without_head=shape.flops_per_token(output_head=False),
        tokens_per_second={load.name: Spread.of(found[index, load.name]) for load in loads},
        speedup={
            load.name: Spread.of(
                [own / other for own, other in zip(found[index, load.name], found[0, load.name], strict=True)]
            )
            for load in loads
        },
        promised=first.flops_per_token(context) / shape.flops_per_token(context),
    )
