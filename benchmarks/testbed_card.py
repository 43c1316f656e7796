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
from pretrain_testbed import STREAMS, Kind, answers, is_right
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


def easy(folder: Path, kind: Kind, count: int) -> str:
    """Greedy accuracy on problems of levels 1 to 3, with its interval."""
    model, tokenizer = loaded(folder)
    problems = list(itertools.islice(STREAMS[kind]("test", 0, EASY), count))
    responses = answers(model, tokenizer, problems)
    right = [float(is_right(kind, p, text)) for p, (text,) in zip(problems, responses, strict=True)]
    low, high = accuracy_interval(right)
    return f"{100 * sum(right) / count:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def cut(folder: Path, kind: Kind, count: int, compensate: str, **removal) -> str:
    """The same after one cut."""
    data = "testbed:rl" if kind == "words" else "testbed:programs-rl"
    settings = {**CALIBRATION, "criterion.compensate": compensate}
    with tempfile.TemporaryDirectory() as work:
        ptl_rl.score(folder, data, f"{work}/scores", alignment=16, settings=settings, **removal)
        ptl_rl.slice(folder, f"{work}/scores", f"{work}/sliced")
        return easy(Path(work) / "sliced", kind, count)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a shipped model.")],
    kind: Annotated[Kind, typer.Option(help="What it was trained on.")] = "words",
    count: Annotated[int, typer.Option(min=2, help="Problems behind each figure.")] = 500,
    block: Annotated[bool, typer.Option("--block", help="One block removed, too.")] = False,
) -> None:
    """Print the tables."""
    print("\n".join(by_level(checkpoint)), "\n")
    cuts = [(f"{share[:-1]} % of the channels", {"remove_channels": share}) for share in SHARES]
    cuts += [("one block", {"remove_layers": 1})] if block else []
    print("| gone at once | compensated | not compensated |\n|---|---|---|")
    print(f"| nothing | {easy(checkpoint, kind, count)} | |")
    for name, removal in cuts:
        found = [cut(checkpoint, kind, count, compensate, **removal) for compensate in ("least_squares", "none")]
        print(f"| {name} | {found[0]} | {found[1]} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
