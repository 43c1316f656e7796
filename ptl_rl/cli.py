"""The command line: ``ptl run``, ``ptl resume``, ``ptl plan``, ``ptl report``.

Heavy modules are imported inside the commands, so that ``--help`` and ``plan`` answer at once.
"""

import signal
import sys
import time
from pathlib import Path
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
Recipe = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. recovery.steps=4."),
]


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(2)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _drive(run_dir: Path) -> None:
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.driver.journal import JournalError
    from ptl_rl.driver.loop import Driver, StageFailed
    from ptl_rl.driver.run_folder import MissingArtefact, RunFolder
    from ptl_rl.reporting.live import Display

    signal.signal(signal.SIGTERM, _terminate)
    folder, console = RunFolder(run_dir), Console(width=None if sys.stdout.isatty() else 160)
    try:
        driver = Driver(folder, lambda config: Display(console, folder.path.name, config.recovery.steps_of))
        state = driver.run()
    except (ConfigError, JournalError) as error:
        _refuse(error)
    except (StageFailed, MissingArtefact) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished stages are kept. Continue with: ptl resume {run_dir}", file=sys.stderr)
        raise typer.Exit(130) from None
    _finish(folder.path, console, state.stopped)


def _finish(run_dir: Path, console, stopped: bool) -> None:
    from ptl_rl.config import read_saved_config
    from ptl_rl.driver.journal import Journal
    from ptl_rl.reporting import summary

    entries = Journal(run_dir / "journal.jsonl").entries()
    name = read_saved_config(run_dir / "config.json").name
    (run_dir / "summary.md").write_text(summary.markdown(entries))
    summary.plot(entries, run_dir / "summary.png", f"{name}: accuracy and size, cycle by cycle")
    console.print(summary.table(entries))
    console.print(f"picture: {run_dir / 'summary.png'}", highlight=False, soft_wrap=True)
    if stopped:
        console.print("stopped by the gate: accuracy stayed below gate.min_accuracy_ratio after all that it allows")
    best = run_dir / "best"
    if not best.exists():
        console.print("no cycle was accepted; the original model stands")
        return
    console.print(f"final model: {best.resolve()}", highlight=False, soft_wrap=True)
    console.print(
        "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'  model = AutoModelForCausalLM.from_pretrained("{best.resolve()}")\n'
        f'  tokenizer = AutoTokenizer.from_pretrained("{best.resolve()}")',
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


@app.command()
def run(
    recipe: Recipe,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME-TIME.")] = None,
    settings: Settings = None,
) -> None:
    """Check a recipe, then prune, recover, evaluate and repeat until its target."""
    from ptl_rl.config import ConfigError, load_config

    try:
        config = load_config(recipe, settings)
        run_dir = run_dir or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        from ptl_rl.driver.loop import start_run
        from ptl_rl.driver.preflight import check

        for note in check(config, run_dir.resolve()).notes:
            print(f"note: {note}", file=sys.stderr)
        start_run(config, run_dir)
    except ConfigError as error:
        _refuse(error)
    print(f"run folder: {run_dir}", flush=True)
    _drive(run_dir)


@app.command()
def resume(run_dir: Annotated[Path, typer.Argument(help="Folder of an interrupted run.")]) -> None:
    """Continue a run where its journal ends; stages that finished are not run again."""
    if not (run_dir / "config.json").exists():
        _refuse(FileNotFoundError(f"{run_dir}: no config.json; this is not a run folder"))
    _drive(run_dir)


@app.command()
def plan(recipe: Recipe, settings: Settings = None) -> None:
    """Show shapes, parameters and FLOPs of every cycle, without loading torch."""
    from rich.console import Console

    from ptl_rl.config import ConfigError, load_config
    from ptl_rl.driver.preflight import check_model
    from ptl_rl.reporting.forecast import forecast_table

    try:
        config = load_config(recipe, settings)
        model, shape = check_model(config, weights=False)
    except ConfigError as error:
        _refuse(error)
    Console(width=None if sys.stdout.isatty() else 120).print(forecast_table(config, shape, str(model)))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Print the table of cycles and write summary.md and summary.png."""
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.driver.journal import JournalError

    try:
        _finish(run_dir.resolve(), Console(width=None if sys.stdout.isatty() else 160), stopped=False)
    except (ConfigError, JournalError) as error:
        _refuse(error)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
