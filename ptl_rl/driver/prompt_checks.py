"""Whether the model's chat template, its end of an answer and the recipe's longest prompt suit the run's questions."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError, GrpoConfig, RunConfig
from ptl_rl.data.corpora import Corpus
from ptl_rl.data.prepare import RunData
from ptl_rl.data.prompts import prompt_ids, stops, template_end
from ptl_rl.families import read_config_json

SAMPLE = 200
"""Questions of a set whose length is looked at; where one of them is too long, all are."""


def check_prompts(config: RunConfig, model: Path, data: RunData) -> list[str]:
    """Put questions to the model as the run will; gives notes on those that are too long, and on how answers end.

    Raises:
        ConfigError: the template fails, nothing can end an answer, or too few prompts are short enough.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.model.trust_remote_code)
    questions = [corpus[0].question for corpus in data.sets.values() if len(corpus)]
    try:
        for question in filter(None, questions):
            prompt_ids(tokenizer, question + config.prompt_suffix)
        end = template_end(tokenizer)
    except Exception as error:  # a template is a program: it can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"model.path: {model}: its chat template fails on a question ({reason}); mend chat_template.jinja or "
            "tokenizer_config.json beside its weights"
        ) from None
    try:  # as trainers do at the end of a training
        with tempfile.TemporaryDirectory() as folder:
            trust = config.model.trust_remote_code
            if (
                trust or read_config_json(model)["model_type"] in CONFIG_MAPPING
            ):  # not SliceGPT's, known to workers alone
                AutoConfig.from_pretrained(model, trust_remote_code=trust).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # of many kinds, by what the files say
        raise ConfigError(
            f"model.path: {model}: its configuration or tokenizer cannot be written back, at which a training would "
            f"end ({' '.join(str(error).split())}); mend the files that this names"
        ) from None
    return [*_end_notes(tokenizer, end, config, model), *_length_notes(tokenizer, config, data)]


def _end_notes(tokenizer: Any, end: int | None, config: RunConfig, model: Path) -> list[str]:
    stopping = stops(tokenizer)
    if not stopping:
        raise ConfigError(
            f"model.path: {model}: nothing ends an answer, as neither its tokenizer has an eos_token nor its "
            "generation_config.json an eos_token_id; set one of them"
        )
    if end is None or end in stopping:
        return []
    names = ", ".join(repr(tokenizer.decode([token])) for token in sorted(stopping))
    return [
        f"{config.model.path}: its chat template ends an answer with {tokenizer.decode([end])!r}, but generation stops "
        f"at {names} alone, so worked solutions end with {tokenizer.eos_token!r}; if the model was taught its "
        f"template, add {end} to eos_token_id in its generation_config.json"
    ]


def _length_notes(tokenizer: Any, config: RunConfig, data: RunData) -> list[str]:
    most = config.data.max_prompt_tokens

    def fits(question: str) -> bool:
        return len(prompt_ids(tokenizer, question + config.prompt_suffix)) <= most

    notes = []
    for name, parts in _read_by_rl(config, data).items():
        if all(_fitting(part, fits, SAMPLE) == min(len(part), SAMPLE) for part in parts):
            continue
        total, counts = sum(map(len, parts)), [_fitting(part, fits) for part in parts]
        wanted = _prompts_per_step(config) if name == "train" else 1
        if min(counts) < wanted:
            raise ConfigError(
                f"data.max_prompt_tokens {most}: of the {total} questions of data.{name} {total - sum(counts)} are "
                f"longer in the chat template, which leaves {min(counts)} of {_subset(len(parts))}, and {wanted} are "
                "needed; raise it, or shorten the questions"
            )
        becomes = "cut at their beginning in evaluations" if name == "test" else "left out"
        notes.append(
            f"data.{name}: {total - sum(counts)} of {total} questions have more than data.max_prompt_tokens {most} "
            f"tokens in the chat template and are {becomes}"
        )
    return notes


def _subset(parts: int) -> str:
    return "a subset" if parts > 1 else "it"


def _read_by_rl(config: RunConfig, data: RunData) -> dict[str, list[Corpus]]:
    """The sets whose prompts have a limit, in the parts in which they are read."""
    rl = any(isinstance(recovery, GrpoConfig) for recovery in config.all_recoveries)
    read = {"train": data.subsets.get("train", []), "validation": [data.sets["validation"]]} if rl else {}
    return {**read, "test": [data.sets["test"]]}


def _prompts_per_step(config: RunConfig) -> int:
    return max((r.prompts_per_step for r in config.all_recoveries if isinstance(r, GrpoConfig)), default=1)


def _fitting(part: Corpus, fits: Callable[[str], bool], most: int | None = None) -> int:
    """How many of the questions, or of ``most`` of them at equal distances, fit."""
    step = max(1, len(part) // most) if most else 1
    return sum(fits(record.question) for record in part[: step * (most or len(part)) : step])
