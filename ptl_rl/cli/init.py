"""``ptl init``: a first recipe for one's own model and data."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ptl_rl.cli.common import Model, command, interruptible, make_console

NEXT = {
    "plan": "sizes, memory, hours; with --gpu h200, or another, for GPUs that are not here",
    "data": "what it reads, and what it leaves out",
    "doctor": "what would stop it on this machine",
    "run": "the run itself",
}


@command()
def init(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(help="A .jsonl, .parquet or .arrow file, a saved data set's folder, hub:NAME or testbed:SPLIT."),
    ],
    out: Annotated[Path, typer.Option(help="The recipe.")] = Path("recipe.yaml"),
    reward: Annotated[
        str | None,
        typer.Option(metavar="FILE[:FUNCTION]", help="Your reward, in verl's signature; 'code' runs unit tests."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Default: those of this machine.")] = None,
    recovery: Annotated[
        Literal["grpo", "cpt", "distill"],
        typer.Option(help="RL, continued pre-training, or distillation; cpt needs no answers."),
    ] = "grpo",
    remove: Annotated[str, typer.Option(help="FFN channels that go in all: e.g. 50%, or a number per layer.")] = "50%",
    fields: Annotated[
        str | None,
        typer.Option(metavar="MAPPING", help="Columns, e.g. '{question: problem, answer: final}'; default: by name."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write a short recipe for your own model and data, with comments; no weights are read."""
    from ptl_rl.config.recipe import field_map
    from ptl_rl.planning.new_recipe import Wishes, check_out, new_recipe, write_recipe
    from ptl_rl.reporting.data_table import reading_bars

    check_out(out, force=force)
    columns = field_map(fields, "`fields`") if fields is not None else None
    wishes = Wishes(model, data, recovery, remove, reward, gpus, columns)
    with interruptible("nothing was written"), reading_bars(make_console(stderr=True)) as progress:
        write_recipe(new_recipe(wishes, progress), out, force=force)
    print(f"wrote {out}. Next:")
    for name, what in NEXT.items():
        print(f"  ptl {name:<6} {out}  # {what}")
