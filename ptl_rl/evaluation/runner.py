"""The stage ``evaluate``: greedy answers to the test problems through vLLM, and how many of them are right."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptl_rl.config import RunConfig
from ptl_rl.data.prompts import prompt_ids
from ptl_rl.evaluation.intervals import accuracy_interval, paired
from ptl_rl.evaluation.judge import JudgeError, Verdicts, judge
from ptl_rl.families import read_shape
from ptl_rl.stage import StageContext


@dataclass(frozen=True)
class Answer:
    """One greedy answer. ``truncated``: it ran into the token limit."""

    text: str
    tokens: int
    truncated: bool


def hide_other_gpus() -> None:
    """Leave only this actor's GPUs visible; vLLM takes the first that it sees.

    Ray does so itself, unless it was started with RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES. To be called before
    anything asks for a GPU.
    """
    import ray

    own = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if own:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))


class Engine:
    """A vLLM engine in one Ray actor; with tensor parallelism it holds as many GPUs. ``options`` are vLLM's."""

    def __init__(self, cpu: bool, options: dict[str, Any]) -> None:
        if not cpu:
            hide_other_gpus()
        from vllm import LLM

        self.llm = LLM(**options, enforce_eager=cpu)
        self.generate([[1, 2, 3]], 4)  # the first batch pays for lazy set-up

    def generate(self, prompts: list[list[int]], max_tokens: int) -> tuple[list[Answer], float]:
        """Greedy answers to token-id prompts, and the seconds that generation took."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=max_tokens)
        started = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        firsts = [output.outputs[0] for output in outputs]
        return [Answer(o.text, len(o.token_ids), o.finish_reason == "length") for o in firsts], seconds


def _options(config: RunConfig, context: StageContext, model: Path, max_tokens: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": config.model.dtype,
        "max_model_len": config.data.max_prompt_tokens + max_tokens,
        "max_num_seqs": config.evaluation.batch_size,
        "tensor_parallel_size": config.resources.tensor_parallel_size,
        "gpu_memory_utilization": 0.9 if context.spec.device == "cuda" else 0.6,
        "seed": config.seed,
        "trust_remote_code": config.model.trust_remote_code,
    }


def _prompt_ids(config: RunConfig, source: Path, questions: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.model.trust_remote_code)
    prompts = []
    for question in questions:
        ids = prompt_ids(tokenizer, question + config.prompt_suffix)
        prompts.append(ids[-config.data.max_prompt_tokens :])
    return prompts


def _generate(
    context: StageContext, model: Path, prompts: list[list[int]], max_tokens: int
) -> tuple[list[Answer], float]:
    """Spread the prompts over all engines; returns the answers in order and the slowest engine's seconds."""
    import ray

    config = context.config
    tensor_parallel = config.resources.tensor_parallel_size
    replicas = max(1, min(config.resources.workers // tensor_parallel, len(prompts)))
    # In the actor's own process: nothing is left behind when Ray ends the actor.
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    actor = ray.remote(num_cpus=1, num_gpus=tensor_parallel, runtime_env={"env_vars": env})(Engine)
    options = _options(config, context, model, max_tokens)
    engines = [actor.remote(context.spec.device == "cpu", options) for _ in range(replicas)]
    chunk = max(1, min(4 * config.evaluation.batch_size, -(-len(prompts) // replicas)))
    starts = list(range(0, len(prompts), chunk))
    pending = {
        engines[i % replicas].generate.remote(prompts[start : start + chunk], max_tokens): i
        for i, start in enumerate(starts)
    }
    answers: dict[int, list[Answer]] = {}
    seconds = [0.0] * replicas
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        index = pending.pop(ready[0])
        answers[index], taken = ray.get(ready[0])
        seconds[index % replicas] += taken
        context.report(len(answers), len(starts))
    for engine in engines:  # another model may follow on their GPUs
        ray.kill(engine)
    return [answer for index in range(len(starts)) for answer in answers[index]], max(seconds)


def evaluate(context: StageContext) -> dict:
    """Write ``eval.json`` and ``samples.parquet``; returns accuracy, cost and speed.

    ``tokens_per_second`` counts generated tokens of all engines over the time of generation alone. ``interval`` is the
    accuracy's, at 95 %. Where the cut model is measured, too, ``after_cut`` has its accuracy and interval, and
    ``recovered`` the difference on the same problems, paired.
    """
    import pyarrow
    import pyarrow.parquet

    from ptl_rl.checkpoints.read import check_finite

    config, spec = context.config, context.spec
    context.connect_ray()
    if spec.cycle == 0:  # vLLM writes nonsense with weights that are not numbers; later ones are this run's own
        for folder in {spec.source, spec.parent}:
            check_finite(folder)
    records = list(context.data.evaluation("test"))
    max_tokens = config.evaluation.max_response_tokens or config.data.max_response_tokens
    prompts = _prompt_ids(config, spec.source, [record.question for record in records])
    answers, seconds = _generate(context, spec.source, prompts, max_tokens)
    verdicts = judge(config, records, [a.text for a in answers], lambda: context.report(1, 1))
    correct = verdicts.correct
    rows = [
        {"id": r.id, "question": r.question, "expected": r.answer, "correct": c, **asdict(a)}
        for r, a, c in zip(records, answers, correct, strict=True)
    ]
    of_cut: dict[str, Any] = {}
    if spec.after_cut is not None:
        texts = [a.text for a in _generate(context, spec.after_cut, prompts, max_tokens)[0]]
        try:
            before = judge(config, records, texts, lambda: context.report(1, 1))
        except JudgeError:  # what a cut has ruined can be beyond any reward function
            before = Verdicts([0.0] * len(texts), failed=len(texts))
        for row, text, value in zip(rows, texts, before.correct, strict=True):
            row |= {"text_after_cut": text, "correct_after_cut": value}
        of_cut = {
            "after_cut": {
                "accuracy": sum(before.correct) / len(texts),
                "interval": accuracy_interval(before.correct),
                "reward_errors": before.failed,
            },
            "recovered": asdict(paired(before.correct, correct)),
        }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), spec.out / "samples.parquet")
    shape = read_shape(spec.source)
    tokens = sum(a.tokens for a in answers)
    metrics = {
        "accuracy": sum(correct) / len(correct),
        "interval": accuracy_interval(correct),
        **of_cut,
        "problems": len(records),
        "reward_errors": verdicts.failed,
        "truncated": sum(a.truncated for a in answers),
        "tokens_per_answer": tokens / len(answers),
        "tokens_per_second": tokens / seconds,
        "parameters": shape.parameters,
        "flops_per_token": shape.flops_per_token(),
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
    }
    (spec.out / "eval.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
