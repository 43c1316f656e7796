"""Made-up rows, and files of them, for the tests of data."""

import json
from pathlib import Path

from ptl_rl.config import RunConfig, SourceConfig
from ptl_rl.config.data import EvaluationSet
from ptl_rl.config.recipe import parse_config
from ptl_rl.data.corpora import Corpus
from ptl_rl.data.prepare import run_data


def row(i: int, **changes) -> dict:
    return {"id": f"r{i}", "question": f"q{i}?", "solution": f"s{i}", "answer": i, **changes}


def write(path: Path, rows: list) -> SourceConfig:
    """A .jsonl file; rows that are text are written as they are."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return SourceConfig(path=str(path))


def run_config(folder: Path, train=None, test=None, validation=None, **data) -> RunConfig:
    """A run on files in ``folder``, made of lists of rows; sources are taken as they are."""
    sets = {"train": train or [row(i) for i in range(20)], "test": test, "validation": validation}
    for name, value in sets.items():
        if value is None:
            value = [row(0, question=f"This is the only question of the set {name}.")]
        if isinstance(value, list) and not isinstance(value[0], SourceConfig):
            value = write(folder / f"{name}.jsonl", value)
        data[name] = value
    plain = {name: _plain(value) for name, value in data.items()}
    return parse_config({"data": plain, "schedule": {"channels_per_cycle": [64, 64], "alignment": 32}})


def _plain(value):
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.model_dump() if isinstance(value, SourceConfig) else value


def evaluation_data(config: RunConfig, name: EvaluationSet) -> Corpus:
    return run_data(config, 1).sets[name]


def worked_solutions(config: RunConfig) -> Corpus:
    """What scoring and continued pre-training read."""
    sets = run_data(config, 1).sets
    return sets.get("corpus", sets["train"])
