"""``ptl study``: design, runs, results."""

import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from ptl_rl.config import ConfigError, RunConfig
from ptl_rl.config.recipe import load_config
from ptl_rl.driver.preflight import check_model
from ptl_rl.driver.watchdog import interrupt
from ptl_rl.families import ModelShape
from ptl_rl.planning.schedule import planned_cuts, recovery_steps, settled, speed_wanted
from ptl_rl.studies import results
from ptl_rl.studies.design import STUDIES, Study, design, slicegpt_shape, target_shape
from ptl_rl.studies.runner import StudyFailed, check_folder, make_runs, save_study
from ptl_rl.tables import text_table

__all__ = ["Made", "StudyFailed", "design_table", "make", "prepare"]

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Made:
    """A study that can be made."""

    study: Study
    """The rows that are to be made."""
    whole: Study
    """All rows, which results are written of."""
    config: RunConfig
    shape: ModelShape
    out: Path
    command: str
    """That makes it."""


DEMO_RECIPES = {
    "table1": ("table1-grpo", "table1-cpt"),
    "table2": ("recovery",),
    "recovery": ("recovery",),
    "rl": ("rl",),
    "pace": ("pace",),
    "order": ("order",),
    "code": ("code",),
}
"""Shipped recipes that a study varies at the demo's scale; the others vary ``default``."""


def demo_recipes(name: str) -> list[Path]:
    """Of a study at the demo's scale.

    Raises:
        ConfigError: no such study.
    """
    if name not in STUDIES:
        raise ConfigError(f"study {name!r}: there are {', '.join(STUDIES)}")
    return [RECIPES / f"{recipe}.yaml" for recipe in DEMO_RECIPES.get(name, ("default",))]


def prepare(
    name: str, recipes: list[Path], settings: list[str], out: Path | None, only: list[str] | None = None
) -> list[Made]:
    """Design a study on every recipe, and check what can be checked before anything is run.

    Args:
        recipes: none: those of the demo.
        out: with several recipes each has a folder of its own in it.
        only: names of rows; the others are left out.

    Raises:
        ConfigError: no such study, or a recipe or setting that it cannot use.
    """
    found = []
    chosen = recipes or demo_recipes(name)
    folder = out or Path("studies") / name
    for recipe in chosen:
        config = load_config(recipe, settings)
        _, shape = check_model(config)
        if speed_wanted(config.schedule) is not None:
            raise ConfigError(
                f"{recipe}: a study does not measure schedule.target.tokens_per_second; set schedule.channels_total"
            )
        config = settled(config, shape)
        words = ["ptl", "study", name, *map(str, recipes)]
        words += [word for setting in settings for word in ("--set", setting)]
        own = folder / recipe.stem if len(chosen) > 1 else folder
        whole = design(name, config, shape)
        found.append(Made(_only(whole, only), whole, config, shape, own, shlex.join(words)))
    if len({made.out for made in found}) < len(found):
        raise ConfigError("two recipes of one file name would share a folder; rename one of them")
    return found


def _only(study: Study, names: list[str] | None) -> Study:
    unknown = set(names or []) - {row.name for row in study.rows}
    if unknown:
        there = ", ".join(row.name for row in study.rows)
        raise ConfigError(f"`only` {min(unknown)}: study {study.name} has the rows {there}")
    return replace(study, rows=[row for row in study.rows if row.name in names]) if names else study


def design_table(made: Made) -> Table:
    """The rows of a study, before any is made."""
    rows = []
    for row in made.study.rows:
        config = row.config(seed=0)
        size = row.slicegpt_size
        shape = slicegpt_shape(made.shape, size) if size else target_shape(config, made.shape)
        cuts = planned_cuts(config.schedule)
        steps = " + ".join(
            f"{sum(recovery_steps(config, cut.planned, part) for cut in cuts)} {recovery.method}"
            for part, recovery in enumerate(config.recovery)
        )
        parameters = f"{shape.parameters:,} ({shape.parameters / made.shape.parameters:.0%})"
        cells = (row.name, row.label, str(len(cuts)), parameters, steps)
        rows.append(dict(zip(("row", "what", "cycles", "parameters", "steps"), cells, strict=True)))
    title, caption = f"{made.study.name}: {made.study.question}", "; ".join(made.study.notes)
    return text_table(rows, left=("row", "what"), title=title, caption=caption)


def make(
    made: Made, seeds: int, progress: Callable[[int, int], None], say: Callable[[str], None] = lambda what: None
) -> str:
    """Make what is missing of the study's runs and write its results; they are also written after every run.

    Raises:
        ConfigError: its folder holds runs of another design.
        StudyFailed: runs failed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    check_folder(made.whole, made.out, seeds)
    save_study(made.whole, made.out)

    def told(done: int, total: int, name: str) -> None:
        progress(done, total)
        if done:
            results.write(made.whole, made.out, made.shape, made.command)
        if name:
            say(f"run {done + 1} of {total}: {name}")

    make_runs(made.study, made.out, seeds, progress=told)
    text = results.write(made.whole, made.out, made.shape, made.command)
    if text is None:
        raise StudyFailed(f"{made.out}: no run of this study is finished")
    return text
