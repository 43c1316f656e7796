"""Whether a model's end of an answer and a recipe's longest prompt suit the run's questions."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError, GrpoConfig, RunConfig
from ptl_rl.data.corpora import Corpus
from ptl_rl.data.prepare import RunData
from ptl_rl.data.prompts import prompt_ids, stops, template_end
from ptl_rl.families import read_shape
from ptl_rl.models import load_tokenizer

SAMPLE = 200
"""So many questions of a part, at equal distances, are looked at; where one of them is too long, all are."""


def check_prompts(config: RunConfig, model: Path, data: RunData) -> list[str]:
    """Put questions to the model as the run will; gives notes on those that are too long, and on how answers end.

    Raises:
        ConfigError: what stands beside the weights cannot be written back, nothing can end an answer, or too few
            prompts are short enough.
    """
    from transformers import AutoConfig

    trust = config.model.trust_remote_code
    tokenizer = load_tokenizer(model, trust)
    try:  # as trainers do at the end of a training
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            if read_shape(model).family.prunable:  # others' configurations are known to the workers alone
                AutoConfig.from_pretrained(model, trust_remote_code=trust).save_pretrained(folder)
    except Exception as error:  # of many kinds, by what the files say
        raise ConfigError(
            f"model.path: {model}: its configuration or tokenizer cannot be written back, at which a training would "
            f"end ({' '.join(str(error).split())}); mend the files that this names"
        ) from None
    return [*_end_notes(tokenizer, config, model), *_length_notes(tokenizer, config, data)]


def _end_notes(tokenizer: Any, config: RunConfig, model: Path) -> list[str]:
    stopping, end = stops(tokenizer), template_end(tokenizer)
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
        samples = [part[:: max(1, len(part) // SAMPLE)] for part in parts]
        if all(_fitting(sample, fits) == len(sample) for sample in samples):
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


def _fitting(part: Corpus, fits: Callable[[str], bool]) -> int:
    return sum(fits(record.question) for record in part)
