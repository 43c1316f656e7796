"""The command line: ``ptl run``, ``resume``, ``plan``, ``data``, ``report``, ``score``, ``slice``.

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


def _drive(run_dir: Path) -> None:
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.driver.journal import JournalError
    from ptl_rl.driver.loop import Driver, StageFailed
    from ptl_rl.driver.run_folder import MissingArtefact, RunFolder
    from ptl_rl.driver.watchdog import interrupt
    from ptl_rl.reporting.live import Display

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    folder, console = RunFolder(run_dir), Console(width=None if sys.stdout.isatty() else 160)
    try:
        driver = Driver(folder, lambda config: Display(console, folder.path.name, config.recoveries))
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
    from ptl_rl.driver.journal import Journal
    from ptl_rl.recipe import read_saved_config
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
    from ptl_rl.recipe import load_config

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

    from ptl_rl.config import ConfigError
    from ptl_rl.driver.preflight import check_model
    from ptl_rl.recipe import load_config
    from ptl_rl.reporting.forecast import forecast_table

    try:
        config = load_config(recipe, settings)
        model, shape = check_model(config, weights=False)
    except ConfigError as error:
        _refuse(error)
    Console(width=None if sys.stdout.isatty() else 120).print(forecast_table(config, shape, str(model)))


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
    from ptl_rl.recipe import load_config
    from ptl_rl.reporting.data_table import reading_bars, show

    try:
        config = load_config(recipe, settings)
        from ptl_rl.driver.data_report import data_report

        with reading_bars(Console(stderr=True)) as progress:
            found = data_report(config, samples=samples, exact_tokens=count_tokens, progress=progress)
    except ConfigError as error:
        _refuse(error)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 160))


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


def _bar(console, what: str):
    """A progress bar that appears with the first progress, and what to tell it of that."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    bar = Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), remaining, console=console)
    task = bar.add_task(what, total=None)

    def progress(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    return bar, progress


Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or a shipped model: 'testbed:llama'.")]


@app.command()
def score(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Reasoning data: a .jsonl, .parquet or .arrow file, testbed:SPLIT or hub:NAME.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for scores, plan and compensated weights.")],
    remove_channels: Annotated[str, typer.Option(help="Channels that each block loses: a number, or e.g. 25%.")] = "0",
    remove_layers: Annotated[int, typer.Option(help="Blocks that go.")] = 0,
    alignment: Annotated[int, typer.Option(min=1, help="Kept widths are multiples of this.")] = 64,
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
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.recipe import score_config

    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        config = score_config({"data": {"path": data}}, settings or [])
        from ptl_rl.pruning.command import score_model

        bar, progress = _bar(console, "reading")
        try:
            plan, losses = score_model(
                model,
                out,
                config,
                remove_channels=remove_channels,
                remove_layers=remove_layers,
                alignment=alignment * tensor_parallel_size,
                progress=progress,
            )
        finally:
            bar.stop()
    except (ConfigError, ValueError, OSError) as error:
        _refuse(error)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    kept = f"{plan.num_hidden_layers} blocks of {plan.intermediate_size} channels"
    console.print(f"keeps {kept}, of {len(plan.keep_channels)} of {plan.source_intermediate_size}", highlight=False)
    if losses.channels is not None and losses.channels_plain is not None:
        console.print(
            f"of the FFN outputs' mean square {losses.channels:.2%} is lost, {losses.channels_plain:.2%} without "
            "compensation",
            highlight=False,
        )
    if losses.stream is not None:
        console.print(f"of the last block's residual stream {losses.stream:.2%} is lost", highlight=False)
    console.print(f"next: ptl slice {model} {out} SLICED", highlight=False, soft_wrap=True, markup=False)


@app.command("slice")
def slice_model(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="plan.json, or the folder that `ptl score` wrote.")],
    out: Annotated[Path, typer.Argument(help="New folder for the sliced model.")],
    check: Annotated[bool, typer.Option(help="Compare the logits with the masked original's.")] = True,
) -> None:
    """Cut a model down to a plan: an ordinary Hugging Face folder again."""
    from rich.console import Console

    from ptl_rl.config import ConfigError

    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        from ptl_rl.pruning import command

        bar, progress = _bar(console, "writing")
        try:
            difference = command.slice_model(model, plan, out, check=check, progress=progress)
        finally:
            bar.stop()
    except (ConfigError, ValueError, OSError) as error:
        _refuse(error)
    if difference is not None:
        console.print(f"logits differ from the masked original's by {difference:.1e} of the largest", highlight=False)
    console.print(f"sliced model: {out}", highlight=False, soft_wrap=True, markup=False)


