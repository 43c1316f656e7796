"""The Python interface: the main commands of ``ptl`` as functions, which those commands are thin shells over.

Everything heavy is imported inside the functions. What a user can mend is raised as :class:`ptl_rl.errors.UserError`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from ptl_rl.config import RunConfig
    from ptl_rl.data.records import Progress
    from ptl_rl.pruning.engine import Losses
    from ptl_rl.pruning.plan import PruningPlan
    from ptl_rl.reporting.summary import Row

Place = str | Path
Count = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


def _count(_done: int, _total: int) -> None:
    """The default: progress is not shown."""


@dataclass(frozen=True)
class RunResult:
    """What has become of a run."""

    folder: Path
    model: Path | None
    """Folder of the last accepted model, as ``from_pretrained`` takes it; None if no cycle was accepted."""
    stopped: bool
    """The gate stopped the run before its last cycle."""
    rows: "list[Row]"
    """One per evaluated cycle; the first is the original model."""


@dataclass(frozen=True)
class ScoreResult:
    """What :func:`score` has written into its folder."""

    folder: Path
    plan: "PruningPlan"
    losses: "Losses"
    """Shares of the outputs' mean square that the cut loses, after compensation and before."""


def load_recipe(recipe: Place, settings: Mapping[str, Any] | Iterable[str] = ()) -> "RunConfig":
    """Read a YAML recipe.

    Args:
        settings: overrides, by dotted key, as ``{"recovery.steps": 4}``; or as text, ``["recovery.steps=4"]``.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value out of bounds; names the file and the key.
    """
    from ptl_rl.config.recipe import load_config

    return load_config(Path(recipe), _texts(settings))


def _texts(settings: Mapping[str, Any] | Iterable[str]) -> list[str]:
    from ptl_rl.config.recipe import override_text
    from ptl_rl.errors import UserError

    if isinstance(settings, str):
        raise UserError(f"`settings` {settings!r}: give a mapping, or a list of such texts")
    return [override_text(*item) for item in settings.items()] if isinstance(settings, Mapping) else list(settings)


