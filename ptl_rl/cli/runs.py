"""``ptl run``, ``resume``, ``plan``, ``data``: recipe and run; ``report``, ``compare``, ``export``: what came of it."""

import errno
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from ptl_rl.cli.common import Settings, app, refuse

Recipe = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")]
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
"""A full disk or quota, and file systems that stopped: none of our bugs, and a run goes on once they are mended."""


def _drive(run_dir: Path) -> None:
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.driver.journal import JournalError
    from ptl_rl.driver.loop import Driver, StageFailed
    from ptl_rl.driver.run_folder import MissingArtefact, RunFolder
    from ptl_rl.driver.watchdog import interrupt
    from ptl_rl.reporting.live import LiveDisplay

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    folder, console = RunFolder(run_dir), Console(width=None if sys.stdout.isatty() else 160)
    try:
        driver = Driver(folder, lambda config: LiveDisplay(console, folder.path.name, config.recoveries))
        state = driver.run()
    except (ConfigError, JournalError) as error:
        refuse(error)
    except (StageFailed, MissingArtefact) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        print(
            f"error: {error.filename or run_dir}: {error.strerror}; finished stages are kept. Once there is room, or "
            f"the file system is well again, continue with: ptl resume {run_dir}",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished stages are kept. Continue with: ptl resume {run_dir}", file=sys.stderr)
        raise typer.Exit(130) from None
    _finish(folder.path, console, state.stopped)


def _finish(run_dir: Path, console, stopped: bool) -> None:
    from ptl_rl.config.recipe import read_saved_config
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
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.config.recipe import load_config

    try:
        config = load_config(recipe, settings)
        run_dir = run_dir or Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        from ptl_rl.driver.loop import start_run
        from ptl_rl.driver.preflight import check
        from ptl_rl.reporting.data_table import reading_bars

        with reading_bars(Console(stderr=True)) as progress:
            notes = check(config, run_dir.resolve(), progress).notes
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        start_run(config, run_dir)
    except ConfigError as error:
        refuse(error)
    print(f"run folder: {run_dir}", flush=True)
    _drive(run_dir)


@app.command()
def resume(run_dir: Annotated[Path, typer.Argument(help="Folder of an interrupted run.")]) -> None:
    """Continue a run where its journal ends; stages that finished are not run again."""
    if not (run_dir / "config.json").exists():
        refuse(FileNotFoundError(f"{run_dir}: no config.json; this is not a run folder"))
    _drive(run_dir)


@app.command()
def plan(
    recipe: Recipe,
    settings: Settings = None,
    gpu: Annotated[
        str | None, typer.Option(help="h200, h100, a100-80, ...; default: resources.gpu, else what this machine has.")
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="In any currency.")] = None,
    disk_gb_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="To the run folder, from all workers together; default: 1.")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that training reaches.")
    ] = None,
    mean_response_share: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Mean length of a response as a share of the longest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    resolved: Annotated[
        bool,
        typer.Option(
            "--resolved",
            help="Print the recipe instead, with its base and --set put in: a recipe that stands alone. It states "
            "what differs from the defaults; a run's config.json has every setting.",
        ),
    ] = False,
) -> None:
    """Show sizes, memory, disk, hours and price of a run, and what will not fit; without weights or torch, offline."""
    import json

    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.config.recipe import as_recipe, load_config
    from ptl_rl.driver.preflight import check_cuts
    from ptl_rl.planning.forecast import assumptions_of, device_of, forecast
    from ptl_rl.planning.model import planned_model
    from ptl_rl.reporting.forecast import show_forecast

    given = {"disk_gb_per_second": disk_gb_per_second, "mfu": mfu, "mean_response_share": mean_response_share}
    try:
        if resolved and as_json:
            raise ConfigError("--json and --resolved print different things; give one of them")
        config = load_config(recipe, settings)
        if resolved:
            print(as_recipe(config), end="")
            return
        model, device = planned_model(config), device_of(config, gpu)
        check_cuts(config, model.shape)
    except ConfigError as error:
        refuse(error)
    found = forecast(
        config, model, device, assumed=assumptions_of(device, given), price_per_gpu_hour=price_per_gpu_hour
    )
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show_forecast(found, Console(width=None if sys.stdout.isatty() else 140))


@app.command()
def data(
    recipe: Recipe,
    settings: Settings = None,
    samples: Annotated[int, typer.Option(min=0, help="Records of each set to show.")] = 3,
    count_tokens: Annotated[
        bool, typer.Option("--count-tokens", help="Read every record, do not estimate from 2000.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a recipe reads: rows, what is left out and why, subsets, tokens, samples."""
    import json

    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.config.recipe import load_config
    from ptl_rl.reporting.data_table import reading_bars, show

    try:
        config = load_config(recipe, settings)
        from ptl_rl.driver.data_report import data_report

        with reading_bars(Console(stderr=True)) as progress:
            found = data_report(config, samples=samples, exact_tokens=count_tokens, progress=progress)
    except ConfigError as error:
        refuse(error)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 160))


Runs = Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not.")]


@app.command()
def report(
    run_dirs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the (first) run's folder.")
    ] = None,
) -> None:
    """Write one self-contained page about one run or several; of each also summary.md and summary.png."""
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.driver.journal import JournalError

    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        from ptl_rl.reporting.html import page
        from ptl_rl.reporting.run_data import RunData

        runs = [RunData(run_dir) for run_dir in run_dirs]
        for run in runs:
            _finish(run.folder, console, stopped=False)
        out = out or runs[0].folder / "report.html"
        out.write_text(page(runs))
    except (ConfigError, JournalError, OSError) as error:
        refuse(error)
    console.print(f"report: {out}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def compare(
    run_dirs: Runs,
    out: Annotated[Path | None, typer.Option(help="Also write the table as markdown.")] = None,
) -> None:
    """Print runs side by side, each compared with the first on the same test problems."""
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.driver.journal import JournalError

    try:
        from ptl_rl.reporting.compare import comparison_markdown, comparison_table
        from ptl_rl.reporting.run_data import RunData

        runs = [RunData(run_dir) for run_dir in run_dirs]
        Console(width=None if sys.stdout.isatty() else 200).print(comparison_table(runs))
        if out is not None:
            out.write_text(comparison_markdown(runs))
    except (ConfigError, JournalError, OSError) as error:
        refuse(error)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run with at least one accepted cycle.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    name: Annotated[str | None, typer.Option(help="Of the model, on its card; default: the folder's.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Default: what the parent's card says.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the weights; default: model.dtype of the run, in which it was evaluated."),
    ] = None,
) -> None:
    """Copy a run's final model as a Hugging Face folder with a model card."""
    from ptl_rl.config import ConfigError
    from ptl_rl.driver.journal import JournalError

    try:
        from ptl_rl.reporting.export import export_model

        export_model(run_dir, out, name=name or out.name, licence=licence, dtype=dtype)
    except (ConfigError, JournalError, OSError) as error:
        refuse(error)
    print(f"model: {out}")
