"""What a shipped tiny model can do, and what one cut without recovery costs it: the tables of its card, in markdown.

``python benchmarks/testbed_card.py ptl_rl/testbed/checkpoints/qwen2``. The model has never seen the problems: they
are of the validation and test splits.
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from pretrain_testbed import HARD, STREAMS, Kind, answers, is_right
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptl_rl
from ptl_rl.evaluation.intervals import accuracy_interval
from ptl_rl.testbed.problem import EASY

SHARES = ("50%", "75%")
CALIBRATION = {
    "data.rows": 512,
    "calibration.sequences": 512,
    "calibration.max_tokens": 184,
    "calibration.batch_size": 32,
    "calibration.token_weights": "sensitivity",
}


def loaded(folder: Path):
    """The model in float32, which CPUs compute fastest, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def by_level(folder: Path) -> list[str]:
    """A row per level, as ``pretrain_testbed.py`` has measured the saved weights on validation problems."""
    measured = json.loads((folder / "pretraining.json").read_text())["accuracy_by_level_validation_200"]
    rows = ["| level | greedy | pass@1 | pass@8 |", "|---|---|---|---|"]
    for level, found in measured.items():
        rows.append(f"| {level} | " + " | ".join(f"{100 * value:.1f} %" for value in found.values()) + " |")
    return rows


def solved(folder: Path, kind: Kind, count: int) -> list[str]:
    """Greedy accuracy on problems of levels 1 to 3, of levels 4 and 5, and of all five, with intervals.

    Three times ``count`` problems of the former and twice as many of the latter, as the test split mixes levels.
    """
    model, tokenizer = loaded(folder)
    right: list[list[float]] = []
    for levels in (EASY, HARD):
        problems = list(itertools.islice(STREAMS[kind]("test", 0, levels), count * len(levels)))
        responses = answers(model, tokenizer, problems)
        right.append([float(is_right(kind, p, text)) for p, (text,) in zip(problems, responses, strict=True)])
    cells = []
    for scores in (*right, right[0] + right[1]):
        low, high = accuracy_interval(scores)
        cells.append(f"{100 * sum(scores) / len(scores):.1f} % ({100 * low:.1f} to {100 * high:.1f})")
    return cells


def cut(folder: Path, kind: Kind, count: int, compensate: str, **removal) -> list[str]:
    """The same after one cut."""
    data = "testbed:rl" if kind == "words" else "testbed:programs-rl"
    settings = {**CALIBRATION, "criterion.compensate": compensate}
    with tempfile.TemporaryDirectory() as work:
        ptl_rl.score(folder, data, f"{work}/scores", alignment=16, settings=settings, **removal)
        ptl_rl.slice(folder, f"{work}/scores", f"{work}/sliced")
        return solved(Path(work) / "sliced", kind, count)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a shipped model.")],
    kind: Annotated[Kind, typer.Option(help="What it was trained on.")] = "words",
    count: Annotated[int, typer.Option(min=2, help="A third of those of levels 1 to 3, half of 4 and 5.")] = 100,
    block: Annotated[bool, typer.Option("--block", help="One block removed, too.")] = False,
) -> None:
    """Print the tables."""
    print("\n".join(by_level(checkpoint)), "\n")
    cuts = [(f"{share[:-1]} % of the channels", {"remove_channels": share}) for share in SHARES]
    cuts += [("one block", {"remove_layers": 1})] if block else []
    print("| gone at once | compensated | levels 1 to 3 | levels 4 and 5 | all five |\n|---|---|---|---|---|")
    print(f"| nothing | | {' | '.join(solved(checkpoint, kind, count))} |")
    for name, removal in cuts:
        for compensate, said in (("least_squares", "yes"), ("none", "no")):
            found = cut(checkpoint, kind, count, compensate, **removal)
            print(f"| {name} | {said} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
