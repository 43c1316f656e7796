"""SliceGPT against units of the residual stream that go at random: perplexity on held-out text, without recovery.

``python benchmarks/slicegpt.py smollm2-135m --data gsm8k_train.jsonl``
"""

from typing import Annotated

import torch
import typer
from criteria import BATCH, load, split
from real_models import folder_of
from transformers import AutoTokenizer

from ptl_rl.baselines.slicegpt.rotate import slice_stream
from ptl_rl.pruning.score.calibration import batches_for_rank
from ptl_rl.pruning.score.streaming import mean_loss


def random_basis(seed: int, width: int, size: int) -> torch.Tensor:
    """``size`` units of the stream, the same ones at every place, as columns (H, size)."""
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:size].sort().values
    return torch.eye(width)[:, chosen]


def main(
    model: Annotated[str, typer.Argument(help="smollm2-135m, or a folder.")],
    data: Annotated[str, typer.Option(help="jsonl with question and solution, or with the column --text.")],
    text: Annotated[str | None, typer.Option(help="Column of plain text in --data.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    held_out: Annotated[int, typer.Option(help="Tokens that perplexity is measured on.")] = 16384,
    seeds: Annotated[int, typer.Option(help="Random choices of units.")] = 3,
) -> None:
    """Print perplexity after rotation alone, and with units of the stream gone, as a markdown table."""
    folder = folder_of(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, evaluated = split(data, text, tokenizer, tokens, held_out, 512)

    def batches(sequences):
        return list(batches_for_rank(sequences, BATCH, 0, 1, tokenizer.pad_token_id or 0, 1.0))

    def measure(sliced) -> float:
        return float(torch.tensor(mean_loss(sliced, batches(evaluated), torch.device("cpu"))).exp())

    original = load(folder)
    width = original.config.hidden_size
    print(f"unpruned: {measure(original):.3f}; {sum(p.numel() for p in original.parameters()):,} parameters\n")
    print(
        "| units of the stream that go | parameters | principal components stay | random ones stay |\n|---|---|---|---|"
    )
    for share in (0.0, 0.125, 0.25):
        size = round(width * (1 - share) / 8) * 8
        rotated = slice_stream(original, batches(calibration), size)
        parameters = sum(p.numel() for p in rotated.parameters())
        found = measure(rotated)
        bases = [random_basis(seed, width, size) for seed in range(seeds if share else 0)]
        plain = [
            measure(slice_stream(original, batches(calibration), size, basis=lambda *_, b=basis: b)) for basis in bases
        ]
        cells = f"{min(plain):,.0f} to {max(plain):,.0f}" if plain else "-"
        print(f"| {share:.1%} ({width} to {size}) | {parameters:,} | {found:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
