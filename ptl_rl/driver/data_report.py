"""What a run will read, as ``ptl data`` prints it: numbers first, so that a program can read them too."""

from dataclasses import asdict
from typing import Any

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.config.data import TESTBED
from ptl_rl.data.cache import cache_folder
from ptl_rl.data.corpora import Corpus, Record, SourceUse
from ptl_rl.data.partition import subset_hash
from ptl_rl.data.prepare import REASONS, RunData, run_data
from ptl_rl.data.records import DataError, Progress, no_progress
from ptl_rl.data.tokens import count_tokens, local_tokenizer
from ptl_rl.driver.preflight import data_notes, too_few
from ptl_rl.driver.state import data_subsets
from ptl_rl.planning.model import planned_model
from ptl_rl.planning.schedule import settled

SHOWN_CHARACTERS = 300
THOUSANDS = r"^[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+$"


def _source(use: SourceUse) -> dict[str, Any]:
    counts = {reason: use.dropped[reason].count if reason in use.dropped else 0 for reason in ("bad", *REASONS)}
    examples = {reason: list(dropped.examples) for reason, dropped in use.dropped.items()}
    return {
        "path": use.path,
        "read": use.read,
        **counts,
        "kept": use.kept,
        "used": use.used,
        "examples": examples,
    }


def _subsets(name: str, parts: list[Corpus], progress: Progress) -> dict[str, Any]:
    hashes = []
    for place, part in enumerate(parts, 1):
        hashes.append(subset_hash(part))
        progress(f"hashing the subsets of {name}", place, len(parts))
    sizes = [len(part) for part in parts]
    return {"count": len(parts), "smallest": min(sizes), "largest": max(sizes), "hashes": hashes}


def _short(record: Record) -> dict[str, str]:
    texts = vars(record).items()
    return {name: text[:SHOWN_CHARACTERS] + "..." * (len(text) > SHOWN_CHARACTERS) for name, text in texts}


def _ambiguous_notes(data: RunData) -> list[str]:
    """That known answers read as one number and as several, as ``100,200`` does, where that is so."""
    notes = []
    for name, corpus in data.sets.items():
        found = corpus.matching("answer", THOUSANDS)
        if len(found):
            first = int(found[0])
            answer = corpus[first].answer
            digits, parts = answer.replace(",", ""), answer.replace(",", ", ")
            notes.append(
                f"data.{name}: {len(found)} answers read as one number and as several, as {answer!r} "
                f"({corpus.where(first)}); they are judged as one: write {digits}, or ({parts}) if several are meant"
            )
    return notes


def _notes(config: RunConfig, data: RunData) -> list[str]:
    notes = [*data_notes(config, data), *_ambiguous_notes(data)]
    made = [use.path for corpus in data.sets.values() for use in corpus.sources if use.path.startswith(TESTBED)]
    if config.data.decontaminate is not None and made:
        notes.append(
            f"{', '.join(dict.fromkeys(made))}: only the very same question counts as contamination, as generated "
            "problems share their templates; the splits share no question"
        )
    if problem := too_few(config, data):
        notes.append(f"ptl run refuses this: {problem}")
    return notes


def data_report(
    config: RunConfig, *, samples: int = 3, exact_tokens: bool = False, progress: Progress = no_progress
) -> dict[str, Any]:
    """Everything that the run's sources come to, in JSON's types.

    Raises:
        ConfigError: something cannot be read or used.
    """
    if config.schedule.is_open:
        config = settled(config, planned_model(config).shape)
    try:
        data = run_data(config, data_subsets(config), progress)
    except DataError as error:
        raise ConfigError(str(error)) from None
    notes = _notes(config, data)
    tokenizer = local_tokenizer(config.model)
    if tokenizer is None:
        notes.append(f"tokens are not counted: {config.model.path} has no tokenizer on this machine")
    sets: dict[str, Any] = {}
    for name, corpus in data.sets.items():
        tokens = None
        if tokenizer is not None:
            tokens = asdict(
                count_tokens(tokenizer, corpus, config.prompt_suffix, name, exact=exact_tokens, progress=progress)
            )
        sets[name] = {
            "rows": len(corpus),
            "sources": [_source(use) for use in corpus.sources],
            "subsets": _subsets(name, data.subsets[name], progress) if name in data.subsets else None,
            "tokens": tokens,
            "samples": [_short(record) for record in corpus[:samples]],
        }
    return {"name": config.name, "seed": config.seed, "cache": str(cache_folder()), "sets": sets, "notes": notes}
