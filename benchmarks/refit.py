"""A trial: after blocks are removed, refit those that stay behind them, one after the other, to the original's stream.

``python benchmarks/refit.py gemma3-270m --data gsm8k_train.jsonl --gone 6,16,7,9`` reads the calibration sequences
through the original and the cut model block by block. Each kept block from the one before the first removed one on has
its ``o_proj`` and then its ``down_proj`` changed by the ridge regression, on its own inputs in the cut model, of what
the original's residual stream at that place has and the cut model's has not. Behind a kept block that precedes removed
ones the original's place is behind those. Not part of a run: what it gains decides whether it becomes so.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from criteria import BATCH, load, split
from real_models import folder_of
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ptl_rl.families import Family, read_shape
from ptl_rl.pruning.calibration import Batch, batches_for_rank
from ptl_rl.pruning.masking import skipped
from ptl_rl.pruning.streaming import mean_loss

console = Console(stderr=True)
ATTENTION_NORM = "post_attention_layernorm"
"""Of the attention's output, in families that norm the FFN's, too."""
SMALLEST_GAIN = 0.1
"""Of a norm's root mean square: below it a hidden unit's error is not divided by its gain."""


class BlockByBlock:
    """A model that runs one block at a time, on a residual stream from outside."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family = model, family
        self.blocks = list(model.get_submodule(family.layers).children())

    @contextmanager
    def only(self, layer: int) -> Iterator[None]:
        """The other blocks, and the output head, are not computed."""
        passed: list[Any] = [block for index, block in enumerate(self.blocks) if index != layer]
        for block in passed:
            block.forward = lambda hidden_states, *_args, **_options: hidden_states
        head: Any = self.model.get_output_embeddings()
        head.forward = lambda hidden_states: hidden_states
        try:
            yield
        finally:
            for module in (*passed, head):
                del module.forward

    def part(self, layer: int, name: str) -> Any:
        return self.blocks[layer].get_submodule(name)

    def run(self, layer: int, stream_BTH: torch.Tensor | None, batch: Batch) -> dict[str, torch.Tensor]:
        """Block ``layer`` on ``stream_BTH`` (the first one: on the embedded tokens if None).

        Returns:
            ``in``, ``middle`` (behind the attention) and ``out`` of the residual stream, and the inputs and outputs of
            both projections into it: ``heads``, ``attended``, ``hidden``, ``fed``.
        """
        seen: dict[str, torch.Tensor] = {}
        family = self.family

        def replace_input(_module, args, options):
            seen["in"] = stream_BTH if stream_BTH is not None else (args[0] if args else options["hidden_states"])
            return ((seen["in"], *args[1:]), options) if args else (args, {**options, "hidden_states": seen["in"]})

        def keep(inputs: str, output: str):
            return lambda _module, args, out: seen.update({inputs: args[0], output: out})

        o_proj = self.part(layer, f"{family.attention}.{family.o_proj}")
        down_proj = self.part(layer, f"{family.mlp}.{family.down_proj}")
        block = self.blocks[layer]
        handles = [
            block.register_forward_pre_hook(replace_input, with_kwargs=True),
            block.register_forward_hook(
                lambda _module, _args, out: seen.update(out=out[0] if isinstance(out, tuple) else out)
            ),
            o_proj.register_forward_hook(keep("heads", "attended")),
            down_proj.register_forward_hook(keep("hidden", "fed")),
        ]
        with self.only(layer):
            self.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False)
        for handle in handles:
            handle.remove()
        fed = seen["fed"] if family.output_norm is None else self.part(layer, family.output_norm)(seen["fed"])
        return {**seen, "middle": seen["out"] - fed}