def start(
    recipe: "RunConfig", folder: Place | None = None, progress: "Progress | None" = None
) -> tuple[Path, list[str]]:
    """Check everything that can be checked, and make the run's folder; :func:`resume` then does the work.

    Args:
        folder: of the run; default: ``runs/NAME-TIME``.
        progress: told of the data that is read, and of speeds that are measured.

    Returns:
        the folder, and notes for the user.

    Raises:
        UserError: something that would stop the run, or give a nonsense result.
    """
    import time

    from ptl_rl.data.records import no_progress
    from ptl_rl.driver.loop import check_unused, start_run
    from ptl_rl.driver.preflight import check, settle
    from ptl_rl.driver.run_folder import RunFolder
    from ptl_rl.errors import resolved

    place = Path(folder or Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    notes = check(recipe, resolved(place), progress or no_progress)
    check_unused(RunFolder(place))  # before anything is measured, which takes minutes
    config, speeds = settle(recipe, progress or no_progress)
    if speeds is not None:  # the cuts are others than those that were checked
        notes = [*check(config, resolved(place), progress or no_progress), *speeds.notes]
    start_run(config, place)
    if speeds is not None:
        speeds.save(place / "speed_target.json")
    return place, notes


def run(
    recipe: "RunConfig | Place",
    folder: Place | None = None,
    *,
    settings: Mapping[str, Any] | Iterable[str] = (),
    console: "Console | None" = None,
) -> RunResult:
    """Prune, recover, evaluate and repeat until the recipe's target. KeyboardInterrupt leaves a run that resumes.

    Args:
        recipe: what :func:`load_recipe` gives, or the path of a recipe.
        folder: of the run, new; default: ``runs/NAME-TIME``.
        settings: overrides of a recipe that is given by its path.
        console: where progress is shown; default: standard output. Outside a terminal, as in a notebook, it is a line
            per event.

    Raises:
        UserError: something that would stop the run; nothing was started.
        StageFailed: a stage ended without its result; finished stages are kept.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, settings)
    elif settings:
        from ptl_rl.errors import UserError

        raise UserError("`settings`: they override a recipe's file; this recipe is read already")
    console = console or _console()
    place, notes = start(recipe, folder)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"run folder: {place}", highlight=False, soft_wrap=True, markup=False)
    return resume(place, console=console)


def resume(folder: Place, *, console: "Console | None" = None) -> RunResult:
    """Continue a run where its journal ends; stages that finished are not run again. See :func:`run`."""
    from ptl_rl.config import ConfigError
    from ptl_rl.driver.loop import Driver
    from ptl_rl.driver.run_folder import RunFolder
    from ptl_rl.planning.schedule import methods_and_steps
    from ptl_rl.reporting.live import LiveDisplay

    if not (Path(folder) / "config.json").exists():
        raise ConfigError(f"{folder}: no config.json; this is not a run folder")
    place, shown = RunFolder(Path(folder)), console or _console()
    state = Driver(place, lambda config: LiveDisplay(shown, place.path.name, partial(methods_and_steps, config))).run()
    return result(place.path, stopped=state.stopped)


def _console() -> "Console":
    from rich.console import Console

    found = Console(emoji=False)
    return found if found.is_terminal else Console(width=160, emoji=False)


def result(folder: Place, stopped: bool = False) -> RunResult:
    """What a run's folder holds so far; its ``summary.md`` and ``summary.png`` are written anew."""
    from ptl_rl.errors import resolved
    from ptl_rl.reporting import summary

    place = resolved(Path(folder))
    rows, best = summary.rows(summary.write(place)), place / "best"
    return RunResult(place, best.resolve() if best.exists() else None, stopped, rows)


def score(
    model: Place,
    data: Place,
    out: Place,
    *,
    remove_channels: str | int = 0,
    remove_layers: int = 0,
    alignment: int = 128,
    settings: Mapping[str, Any] | Iterable[str] = (),
    progress: Count = _count,
) -> ScoreResult:
    """Score channels and blocks of one model and plan a cut, in this process, without Ray; :func:`slice` makes it.

    Args:
        model: Hugging Face folder, hub id, or a shipped model such as ``testbed:llama``.
        data: reasoning data: a .jsonl, .parquet or .arrow file, a saved folder, ``hub:NAME`` or ``testbed:SPLIT``.
        out: folder for scores, plan and compensated weights.
        remove_channels: channels that each block loses: a number, or a percentage as ``"25%"``.
        remove_layers: blocks that go.
        alignment: kept widths are multiples of this.
        settings: ``data.*``, ``calibration.*``, ``criterion.*``, ``dtype``, ``seed``; see :func:`load_recipe`.

    Raises:
        UserError: a model, data or setting that cannot be used.
    """
    from ptl_rl.config.recipe import score_config
    from ptl_rl.errors import UserError
    from ptl_rl.pruning.command import score_model

    if alignment < 1:
        raise UserError(f"`alignment` {alignment}: at least 1")
    plan, losses = score_model(
        str(model),
        Path(out),
        score_config({"data": {"path": str(data)}}, _texts(settings)),
        remove_channels=str(remove_channels),
        remove_layers=remove_layers,
        alignment=alignment,
        progress=progress,
    )
    return ScoreResult(Path(out), plan, losses)


def slice(model: Place, plan: Place, out: Place, *, check: bool = True, progress: Count = _count) -> float | None:
    """Cut a model down to a plan: an ordinary Hugging Face folder again.

    Args:
        plan: a plan.json, or the folder that :func:`score` wrote.
        out: new folder.
        check: hold its logits against those of the masked original; loads both, one after the other.

    Returns:
        the largest difference of the logits, as a share of the largest logit; None without ``check``.

    Raises:
        UserError: a plan that is not this model's, or a folder that is not empty.
        ExportError: the logits differ by more than rounding, which is a bug of this project.
    """
    from ptl_rl.pruning.command import slice_model

    return slice_model(str(model), Path(plan), Path(out), check=check, progress=progress)


def evaluate(
    model: Place,
    tasks: Iterable[str],
    out: Place | None = None,
    *,
    data: Mapping[str, Place] | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    max_model_tokens: int | None = None,
    prompt_suffix: str = "",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    tensor_parallel_size: int = 1,
    batch_size: int = 128,
    seed: int = 0,
    trust_remote_code: bool = False,
    starting: Callable[[str], None] = lambda what: None,
    judged: Count = _count,
) -> dict[str, Any]:
    """Evaluate a model on lm-eval's tasks with vLLM, in this process; finished tasks in ``out`` are not made again.

    Args:
        tasks: names, as ``["gsm8k", "math500"]``; ``ptl eval --list-tasks`` has them all.
        out: folder for results and every answer; default: ``evaluations/MODEL``.
        data: by task, its questions: a local file, ``hub:NAME`` or ``testbed:SPLIT``.
        limit: first so many questions of each task.
        max_tokens: longest response; default: each task's.
        max_model_tokens: prompt and response together; default: what the model can read.
        dtype: auto is float32 on CPUs and bfloat16 elsewhere.

    Returns:
        what ``results.json`` holds: ``model``, and ``tasks`` with figures and intervals by task.

    Raises:
        UserError: a model, task or data set that cannot be used.
    """
    from ptl_rl.config.recipe import eval_config
    from ptl_rl.errors import check_writable
    from ptl_rl.evaluation import command

    command.quieten_libraries()
    values = {
        "tasks": [tasks] if isinstance(tasks, str) else list(tasks),
        "data": {name: str(place) for name, place in (data or {}).items()},
        "limit": limit,
        "max_tokens": max_tokens,
        "max_model_tokens": max_model_tokens,
        "prompt_suffix": prompt_suffix,
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel_size,
        "batch_size": batch_size,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
    }
    config = eval_config(values)
    place = Path(out) if out is not None else command.default_folder(str(model))
    check_writable(place)
    folder, prepared = command.prepare(str(model), config)
    return command.evaluate_model(folder, prepared, config, place, starting=starting, judged=judged)


def report(folders: Place | Iterable[Place], out: Place | None = None) -> Path:
    """Write one self-contained page about one run or several.

    Args:
        out: the page; default: ``report.html`` in the (first) run's folder.

    Raises:
        UserError: a folder that is no run's, or holds nothing yet that was evaluated.
    """
    from ptl_rl.errors import UserError, check_new_file
    from ptl_rl.reporting.html import page
    from ptl_rl.reporting.run_data import RunData

    runs = [RunData(Path(folder)) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    if not runs:
        raise UserError("`folders`: name at least one run")
    place = Path(out) if out is not None else runs[0].folder / "report.html"
    check_new_file(place)
    place.write_text(page(runs))
    return place