@app.command("slicegpt")
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
        typer.Option("--set", metavar="KEY=VALUE", help="data.*, calibration.*, prompt_suffix, dtype, seed."),
    ] = None,
) -> None:
    """Baseline: a narrower residual stream by SliceGPT; no stock architecture, but recovered and evaluated here."""
    from rich.console import Console

    from ptl_rl.config import ConfigError
    from ptl_rl.recipe import score_config

    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        config = score_config({"data": {"path": data}}, settings or [])
        from ptl_rl.baselines.slicegpt.command import slice_with_slicegpt

        bar, progress = _bar(console, "slicing")
        try:
            made = slice_with_slicegpt(model, out, config, remove=remove, alignment=alignment, progress=progress)
        finally:
            bar.stop()
    except (ConfigError, ValueError, OSError) as error:
        _refuse(error)
    console.print(
        f"residual stream {made.source_hidden_size} -> {made.hidden_size} units, {made.source_parameters:,} -> "
        f"{made.parameters:,} parameters ({made.parameters / made.source_parameters:.0%})",
        highlight=False,
    )
    console.print(f"sliced model: {out}", highlight=False, soft_wrap=True, markup=False)


def _list_tasks(wanted: bool) -> None:
    from rich.console import Console

    from ptl_rl.reporting.eval_table import task_table

    if wanted:
        Console(width=None if sys.stdout.isatty() else 160).print(task_table())
        raise typer.Exit


@app.command("eval")
def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Comma-separated; --list-tasks has them all.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="Questions of a task from a local file (or hub:NAME, testbed:SPLIT)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many questions of each task.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; default: evaluations/MODEL.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response; default: each task's.")] = None,
    max_model_tokens: Annotated[
        int | None, typer.Option(min=8, help="Prompt and response together; default: what the model can read.")
    ] = None,
    prompt_suffix: Annotated[str, typer.Option(help="Appended to zero-shot questions, as data.prompt_suffix.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16; auto: float32 on CPUs.")] = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Concurrent sequences in vLLM.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap; generation is greedy.")] = 0,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", is_eager=True, callback=_list_tasks, help="Print the tasks and end.")
    ] = False,
) -> None:
    """Evaluate a model on tasks of mathematics and code; an interrupted evaluation goes on where it was."""
    from rich.console import Console

    from ptl_rl.config import ConfigError

    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        from ptl_rl.evaluation import command
        from ptl_rl.evaluation.tasks import find_tasks
        from ptl_rl.reporting.eval_table import result_table

        command.quieten_libraries()
        names = [name for name in tasks.split(",") if name]
        config = command.EvalConfig(
            tasks=names,
            data=command.parse_data(data or [], find_tasks(names)),
            limit=limit,
            max_tokens=max_tokens,
            max_model_tokens=max_model_tokens,
            prompt_suffix=prompt_suffix,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            batch_size=batch_size,
            seed=seed,
        )
        out = out or Path("evaluations") / Path(model.replace(":", "-")).name
        folder, prepared = command.prepare(model, config)
        bar, judged = _bar(console, "judging")
        try:
            found = command.evaluate_model(
                folder,
                prepared,
                config,
                out,
                starting=lambda what: console.print(what, highlight=False, markup=False),
                judged=judged,
            )
        finally:
            bar.stop()
    except (ConfigError, ValueError, RuntimeError) as error:
        _refuse(error)
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished tasks are kept in {out}; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(result_table(found))
    console.print(f"results: {out / command.RESULTS}, samples beside it", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
