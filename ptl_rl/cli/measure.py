"""``ptl eval`` and ``study``: how good a model is, and what a comparison of many runs shows."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ptl_rl.cli.common import Model, Settings, bar, command, fail, interruptible, make_console

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="auto: float32 on CPUs, bfloat16 elsewhere.")
]


def _list_tasks(wanted: bool) -> None:
    from ptl_rl.reporting.eval_table import task_table

    if wanted:
        make_console().print(task_table("--data"))
        raise typer.Exit


def _by_task(entries: list[str]) -> dict[str, str]:
    from ptl_rl.config import ConfigError

    found: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or not path:
            raise ConfigError(f"`data` {entry}: give TASK=FILE, e.g. gsm8k=gsm8k_test.jsonl")
        found[name] = path
    return found


@command("eval")
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
    dtype: Dtype = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share the model.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Concurrent sequences in vLLM.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap; generation is greedy.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    list_tasks: Annotated[
        bool, typer.Option("--list-tasks", is_eager=True, callback=_list_tasks, help="Print the tasks and end.")
    ] = False,
) -> None:
    """Evaluate a model on tasks of mathematics and code; an interrupted evaluation goes on where it was."""
    from ptl_rl import api
    from ptl_rl.evaluation.command import RESULTS, default_folder, quieten_exit, quieten_libraries

    quieten_libraries()
    quieten_exit()
    console, place = make_console(), out or default_folder(model)
    with (
        interruptible(f"finished tasks are kept in {place}; the same command goes on"),
        bar(console, "judging") as judged,
    ):
        found = api.evaluate(
            model,
            [name for name in tasks.split(",") if name],
            place,
            data=_by_task(data or []),
            limit=limit,
            max_tokens=max_tokens,
            max_model_tokens=max_model_tokens,
            prompt_suffix=prompt_suffix,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
            starting=lambda what: console.print(what, highlight=False, markup=False),
            judged=judged,
        )
    from ptl_rl.reporting.eval_table import result_table

    console.print(result_table(found))
    print(f"results: {place / RESULTS}, samples beside it")


@command()
def speed(
    models: Annotated[
        list[str], typer.Argument(help="Folders, hub ids or shipped models; the first is compared with.")
    ],
    sequences: Annotated[int, typer.Option(min=2, help="Of the saturated load, at once.")] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of every prompt.")] = 64,
    response_tokens: Annotated[int, typer.Option(min=2, help="Of every response.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of every model under every load, in turns.")] = 5,
    dtype: Dtype = "auto",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share a model.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure how fast models generate in vLLM, at batch 1 and saturated, in turns within one run."""
    import json
    from dataclasses import asdict, replace

    from ptl_rl.checkpoints.read import check_finite
    from ptl_rl.errors import UserError, check_new_file, check_plain
    from ptl_rl.evaluation.command import prepare_machine, quieten_exit, quieten_libraries
    from ptl_rl.evaluation.speed import measure, usual_loads
    from ptl_rl.models import check_readable, open_model
    from ptl_rl.reporting.eval_table import speed_table

    if out is not None:
        check_new_file(out)
    quieten_libraries()
    quieten_exit()
    folders = [open_model(model, setting="MODEL")[0] for model in models]
    for folder in folders:
        check_plain(folder)
        check_readable(folder)
        check_finite(folder)
    console, cpu = make_console(), prepare_machine()
    kind = ("float32" if cpu else "bfloat16") if dtype == "auto" else dtype
    loads = usual_loads(sequences, prompt_tokens, response_tokens)
    nothing_kept = interruptible("nothing is kept of a measurement that is not finished")
    try:
        with nothing_kept, bar(console, "rounds") as progress:
            found = measure(
                folders, loads, rounds=rounds, dtype=kind, tensor_parallel_size=tensor_parallel_size, progress=progress
            )
    except ImportError as error:
        raise UserError(f"{error}; timing needs vLLM, which launch/setup.sh or the extra 'gpu' installs") from error
    found = [replace(figures, model=model) for figures, model in zip(found, models, strict=True)]
    console.print(speed_table(found, loads))
    if out is not None:
        out.write_text(json.dumps([asdict(model) for model in found], indent=2) + "\n")


@command()
def study(
    name: Annotated[
        str, typer.Argument(help="table1, table2, iterations, step_size, order, code, criteria, recovery, rl or pace.")
    ],
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="What is varied; default: the demo's recipes for this study.")
    ] = None,
    scale: Annotated[
        Literal["demo"], typer.Option(help="Of the recipes that are varied where none is named.")
    ] = "demo",
    out: Annotated[Path | None, typer.Option(help="Folder of the study; default: studies/NAME.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every row.")] = 3,
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Only these rows; see --dry-run.")] = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the rows and end.")] = False,
) -> None:
    """Make the runs that answer a question, and write table, figure and text; goes on where it was interrupted."""
    from ptl_rl.studies import command as studies

    console, failed = make_console(), []
    with interruptible("finished runs are kept; the same command goes on"):
        designs = studies.prepare(name, recipes or [], settings or [], out, only)
        for made in designs:
            console.print(studies.design_table(made))
        for made in designs if not dry_run else []:
            try:
                with bar(console, "runs") as progress:
                    text = studies.make(made, seeds, progress, lambda what: console.print(what, highlight=False))
            except studies.StudyFailed as error:
                failed.append(str(error))  # of one recipe; another's runs do not depend on it
                continue
            print(f"{text}\nstudy: {made.out}")
    if failed:
        fail("\nerror: ".join(failed))
