"""The evaluation tasks: whose prompt each has, where its questions come from, and what makes an answer right.

Prompts, few-shot examples, stop sequences and answer filters of the few-shot tasks are lm-eval's own definitions; the
zero-shot ones put a question as training does. Whatever metrics lm-eval has for a task are reported beside
``accuracy``, which is the same for all mathematics: the stated final answer (:mod:`final_answer`) equals the known one.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ptl_rl.config import ConfigError, SourceConfig
from ptl_rl.evaluation import task_data
from ptl_rl.evaluation.final_answer import final_answer
from ptl_rl.evaluation.task_data import Document, Documents

Metrics = Callable[[Document, list[str]], dict[str, float]]
"""lm-eval's ``process_results``: metrics of one document from its (filtered) responses."""


@dataclass(frozen=True)
class EvalTask:
    """One task. Text is generated greedily, to a stop sequence or ``max_tokens``."""

    name: str
    what: str
    sources: tuple[SourceConfig, ...]
    """Whose questions are taken in turns; none: they have to be named."""
    to_document: Callable[[dict[str, Any]], Document]
    """Of a row; raises :class:`RowError`."""
    max_tokens: int
    definition: str | None = None
    """Of lm-eval, a file in its task folder; None: the question in the model's chat template, zero-shot."""
    metrics: Metrics | None = None
    """In place of lm-eval's own; None: those."""
    metric_names: tuple[str, ...] = ()
    """Of ``metrics``."""
    judged_by: str | None = None
    """The one of ``metric_names`` that says whether an answer is right; None: the stated final answer does."""

    def correct(self, document: Document, response: str, metrics: dict[str, Any]) -> float:
        """1.0 for a right answer, 0.0 for any other.

        Args:
            metrics: of this response, by ``metric_names``.
        """
        if self.judged_by is not None:
            return float(metrics[self.judged_by])
        from reward.accuracy import answers_equal

        answer = final_answer(response)
        return float(answer is not None and answers_equal(answer, expected(document)))


def expected(document: Document) -> str:
    """The known answer of a document; of a program its tests."""
    if "tests" in document:
        return str(document["tests"])
    return str(document["answer"]).rpartition("####")[2].strip()


def _math_verify(document: Document, responses: list[str]) -> dict[str, float]:
    """lm-eval's ``math_verify``: answers are looked for anywhere in the two texts. In a limited process, for its time
    limits are signals, and sympy may eat all memory before they ring."""
    from reward.judge_pool import default_pool

    verdict = default_pool().judge(document["solution"], responses[0], whole_texts=True)
    return {"math_verify": float(verdict == "equal")}


def _pass_at_1(document: Document, responses: list[str]) -> dict[str, float]:
    """lm-eval's ``pass_at_1`` of one response, in a confined process."""
    from reward.programs.reward import passes

    return {"pass_at_1": float(passes(responses[0], document["tests"]))}


def _none(document: Document, responses: list[str]) -> dict[str, float]:
    return {}


def _hub(name: str, *configs: str) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(path=f"hub:{name}", split="test", config=config) for config in configs or (None,))


_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


