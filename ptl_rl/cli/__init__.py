"""The command line. Heavy modules are imported inside the commands, so that ``--help`` and ``plan`` answer at once."""

from ptl_rl.cli import doctor, init, measure, models, runs
from ptl_rl.cli.common import app

__all__ = ["app", "doctor", "init", "main", "measure", "models", "runs"]


def main() -> None:
    app()
