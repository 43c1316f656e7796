"""The policy's own responses of a recovery, kept beside its checkpoint for the next cycle's scoring."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ptl_rl.data.records import DataError, Record

FILE = "rollouts.jsonl"


@dataclass(frozen=True)
class Rollout:
    """One response of the policy and what it earned."""

    question: str
    response: str
    reward: float


def keep_latest(
    dump: Path,
    records: Sequence[Record],
    prompt_of: Callable[[Record], str],
    is_whole: Callable[[str], bool],
    rows: int,
) -> list[Rollout]:
    """The latest ``rows`` whole responses that earned something, from the files that verl wrote into ``dump``.

    Of one step, each question's first such response comes before any question's second.

    Args:
        dump: folder of ``STEP.jsonl`` files with ``input``, ``output`` and ``score``.
        records: of the recovery.
        prompt_of: the text that verl shows for a record's prompt.
        is_whole: whether a response ended by itself.
    """
    question_of = {prompt_of(record): record.question for record in records}
    kept: list[Rollout] = []
    for path in sorted(dump.glob("*.jsonl"), key=lambda path: int(path.stem), reverse=True):
        of_question: dict[str, list[Rollout]] = {}
        with path.open() as file:  # not splitlines: responses hold other line separators as they are
            for row in map(json.loads, file):
                question = question_of.get(row["input"])
                if question is not None and row["score"] > 0 and is_whole(row["output"]):
                    rollout = Rollout(question, row["output"], float(row["score"]))
                    of_question.setdefault(question, []).append(rollout)
        for nth in itertools.zip_longest(*of_question.values()):
            kept += [rollout for rollout in nth if rollout is not None]
        if len(kept) >= rows:
            break
    return kept[:rows]


def save(rollouts: list[Rollout], folder: Path) -> None:
    with (folder / FILE).open("w") as file:
        file.writelines(json.dumps(asdict(rollout)) + "\n" for rollout in rollouts)


def load(folder: Path) -> list[Rollout]:
    """What :func:`save` wrote; empty where a checkpoint has none, as the original model.

    Raises:
        DataError: the file is not what was written; names the line.
    """
    path = folder / FILE
    if not path.exists():
        return []
    rollouts = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rollouts.append(Rollout(**json.loads(line)))
        except (TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}:{number}: not a kept rollout: {error}") from None
    return rollouts
