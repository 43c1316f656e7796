"""Everything that a report says of a run, read from its folder: journal, configuration, plans and samples."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.driver.journal import Entry, Journal
from ptl_rl.driver.state import ORIGINAL, fold
from ptl_rl.evaluation.intervals import Paired, accuracy_interval, paired
from ptl_rl.reporting import summary

ACCEPTED = ("accept", "accept_below")


@dataclass(frozen=True)
class Answer:
    """One test problem as one model answered it."""

    id: str
    question: str
    expected: str
    text: str
    correct: float


@dataclass(frozen=True)
class Example:
    """One test problem as the original and the final model answered it."""

    kind: str
    """``broken``, ``gained``, ``both right`` or ``both wrong``."""
    original: Answer
    final: Answer


@dataclass(frozen=True)
class Removed:
    """Which channels and blocks of the original went in which cycle, or in which cut in place."""

    channels: list[list[int]]
    """Of every block of the original, per channel, the cycle in which it went; 0: it is still there."""
    layers: list[int]
    """Of every block the cycle in which it went as a whole; 0: it is still there."""
    unit: str = "cycle"
    """What is counted: ``cycle`` or ``cut``."""


def paired_answers(first: list[Answer], second: list[Answer]) -> Paired | None:
    """Two models' answers compared problem by problem; None if the problems are not the same ones in the same order."""
    asked = [[(answer.id, answer.question, answer.expected) for answer in answers] for answers in (first, second)]
    if not first or asked[0] != asked[1]:
        return None
    return paired([answer.correct for answer in first], [answer.correct for answer in second])


