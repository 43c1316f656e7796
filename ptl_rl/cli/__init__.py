"""The command line. Heavy modules are imported inside the commands, so that ``--help`` and ``plan`` answer at once."""

from ptl_rl.cli import doctor, init, measure, models, runs
from ptl_rl.cli.common import app
from ptl_rl.verl_patches import quick_imports

__all__ = ["app", "doctor", "init", "main", "measure", "models", "runs"]


def main() -> None:
    quick_imports.leave_out_scipy()
    quick_imports.look_through_all_objects_less_often()
    app()
