"""Makes the model that a SliceGPT row starts from: ``python -m ptl_rl.studies.slicegpt_model CONFIG OUT SIZE``.

A process of its own, so that what it holds on a GPU is free again when the run begins. It reads the calibration
sequences that the run itself would: of the run's own worked solutions, without copies of test questions.
"""

import json
import sys
from pathlib import Path

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.config.recipe import read_saved_config

MADE_FROM = "made_from.json"


def made_from(config: RunConfig, size: int) -> dict:
    """All that the sliced model depends on."""
    values = config.model_dump(mode="json")
    return {"size": size, **{name: values[name] for name in ("model", "data", "calibration", "seed")}}


def was_made_from(note: dict | None, config: RunConfig, size: int) -> bool:
    """Whether a note says :func:`made_from` of this; settings that are newer than the note are as they were then."""
    if note is None:
        return False
    try:
        then = config.model_copy(
            update={name: getattr(config, name).model_validate(note[name]) for name in ("model", "data", "calibration")}
        )
        return made_from(then, note["size"]) | {"seed": note["seed"]} == made_from(config, size)
    except (KeyError, ValueError):
        return False


def main(config_path: Path, out: Path, size: int) -> None:
    from ptl_rl.baselines.slicegpt.command import slice_records
    from ptl_rl.data.prepare import run_data

    config = read_saved_config(config_path)
    corpus = run_data(config, 1).subsets
    records = corpus["corpus" if "corpus" in corpus else "train"][0]
    slice_records(
        config.model.path,
        out,
        records,
        config.calibration.model_copy(update={"source": "corpus"}),
        hidden_size=size,
        dtype=config.model.dtype,
        prompt_suffix=config.prompt_suffix,
        note={MADE_FROM: made_from(config, size)},
    )


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"model": sys.argv[2]}))