class RunData:
    """A run's folder, read.

    Raises:
        ConfigError: it is no run folder.
        JournalError: its journal cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from ptl_rl.config.recipe import read_saved_config

        if not (folder / "config.json").exists():
            raise ConfigError(f"{folder}: no config.json; this is not a run folder")
        self.folder = folder.resolve()
        self.config: RunConfig = read_saved_config(self.folder / "config.json")
        self.entries: list[Entry] = Journal(self.folder / "journal.jsonl").entries()
        self.rows = summary.rows(self.entries)
        if not self.rows:
            raise ConfigError(f"{folder}: nothing is evaluated yet; run or resume it first")

    @property
    def name(self) -> str:
        """Of the folder, as several runs may share a recipe's."""
        return self.folder.name

    @property
    def final(self) -> summary.Row:
        """The last cycle that the gate accepted; what the run started from if there is none."""
        return [row for row in self.rows if not row.cycle or row.decision in ACCEPTED][-1]

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the final model, as the journal names it; None if it is what the run started from."""
        source = fold(self.config, self.entries).source
        return None if source == ORIGINAL else self.folder / source

    @property
    def start(self) -> str:
        """What cycle 0 is of."""
        return "original" if self.config.model.parent is None else "start (cut before)"

    @cached_property
    def versions(self) -> dict[str, str]:
        """What the last finished cycle was made with."""
        manifests = sorted(self.folder.glob("cycles/*/manifest.json"))
        return json.loads(manifests[-1].read_text())["versions"] if manifests else {}

    def answers(self, cycle: int) -> list[Answer]:
        """Of the last evaluation of a cycle; none if its table is gone."""
        import pyarrow.parquet

        artefacts = [e.artefact for e in self.entries if e.cycle == cycle and e.stage == "evaluate" and e.artefact]
        path = self.folder / artefacts[-1] / "samples.parquet" if artefacts else None
        if path is None or not path.exists():
            return []
        names = ["id", "question", "expected", "text", "correct"]
        return [Answer(**row) for row in pyarrow.parquet.read_table(path, columns=names).to_pylist()]

    def interval(self, cycle: int) -> tuple[float, float] | None:
        """95 % bootstrap interval of a cycle's accuracy."""
        answers = self.answers(cycle)
        return accuracy_interval([answer.correct for answer in answers]) if answers else None

    def against_original(self, cycle: int) -> Paired | None:
        """A cycle's answers against the original model's to the same problems."""
        return paired_answers(self.answers(0), self.answers(cycle)) if cycle else None

    def examples(self, each: int = 2) -> list[Example]:
        """Up to ``each`` problems of every kind, in the order of the test set."""
        final = {answer.id: answer for answer in self.answers(self.final.cycle)}
        found: dict[str, list[Example]] = {"broken": [], "gained": [], "both right": [], "both wrong": []}
        for answer in self.answers(0):
            if (other := final.get(answer.id)) is None:
                continue
            kinds = {(True, False): "broken", (False, True): "gained", (True, True): "both right"}
            kind = kinds.get((answer.correct >= 0.5, other.correct >= 0.5), "both wrong")
            found[kind].append(Example(kind, answer, other))
        return [example for examples in found.values() for example in examples[:each]]

    @cached_property
    def removed(self) -> Removed | None:
        """Plans of accepted cycles, one on the other; None if nothing was cut, or a plan is gone."""
        accepted = [e.cycle for e in self.entries if e.stage == "gate" and e.metrics["decision"] in ACCEPTED]
        result: Removed | None = None
        places: list[list[int]] = []  # of what is left: channels of the original, block by block
        blocks: list[int] = []
        in_place = self._cuts
        for entry in in_place.values() or self.entries:
            if entry.stage not in ("slice", "cut") or entry.cycle not in accepted:
                continue
            number = entry.part + 1 if in_place else entry.cycle
            path = self.folder / str(entry.artefact) / "plan.json"
            if not path.exists():
                return None
            plan = json.loads(path.read_text())
            width, count = plan["source_intermediate_size"], len(plan["keep_channels"])
            if result is None:
                unit = "cut" if in_place else "cycle"
                result = Removed([[0] * width for _ in range(count)], [0] * count, unit)
                places, blocks = [list(range(width)) for _ in range(count)], list(range(count))
            for place, kept in enumerate(plan["keep_channels"]):
                for gone in set(range(width)) - set(kept):
                    result.channels[blocks[place]][places[place][gone]] = number
                places[place] = [places[place][channel] for channel in kept]
            for place in plan["layer_order"]:
                result.layers[blocks[place]] = number
            places = [places[place] for place in plan["keep_layers"]]
            blocks = [blocks[place] for place in plan["keep_layers"]]
        return result

    @property
    def methods(self) -> list[str]:
        """Of the recoveries that were made."""
        found = [entry.metrics.get("method", "recovery") for entry in self.entries if entry.stage == "recover"]
        return list(dict.fromkeys(found))

    def curves(self) -> list[tuple[str, str, list[int], list[float]]]:
        """Of every recovery its cycle and method, what is drawn (reward, else loss), steps and values."""
        found = []
        for entry in self.entries:
            if entry.stage != "recover":
                continue
            points = entry.metrics.get("curve", [])
            for key in ("reward", "distillation_loss", "loss"):
                drawn = [(point["step"], point[key]) for point in points if key in point]
                if drawn:
                    steps, values = zip(*drawn, strict=True)
                    label = f"cycle {entry.cycle}, {entry.metrics.get('method', 'recovery')}"
                    found.append((label, key, list(steps), list(values)))
                    break
        return found

    @property
    def _cuts(self) -> dict[int, Entry]:
        """Of the cuts in place that are in the finished model, the last line of each: one may have been made again."""
        kept = [len(e.metrics["cuts"]) for e in self.entries if e.stage == "recover" and "cuts" in e.metrics]
        lines = {entry.part: entry for entry in self.entries if entry.stage == "cut"}
        return {part: entry for part, entry in lines.items() if not kept or part < kept[-1]}

    def cuts_in_place(self) -> list[tuple[int, str]]:
        """Step after which each cut within a training was made, and what it left (:func:`summary.left_by`)."""
        recoveries = [entry for entry in self.entries if entry.stage == "recover"]
        made = [cut for entry in recoveries for cut in entry.metrics.get("cuts", [])]
        labels = summary.left_by(made, self.rows[0].layers)
        return [(cut["after_step"], label) for cut, label in zip(made, labels, strict=True)]

    def stage_seconds(self) -> list[tuple[int, str, float]]:
        """Cycle, stage and duration of everything that took time."""
        return [(entry.cycle, entry.stage, entry.seconds) for entry in self.entries if entry.seconds]

    @property
    def notes(self) -> list[str]:
        """What was rounded or left out in any cut."""
        entries = [*self._cuts.values(), *(entry for entry in self.entries if entry.stage != "cut")]
        return [f"cycle {e.cycle}: {note}" for e in entries for note in e.metrics.get("notes", [])]

    def flat_config(self) -> list[tuple[str, Any]]:
        """Settings as a recipe's dotted keys."""
        flat: list[tuple[str, Any]] = []

        def walk(prefix: str, value: Any) -> None:
            if isinstance(value, dict) and value:
                for key, inner in value.items():
                    walk(f"{prefix}.{key}" if prefix else str(key), inner)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                for place, inner in enumerate(value):
                    walk(f"{prefix}.{place}", inner)
            else:
                flat.append((prefix, value))

        walk("", self.config.model_dump(mode="json"))
        return flat
