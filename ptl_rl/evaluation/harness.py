"""Run one evaluation task through lm-eval on vLLM, and judge every answer."""

import importlib.metadata
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl_rl.evaluation.final_answer import final_answer
from ptl_rl.evaluation.intervals import accuracy_interval
from ptl_rl.evaluation.task_data import Document
from ptl_rl.evaluation.tasks import EvalTask, expected, lm_eval_config


@dataclass(frozen=True)
class Generation:
    """What came of one prompt. ``truncated``: the response ran into a limit of tokens."""

    prompt_tokens: int
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Answered:
    """One question with its response and verdict: a row of the task's table of samples."""

    index: int
    prompt: str
    response: str
    answer: str | None
    """As stated in the response."""
    expected: str
    correct: float
    prompt_tokens: int
    tokens: int
    truncated: bool
    prompt_cut: bool
    """The prompt did not fit beside the response, and lost its beginning."""


@dataclass(frozen=True)
class TaskResult:
    """One task's figures."""

    accuracy: float
    low: float
    high: float
    """95 % bootstrap interval."""
    problems: int
    few_shot: int
    max_tokens: int
    truncated: int
    prompts_cut: int
    prompt_tokens: float
    tokens_per_answer: float
    seconds: float
    """Of generation."""
    seconds_per_solved: float | None
    """None: no problem is solved."""
    lm_eval: dict[str, float]
    """lm-eval's own metrics, by its names for them."""
    lm_eval_version: str


_ALL_AT_ONCE = 10**9


def make_model(
    folder: Path, *, max_model_tokens: int | None, dtype: str, tensor_parallel_size: int, bars: bool, **arguments: Any
) -> Any:
    """lm-eval's vLLM model of a folder, which also notes how each response ended.

    Args:
        bars: show vLLM's progress.

    The class is made here, for lm-eval and vLLM are imported only where something is evaluated.
    """
    from lm_eval.models.vllm_causallms import VLLM

    class NotingVLLM(VLLM):
        """Keeps every output of the last ``generate_until``; ``generation_of`` finds a prompt's."""

        def __init__(self, **keywords: Any) -> None:
            super().__init__(**keywords)
            self._outputs: dict[tuple[int, ...], Any] = {}
            self.generation_seconds = 0.0
            self.prompts_are_rendered = False
            """By a chat template, which writes every special token itself."""

        def tok_encode(self, string, add_special_tokens=None, **options):
            if self.prompts_are_rendered:
                add_special_tokens = False
            return super().tok_encode(string, add_special_tokens, **options)

        def _model_generate(self, requests, generate=False, sampling_params=None):
            outputs = super()._model_generate(requests, generate, sampling_params)
            if generate:
                self._outputs |= {tuple(output.prompt_token_ids): output for output in outputs}
            return outputs

        def generate_until(self, requests, disable_tqdm=False):
            self._outputs = {}
            started = time.monotonic()
            texts = super().generate_until(requests, disable_tqdm=True)  # vLLM's own bar, below it, has the same
            self.generation_seconds = time.monotonic() - started
            return texts

        def generation_of(self, prompt: str) -> tuple[Generation, bool]:
            """Of a prompt of the last call, and whether it lost its beginning."""
            ids = tuple(self.tok_encode(prompt))
            for length in (len(ids), *sorted({len(key) for key in self._outputs}, reverse=True)):
                if length and (output := self._outputs.get(ids[-length:])) is not None:
                    first = output.outputs[0]
                    made = Generation(length, len(first.token_ids), first.finish_reason == "length")
                    return made, length < len(ids)
            raise KeyError(f"no output for the prompt that ends in {prompt[-80:]!r}")

    return NotingVLLM(
        pretrained=str(folder),
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=max_model_tokens,
        batch_size="auto" if bars else _ALL_AT_ONCE,  # the same to vLLM, but for the bar
        **arguments,
    )


def run_task(
    model: Any,
    task: EvalTask,
    documents: Sequence[Document],
    *,
    prompt: Callable[[str], str],
    max_tokens: int,
    seed: int = 0,
    judged: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TaskResult, list[Answered]]:
    """Generate and judge the answers to ``documents``.

    Args:
        model: of :func:`make_model`, or any lm-eval model with what that one adds.
        prompt: text that a zero-shot question is put in.
        judged: called with answers judged and answers to judge.
    """
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask

    config = lm_eval_config(task, list(documents), prompt, max_tokens)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model.prompts_are_rendered = not task.definition and bool(model.tokenizer.chat_template)
    found = evaluator.evaluate(
        model, {"tasks": {task.name: ConfigurableTask(config=config)}}, bootstrap_iters=0, log_samples=True
    )
    seconds = model.generation_seconds
    assert found is not None  # only other ranks get nothing
    samples = {sample["doc_id"]: sample for sample in found["samples"][task.name]}  # one of each filter
    rows = []
    for done, index in enumerate(sorted(samples), 1):
        rows.append(_answered(model, task, index, documents[index], samples[index]))
        judged(done, len(samples))
    low, high = accuracy_interval([row.correct for row in rows], seed)
    own = found["results"][task.name]
    solved = sum(row.correct for row in rows)
    result = TaskResult(
        accuracy=solved / len(rows),
        low=low,
        high=high,
        problems=len(rows),
        few_shot=int(config.get("num_fewshot") or 0),
        max_tokens=max_tokens,
        truncated=sum(row.truncated for row in rows),
        prompts_cut=sum(row.prompt_cut for row in rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows) / len(rows),
        tokens_per_answer=sum(row.tokens for row in rows) / len(rows),
        seconds=seconds,
        seconds_per_solved=seconds / solved if solved else None,
        lm_eval={name: float(value) for name, value in own.items() if "," in name and isinstance(value, (int, float))},
        lm_eval_version=importlib.metadata.version("lm_eval"),
    )
    return result, rows


def _answered(model: Any, task: EvalTask, index: int, document: Document, sample: dict[str, Any]) -> Answered:
    text, response = sample["arguments"][0][0], sample["resps"][0][0]
    generation, cut = model.generation_of(text)
    return Answered(
        index=index,
        prompt=text,
        response=response,
        answer=None if task.judged_by else final_answer(response),
        expected=expected(document),
        correct=task.correct(document, response, sample),
        prompt_tokens=generation.prompt_tokens,
        tokens=generation.tokens,
        truncated=generation.truncated,
        prompt_cut=cut,
    )
