"""``ptl score``, ``slice``, ``slicegpt``: one model, no run and no Ray."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ptl_rl.cli.common import Model, bar, command, make_console


@command()
def score(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Reasoning data: a .jsonl, .parquet or .arrow file, testbed:SPLIT or hub:NAME.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for scores, plan and compensated weights.")],
    remove_channels: Annotated[str, typer.Option(help="Channels that each block loses: a number, or e.g. 25%.")] = "0",
    remove_layers: Annotated[int, typer.Option(help="Blocks that go.")] = 0,
    alignment: Annotated[int, typer.Option(min=1, help="Kept widths are multiples of this.")] = 128,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that will share the sliced model.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="data.*, calibration.*, criterion.* as in a recipe; prompt_suffix, max_bad_fraction, dtype, seed.",
        ),
    ] = None,
) -> None:
    """Score channels and blocks of a model and plan a cut, without Ray; `ptl slice` makes it."""
    from ptl_rl import api

    with bar(make_console(120), "reading") as progress:
        made = api.score(
            model,
            data,
            out,
            remove_channels=remove_channels,
            remove_layers=remove_layers,
            alignment=alignment * tensor_parallel_size,
            settings=settings or [],
            progress=progress,
        )
    plan, losses = made.plan, made.losses
    for note in plan.notes:
        print(f"note: {note}")
    kept = f"{plan.num_hidden_layers} blocks of {plan.intermediate_size} channels"
    print(f"keeps {kept}, of {len(plan.keep_channels)} of {plan.source_intermediate_size}")
    if losses.channels is not None and losses.channels_plain is not None:
        lost = f"{losses.channels:.2%} is lost, {losses.channels_plain:.2%} without compensation"
        print(f"of the FFN outputs' mean square {lost}")
    if losses.stream is not None:
        print(f"of the last block's residual stream {losses.stream:.2%} is lost")
    print(f"next: ptl slice {shlex.join([model, str(out)])} SLICED")


@command("slice")
def slice_model(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="plan.json, or the folder that `ptl score` wrote.")],
    out: Annotated[Path, typer.Argument(help="New folder for the sliced model.")],
    check: Annotated[bool, typer.Option(help="Compare the logits with the masked original's.")] = True,
) -> None:
    """Cut a model down to a plan: an ordinary Hugging Face folder again."""
    from ptl_rl import api

    with bar(make_console(120), "writing") as progress:
        difference = api.slice(model, plan, out, check=check, progress=progress)
    if difference is not None:
        print(f"logits differ from the masked original's by {difference:.1e} of the largest")
    print(f"sliced model: {out}")


@command("slicegpt")
def slicegpt(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the sliced model.")],
    data: Annotated[
        str, typer.Option(help="Calibration data: a .jsonl, .parquet or .arrow file, testbed:SPLIT or hub:NAME.")
    ],
    remove: Annotated[str, typer.Option(help="Units of the residual stream that go: a number, or e.g. 25%.")],
    alignment: Annotated[int, typer.Option(min=1, help="The stream keeps a multiple of this.")] = 8,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="data.*, calibration.sequences, .max_tokens and .batch_size; prompt_suffix, dtype, seed.",
        ),
    ] = None,
) -> None:
    """Baseline: a narrower residual stream by SliceGPT; no stock architecture, but recovered and evaluated here."""
    from ptl_rl.config.recipe import score_config

    config = score_config({"data": {"path": data}}, settings or [])
    from ptl_rl.baselines.slicegpt.command import slice_with_slicegpt

    with bar(make_console(120), "slicing") as progress:
        made = slice_with_slicegpt(model, out, config, remove=remove, alignment=alignment, progress=progress)
    parameters = f"{made.source_parameters:,} -> {made.parameters:,} parameters"
    share = f"({made.parameters / made.source_parameters:.0%})"
    print(f"residual stream {made.source_hidden_size} -> {made.hidden_size} units, {parameters} {share}")
    print(f"sliced model: {out}")