class Regression:
    """Of errors in the residual stream on the inputs of a projection that writes into it."""

    def __init__(self, norm: nn.Module | None, offset: float) -> None:
        self.norm: Any = norm
        self.offset = offset
        self.xx_XX: Any = 0
        self.xy_XH: Any = 0

    def add(self, x_BTX: torch.Tensor, output_BTH: torch.Tensor, error_BTH: torch.Tensor, weight_BT: torch.Tensor):
        if self.norm is not None:  # the inputs as they arrive behind the norm
            x_BTX = x_BTX * (output_BTH.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        root_N1 = weight_BT.reshape(-1, 1).sqrt()
        x_NX, y_NH = x_BTX.flatten(0, -2) * root_N1, error_BTH.flatten(0, -2) * root_N1
        self.xx_XX = self.xx_XX + x_NX.T @ x_NX
        self.xy_XH = self.xy_XH + x_NX.T @ y_NH

    def apply(self, projection: nn.Linear, ridge: float) -> None:
        """``ridge`` is relative to the median square of the inputs."""
        ridged_XX = self.xx_XX.double()
        ridged_XX.diagonal().add_(ridge * float(ridged_XX.diagonal().median()))
        change_HX = torch.cholesky_solve(self.xy_XH.double(), torch.linalg.cholesky(ridged_XX)).T.float()
        if self.norm is not None:
            gain_H = self.offset + self.norm.weight
            least = SMALLEST_GAIN * gain_H.square().mean().sqrt()
            change_HX = change_HX / torch.where(gain_H < 0, gain_H.clamp_max(-least), gain_H.clamp_min(least))[:, None]
        projection.weight.add_(change_HX)


def refit(original: BlockByBlock, cut: BlockByBlock, gone: list[int], batches: list[Batch], ridge: float) -> None:
    """Change the kept blocks of ``cut`` from the one before the first of ``gone`` on."""
    count, family = len(cut.blocks), cut.family
    streams = [original.run(0, None, batch)["in"] for batch in batches]

    def behind_removed(layer: int, targets: list[torch.Tensor]) -> list[torch.Tensor]:
        """The original's stream behind the removed blocks that begin at ``layer``, if any do."""
        while layer in gone:
            targets = [original.run(layer, x, batch)["out"] for x, batch in zip(targets, batches, strict=True)]
            layer += 1
        return targets

    targets = behind_removed(0, streams)
    for layer in (layer for layer in range(count) if layer not in gone):
        of_original = [original.run(layer, x, batch) for x, batch in zip(targets, batches, strict=True)]
        targets = behind_removed(layer + 1, [seen["out"] for seen in of_original])
        if layer + 1 >= min(gone):
            for projection, place in (("o_proj", "middle"), ("down_proj", "out")):
                of_attention = place == "middle"
                name = ATTENTION_NORM if of_attention else family.output_norm
                norm = cut.part(layer, name) if family.output_norm is not None else None
                regression = Regression(norm, family.norm_offset)
                for index, batch in enumerate(batches):
                    seen = cut.run(layer, streams[index], batch)
                    wanted = of_original[index]["middle"] if of_attention else targets[index]
                    x, output = ("heads", "attended") if of_attention else ("hidden", "fed")
                    regression.add(seen[x], seen[output], wanted - seen[place], batch.weight_BT)
                part = f"{family.attention}.{family.o_proj}" if of_attention else f"{family.mlp}.{family.down_proj}"
                regression.apply(cut.part(layer, part), ridge)
                console.print(f"block {layer}: {projection} refit")
        streams = [cut.run(layer, x, batch)["out"] for x, batch in zip(streams, batches, strict=True)]


def main(
    model: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or a folder.")],
    data: Annotated[str, typer.Option(help="jsonl with question and solution, or with the column --text.")],
    gone: Annotated[str, typer.Option(help="Ids of the blocks that go, with commas between them.")],
    text: Annotated[str | None, typer.Option(help="Column of plain text in --data.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    held_out: Annotated[int, typer.Option(help="Tokens that perplexity is measured on.")] = 8192,
    ridge: Annotated[float, typer.Option(help="Relative to the median square of the inputs.")] = 0.5,
) -> None:
    """Perplexity of the cut model whose kept blocks were refit."""
    folder = Path(folder_of(model))
    shape, tokenizer = read_shape(folder), AutoTokenizer.from_pretrained(folder)
    family, ids = shape.family, [str(layer) for layer in range(shape.num_hidden_layers)]
    if not set(gone.split(",")) < set(ids):
        raise typer.BadParameter(f"--gone {gone}: give some of the model's {len(ids)} blocks, 0..{ids[-1]}, as 3,5,6")
    calibration, evaluated = split(data, text, tokenizer, tokens, held_out, 512)
    pad = tokenizer.pad_token_id or 0
    batches, judged = (list(batches_for_rank(part, BATCH, 0, 1, pad, 1.0)) for part in (calibration, evaluated))
    removed = [int(layer) for layer in gone.split(",")]
    original, cut = load(folder), load(folder)
    started = time.monotonic()
    with torch.no_grad():
        refit(BlockByBlock(original, family), BlockByBlock(cut, family), removed, batches, ridge)
        seconds = time.monotonic() - started
        losses = [mean_loss(original, judged, torch.device("cpu"))]
        with skipped(cut, family, removed):
            losses.append(mean_loss(cut, judged, torch.device("cpu")))
    unpruned, refitted = torch.tensor(losses).exp().tolist()
    print(f"{model} without blocks {removed}: {unpruned:.3f} unpruned, {refitted:.3f} refit in {seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
