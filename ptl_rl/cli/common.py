"""What several commands share: arguments, how bad input is refused, and a progress bar."""

import sys
from typing import Annotated, NoReturn

import typer

app = typer.Typer(
    name="ptl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Compact a reasoning language model gradually: prune a little, recover with RL, check, repeat.",
    epilog="Exit status: 0 done, 1 a stage failed (resumable), 2 bad input, 130 interrupted (resumable).",
)
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. recovery.steps=4."),
]
Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or a shipped model: 'testbed:llama'.")]


def refuse(error: Exception) -> NoReturn:
    """Say what is wrong with what was given, and end with status 2."""
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(2)


def bar(console, what: str):
    """A progress bar that appears with the first progress, and what to tell it of that."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    shown = Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), remaining, console=console)
    task = shown.add_task(what, total=None)

    def progress(done: int, total: int) -> None:
        shown.start()
        shown.update(task, completed=done, total=total)

    return shown, progress
