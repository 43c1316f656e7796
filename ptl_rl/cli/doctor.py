"""``ptl doctor``: what is wrong with a machine, before a run finds out."""

from pathlib import Path
from typing import Annotated

import typer

from ptl_rl.cli.common import Settings, command, make_console

SIGNS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; without one the machine alone.")] = None,
    settings: Settings = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder that the run is to have; on a joined cluster, asks every node for it.")
    ] = None,
    lock: Annotated[Path | None, typer.Option(help="Compare packages with this lock; default: the checkout's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look for everything that would stop a run here; exit status 1 if something would."""
    import json
    from dataclasses import asdict

    from ptl_rl.api import load_recipe
    from ptl_rl.config import ConfigError
    from ptl_rl.driver.doctor import examine, stops

    if settings and recipe is None:
        raise ConfigError("`settings`: they change a recipe, and none is named")
    if lock is not None and not lock.is_file():
        raise ConfigError(f"`lock` {lock}: no such file")
    config = load_recipe(recipe, settings or []) if recipe is not None else None
    findings = examine(config, run_dir, lock)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = make_console()
        for finding in findings:
            console.print(f"{SIGNS[finding.level]:<8}", style=STYLES[finding.level], end="", highlight=False)
            print(f"{finding.topic}: {finding.text}")
            if finding.remedy:
                print(f"        -> {finding.remedy}")
        count = sum(finding.level == "problem" for finding in findings)
        words = f"{count} of these would stop" if count else "nothing here would stop"
        print(f"{words} {'a run' if recipe is None else recipe.stem}")
    raise typer.Exit(1 if stops(findings) else 0)
