"""What continued pre-training gives back to a real small model: gradual, at once, and on the unpruned model.

``python benchmarks/cpt_recovery.py --data gsm8k_train.jsonl --test gsm8k_test.jsonl --out DIR`` cuts SmolLM2-135M by an
eighth of its channels twice, each cut recovered on half of the tokens, and by a quarter once, recovered on all of them;
with and without compensation; the unpruned model is trained on the same tokens. Perplexity on the solutions of other
problems. Every row is an ordinary run, which goes on where it was interrupted.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from criteria import BATCH, load, table
from real_models import folder_of
from transformers import AutoTokenizer

import ptl_rl
from ptl_rl.config import SourceConfig
from ptl_rl.config.recipe import parse_config
from ptl_rl.data.corpora import load_corpus
from ptl_rl.data.encoding import Sequence, encode_sequences
from ptl_rl.driver.journal import Journal
from ptl_rl.families import read_shape
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.streaming import mean_loss

MAX_TOKENS = 512
CUTS = {"12.5 % twice": (0.125, 0.125), "25 % once": (0.25,)}
"""Shares of the original's channels, cut before each part of the training."""
CRITERIA = (("obs", "least_squares"), ("rms_contribution", "least_squares"), ("rms_contribution", "none"))


def rows(width: int) -> dict[str, dict[str, Any]]:
    """By name, the settings of the unpruned model, and of every criterion gradually and at once."""
    found: dict[str, dict[str, Any]] = {"unpruned": {"schedule": {"recover_only": True}}}
    for channels, compensate in CRITERIA:
        for cut, shares in CUTS.items():
            name = channels + (" + least squares" if compensate != "none" else "") + f", {cut}"
            schedule = {"channels_per_cycle": [round(width * share) for share in shares], "alignment": 16}
            found[name] = {"schedule": schedule, "criterion": {"channels": channels, "compensate": compensate}}
    return found


def main(
    data: Annotated[str, typer.Option(help="jsonl with question and solution: calibration and training.")],
    test: Annotated[str, typer.Option(help="jsonl of other problems, which perplexity is measured on.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs.")],
    model: Annotated[str, typer.Option(help="smollm2-135m, gemma3-270m, or a folder.")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Training tokens of each row.")] = 65536,
    tokens_per_step: Annotated[int, typer.Option(help="Global batch.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Order of data.")] = 0,
    only: Annotated[list[int] | None, typer.Option(help="Only these rows, from 0.")] = None,
) -> None:
    """Perplexity after each cut and each recovery."""
    original = folder_of(model)
    out = out.absolute() / f"{original.name}-{tokens}-{tokens_per_step}-{learning_rate:g}-{seed}"
    tokenizer = AutoTokenizer.from_pretrained(original)
    records = list(load_corpus(SourceConfig(path=test), 0, 0.01))
    held_out: list[Sequence] = encode_sequences(
        tokenizer, [r.question for r in records], [r.solution for r in records], MAX_TOKENS
    )

    def perplexity(folder: Path) -> float:
        """Of the held-out solutions, given their questions."""
        batches = batches_for_rank(held_out, BATCH, 0, 1, tokenizer.pad_token_id or 0, 0.0)
        return math.exp(mean_loss(load(folder), batches, torch.device("cpu")))

    def made(name: str, settings: dict[str, Any]) -> list[str]:
        parts = len(settings["schedule"].get("channels_per_cycle", [0]))
        cpt = {
            "steps": tokens // parts // tokens_per_step,
            "tokens_per_step": tokens_per_step,
            "max_tokens": MAX_TOKENS,
            "micro_batch_tokens": 2048,
            "learning_rate": learning_rate,
            "gradient_checkpointing": False,
        }
        recipe = {
            "seed": seed,
            "model": {"path": str(original), "dtype": "float32"},
            "data": {
                "train": {"path": str(Path(data).absolute())},
                "validation": {"path": "testbed:validation", "rows": 1},
                "test": {"path": "testbed:test", "rows": 8},  # a run is judged by something; here it does not matter
                "decontaminate": "off",
                "max_prompt_tokens": 128,
                "max_response_tokens": 8,
            },
            "calibration": {"sequences": 96, "max_tokens": MAX_TOKENS, "batch_size": BATCH, "prompt_weight": 1.0},
            "recovery": {"cpt": cpt},
            "gate": {"min_accuracy_ratio": 0, "max_extensions": 0},
            "resources": {"device": "cpu", "workers_per_node": 1},
        }
        folder = out / re.sub(r"[^A-Za-z0-9.]+", "-", name)
        if (folder / "config.json").exists():
            ptl_rl.resume(folder)
        else:
            ptl_rl.run(parse_config(recipe | settings), folder)
        entries = [entry for entry in Journal(folder / "journal.jsonl").entries() if entry.stage != "evaluate"]
        cut, recovered = (
            ", ".join(f"{perplexity(folder / str(entry.artefact)):.3f}" for entry in entries if entry.stage == stage)
            for stage in ("slice", "recover")
        )
        read = sum(entry.metrics.get("tokens", 0) for entry in entries)
        return [cut, recovered, f"{read:.0f}", f"{sum(entry.seconds for entry in entries) / 60:.1f}"]

    judged = sum(len(s.ids) - s.prompt_tokens for s in held_out)
    print(f"{model}: perplexity on {judged} tokens of solutions; unpruned and untrained {perplexity(original):.3f}\n")
    chosen = [
        row for i, row in enumerate(rows(read_shape(original).intermediate_size).items()) if not only or i in only
    ]
    head = ["", "after each cut", "after each recovery", "tokens", "minutes"]
    table(head, ((name, made(name, settings)) for name, settings in chosen))


if __name__ == "__main__":
    typer.run(main)
