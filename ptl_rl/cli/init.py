"""``ptl init``: a first recipe for one's own model and data."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ptl_rl.cli.common import Model, app, refuse

NEXT = {
    "plan": "sizes, memory, hours; with --gpu h200, or another, for GPUs that are not here",
    "data": "what it reads, and what it leaves out",
    "doctor": "what would stop it on this machine",
    "run": "the run itself",
}


@app.command()
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
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.config.recipe import field_map

    try:
        from ptl_rl.data.columns import ColumnError
        from ptl_rl.data.records import DataError
        from ptl_rl.planning.new_recipe import Wishes, check_out, new_recipe, write_recipe
        from ptl_rl.reporting.data_table import reading_bars

        check_out(out, force=force)
        columns = field_map(fields, "--fields") if fields is not None else None
        wishes = Wishes(model, data, recovery, remove, reward, gpus, columns)
        with reading_bars(Console(stderr=True)) as progress:
            text = new_recipe(wishes, progress)
        write_recipe(text, out, force=force)
    except ColumnError as error:
        refuse(DataError(f"{error} (here: --fields '...')"))
    except (ConfigError, DataError) as error:
        refuse(error)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"wrote {out}. Next:")
    for command, what in NEXT.items():
        print(f"  ptl {command:<6} {out}  # {what}")
