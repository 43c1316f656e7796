"""``ptl run``, ``resume``, ``plan``, ``data``: recipe and run; ``report``, ``compare``, ``export``: what came of it."""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ptl_rl.cli.common import STORAGE_ERRORS, Settings, command, fail, interruptible, make_console
from ptl_rl.errors import resume_command

if TYPE_CHECKING:
    from ptl_rl.api import RunResult

Recipe = Annotated[Path, typer.Argument(help="YAML recipe; see recipes/.")]


def _drive(run_dir: Path) -> None:
    from ptl_rl import api
    from ptl_rl.driver.loop import StageFailed
    from ptl_rl.driver.run_folder import MissingArtefact
    from ptl_rl.driver.watchdog import interrupt

    console = make_console()
    try:
        with interruptible(f"finished stages are kept. Continue with: {resume_command(run_dir)}"):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt)
            result = api.resume(run_dir, console=console)
    except (StageFailed, MissingArtefact) as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        fail(
            f"{error.filename or run_dir}: {error.strerror}; finished stages are kept. Once there is room, or the file "
            f"system is well again, continue with: {resume_command(run_dir)}"
        )
    _show(result, console)


def _show(result: "RunResult", console) -> None:
    from ptl_rl.reporting import summary

    console.print(summary.table(result.rows))
    print(f"picture: {result.folder / summary.PICTURE}")
    if result.stopped:
        print("stopped by the gate: accuracy stayed below gate.min_accuracy_ratio after all that it allows")
    if result.model is None:
        print("no cycle was accepted; the original model stands")
        return
    print(f"final model: {result.model}")
    name = json.dumps(str(result.model), ensure_ascii=False)
    print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"  model = AutoModelForCausalLM.from_pretrained({name})")
    print(f"  tokenizer = AutoTokenizer.from_pretrained({name})")


@command()
def run(
    recipe: Recipe,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME-TIME.")] = None,
    settings: Settings = None,
) -> None:
    """Check a recipe, then prune, recover, evaluate and repeat until its target."""
    from ptl_rl import api

    config = api.load_recipe(recipe, settings or [])
    from ptl_rl.reporting.data_table import reading_bars

    with interruptible("nothing was started"), reading_bars(make_console(stderr=True)) as progress:
        place, notes = api.start(config, run_dir, progress)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"run folder: {place}", flush=True)
    _drive(place)


@command()
def resume(run_dir: Annotated[Path, typer.Argument(help="Folder of an interrupted run.")]) -> None:
    """Continue a run where its journal ends; stages that finished are not run again."""
    _drive(run_dir)


@command()
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

    from ptl_rl.api import load_recipe
    from ptl_rl.config import ConfigError
    from ptl_rl.config.recipe import as_recipe
    from ptl_rl.planning.forecast import assumptions_of, device_of, forecast
    from ptl_rl.planning.model import planned_model
    from ptl_rl.planning.schedule import check_cuts, settled, speed_wanted
    from ptl_rl.reporting.forecast import show_forecast

    given = {"disk_gb_per_second": disk_gb_per_second, "mfu": mfu, "mean_response_share": mean_response_share}
    if resolved and as_json:
        raise ConfigError("`as_json` and `resolved` print different things; give one of them")
    config = load_recipe(recipe, settings or [])
    if resolved:
        print(as_recipe(config), end="")
        return
    model, device = planned_model(config), device_of(config, gpu)
    by_speed = speed_wanted(config.schedule)
    config = settled(config, model.shape)
    check_cuts(config, model.shape)
    found = forecast(
        config, model, device, assumed=assumptions_of(device, given), price_per_gpu_hour=price_per_gpu_hour
    )
    if by_speed:
        promised = f"schedule.target.tokens_per_second {by_speed:g} is what FLOPs promise here; ptl run measures it"
        found.notes.insert(0, promised)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show_forecast(found, make_console(140))


@command()
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

    from ptl_rl.api import load_recipe
    from ptl_rl.driver.data_report import data_report
    from ptl_rl.reporting.data_table import reading_bars, show

    config = load_recipe(recipe, settings or [])
    with reading_bars(make_console(stderr=True)) as progress:
        found = data_report(config, samples=samples, exact_tokens=count_tokens, progress=progress)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, make_console())


Runs = Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not.")]


@command()
def report(
    run_dirs: Runs,
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the (first) run's folder.")
    ] = None,
) -> None:
    """Write one self-contained page about one run or several; of each also summary.md and summary.png."""
    from ptl_rl import api

    console = make_console()
    page, results = api.report(run_dirs, out), [api.result(folder) for folder in run_dirs]
    for result in results:
        _show(result, console)
    print(f"report: {page}")


@command()
def compare(
    run_dirs: Runs,
    out: Annotated[Path | None, typer.Option(help="Also write the table as markdown.")] = None,
) -> None:
    """Print runs side by side, each compared with the first on the same test problems."""
    from ptl_rl.errors import check_new_file
    from ptl_rl.reporting.compare import comparison
    from ptl_rl.reporting.run_data import RunData
    from ptl_rl.tables import markdown_table, text_table

    if out is not None:
        check_new_file(out)
    rows = comparison([RunData(run_dir) for run_dir in run_dirs])
    make_console(200).print(text_table(rows, left=["run"], title="runs"))
    if out is not None:
        out.write_text(markdown_table(rows))


@command()
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
    from ptl_rl.reporting.export import export_model

    export_model(run_dir, out, name=name or out.name, licence=licence, dtype=dtype)
    print(f"model: {out}")