_MINERVA = "minerva_math/minerva_math_algebra.yaml"
_BOXED_TOKENS = 3000
TASKS = {
    task.name: task
    for task in (
        EvalTask(
            "gsm8k",
            "GSM8K, chain of thought, 8 examples",
            _hub("openai/gsm8k", "main"),
            task_data.gsm8k_document,
            512,
            "gsm8k/gsm8k-cot.yaml",
        ),
        EvalTask(
            "minerva_math",
            "Hendrycks MATH with Minerva's prompt, 4 examples",
            _hub("EleutherAI/hendrycks_math", *_MATH_SUBJECTS),
            task_data.math_document,
            1024,
            _MINERVA,
            _math_verify,
            ("math_verify",),
        ),
        EvalTask(
            "math500",
            "MATH-500 with Minerva's prompt, 4 examples",
            _hub("HuggingFaceH4/MATH-500"),
            task_data.math_document,
            1024,
            "minerva_math/minerva_math500.yaml",
            _math_verify,
            ("math_verify",),
        ),
        EvalTask(
            "mbpp",
            "MBPP, 3 examples, programs run in a confined process",
            _hub("google-research-datasets/mbpp", "full"),
            task_data.mbpp_document,
            512,
            "mbpp/mbpp.yaml",
            _pass_at_1,
            ("pass_at_1",),
            "pass_at_1",
        ),
        EvalTask(
            "college_science",
            "the college-science set that is called Minerva, too; zero-shot, boxed",
            _hub("math-ai/minervamath"),
            task_data.question_document,
            _BOXED_TOKENS,
        ),
        EvalTask(
            "gsm8k_boxed",
            "GSM8K, zero-shot, boxed",
            _hub("openai/gsm8k", "main"),
            task_data.gsm8k_document,
            _BOXED_TOKENS,
        ),
        EvalTask(
            "math500_boxed",
            "MATH-500, zero-shot, boxed",
            _hub("HuggingFaceH4/MATH-500"),
            task_data.math_document,
            _BOXED_TOKENS,
        ),
        EvalTask(
            "boxed",
            "your own questions, zero-shot, boxed",
            (),
            task_data.question_document,
            _BOXED_TOKENS,
        ),
    )
}


def find_tasks(names: list[str]) -> list[EvalTask]:
    """The tasks of these names.

    Raises:
        ConfigError: a name that no task has, or the same one twice.
    """
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(TASKS)}"
            raise ConfigError(f"`tasks`: {name!r} is no task; {hint}")
    if not names:
        raise ConfigError(f"`tasks`: name at least one of {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"`tasks` {','.join(names)}: name each task once")
    return [TASKS[name] for name in names]


def lm_eval_config(
    task: EvalTask, documents: list[Document], prompt: Callable[[str], str], max_tokens: int
) -> dict[str, Any]:
    """What lm-eval's ``ConfigurableTask`` is made of.

    Args:
        documents: of :func:`read_task`.
        prompt: the text that a zero-shot question is put in.
    """
    import datasets

    from ptl_rl.verl_patches.lm_eval_tasks import task_definition

    if task.definition:
        config = task_definition(task.definition)
    else:
        config = {
            "doc_to_text": lambda document: prompt(_question(document)),
            "doc_to_target": expected,
            "generation_kwargs": {"until": [], "do_sample": False},
            "output_type": "generate_until",
            "num_fewshot": 0,
        }
    for key in ("tag", "group", "dataset_path", "dataset_name", "training_split", "unsafe_code"):
        config.pop(key, None)
    config |= {
        "task": task.name,
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
        "generation_kwargs": config["generation_kwargs"] | {"max_gen_toks": max_tokens},
        "metadata": None,
    }
    metrics = task.metrics or (None if task.definition else _none)
    if metrics is not None:
        config["process_results"] = metrics
        config["metric_list"] = [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in task.metric_names
        ]
    return config


def read_task(task: EvalTask, sources: Sequence[SourceConfig], limit: int | None) -> Documents:
    """The first questions of a task, but those that its prompt shows as examples.

    Raises:
        DataError: as :func:`read_documents`.
    """
    shown = _examples(task)

    def to_document(row: dict[str, Any]) -> Document | None:
        document = task.to_document(row)
        return None if _words(_question(document)) in shown else document

    return task_data.read_documents(sources, to_document, limit)


def _examples(task: EvalTask) -> set[str]:
    if not task.definition:
        return set()
    from ptl_rl.verl_patches.lm_eval_tasks import task_definition

    samples = task_definition(task.definition)["fewshot_config"]["samples"]
    return {_words(_question(example)) for example in (samples() if callable(samples) else samples)}


def _question(document: Document) -> str:
    return str(next(document[key] for key in ("question", "problem", "text") if key in document))


def _words(text: str) -> str:
    return " ".join(text.split())
