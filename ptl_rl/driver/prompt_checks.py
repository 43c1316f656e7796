"""Whether tokenizer, chat template, end of an answer and longest prompt suit the run's questions."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError, GrpoConfig, RunConfig
from ptl_rl.data.corpora import Corpus
from ptl_rl.data.prepare import RunData
from ptl_rl.data.prompts import prompt_ids, stops, template_end
from ptl_rl.families import UnsupportedModelError, read_shape
from ptl_rl.models import check_readable, load_tokenizer

SAMPLE = 200
"""So many questions of a part, at equal distances, are looked at; where one of them is too long, all are."""

PromptTokens = Callable[[Iterable[str]], list[int]]
"""How many tokens the prompts of questions have."""


def check_tokenizer(config: RunConfig, model: Path) -> tuple[Any, list[str]]:
    """The tokenizer, tried as every stage will use it, and notes on how answers end. Imports transformers.

    Raises:
        ConfigError: configuration, tokenizer or chat template cannot be used or written back, or nothing can end an
            answer.
    """
    try:
        check_readable(model)
    except UnsupportedModelError as error:
        raise ConfigError(f"model.path: {error}") from None
    tokenizer = load_tokenizer(model, config.model.trust_remote_code)
    try:
        prompt_ids(tokenizer, "What is 1 + 1?")
    except Exception as error:  # jinja's own kinds, and whatever the template's code raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.path: {model}: its chat template cannot be put to a question ({reason}); correct it there"
        ) from None
    _write_back(config, model, tokenizer)
    return tokenizer, _end_notes(tokenizer, config, model)


def _write_back(config: RunConfig, model: Path, tokenizer: Any) -> None:
    """As trainers do at the end of a training."""
    from transformers import AutoConfig

    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            if read_shape(model).family.prunable:  # others' configurations are known to the workers alone
                trust = config.model.trust_remote_code
                AutoConfig.from_pretrained(model, trust_remote_code=trust).save_pretrained(folder)
    except Exception as error:  # of many kinds, by what the files say
        raise ConfigError(
            f"model.path: {model}: its configuration or tokenizer cannot be written back, at which a training would "
            f"end ({' '.join(str(error).split())}); mend the files that this names"
        ) from None


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


def check_prompts(config: RunConfig, data: RunData, tokens: PromptTokens) -> list[str]:
    """Count the prompts' tokens as the run will; gives notes on those that are too long.

    Raises:
        ConfigError: too few are short enough.
    """
    most = config.data.max_prompt_tokens

    def fitting(part: Corpus) -> int:
        return sum(length <= most for length in tokens(record.question + config.prompt_suffix for record in part))

    notes = []
    for name, parts in _read_by_rl(config, data).items():
        samples = [part[:: max(1, len(part) // SAMPLE)] for part in parts]
        if all(fitting(sample) == len(sample) for sample in samples):
            continue
        total, counts = sum(map(len, parts)), [fitting(part) for part in parts]
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
