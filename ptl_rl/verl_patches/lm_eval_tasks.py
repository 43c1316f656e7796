"""Load task definitions of lm-eval whose modules ask, while they are imported, for what this stack cannot give them.

Only prompts, few-shot examples, stop sequences and filters are taken from such a task; what its module wanted the
missing part for is judged elsewhere (``ptl_rl/evaluation/tasks.py``).
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from ptl_rl.errors import UserError

SUPPORTED_LM_EVAL = SpecifierSet(">=0.4.13,<0.5")
ANTLR = "antlr4-python3-runtime"


def task_definition(path: str) -> dict[str, Any]:
    """The definition in a YAML file of lm-eval's task folder, its functions resolved.

    Args:
        path: relative to that folder, e.g. ``gsm8k/gsm8k-cot.yaml``.

    Raises:
        UserError: lm-eval is missing, or of a version that this module was not written for.
    """
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("lm-eval is not installed; pip install 'ptl-rl[eval]'") from None
    if found not in SUPPORTED_LM_EVAL:
        raise UserError(f"this project supports lm-eval {SUPPORTED_LM_EVAL}, found {found}; install one of these")
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    with any_antlr(), without_code_eval():
        return load_yaml(Path(lm_eval.tasks.__file__).parent / path)


@contextlib.contextmanager
def any_antlr() -> Iterator[None]:
    """Let ``minerva_math`` be imported beside another ANTLR than 4.11 (lm-eval 0.4.13).

    Its module asserts 4.11 for sympy's LaTeX parser, while verl's OmegaConf needs 4.9. The parser serves its
    ``exact_match`` alone; prompts and math-verify do without.
    """
    import math_verify  # noqa: F401  (it asks for the version, too, once, and needs the true one)

    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return "4.11" if distribution_name == ANTLR else original(distribution_name)

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = original


@contextlib.contextmanager
def without_code_eval() -> Iterator[None]:
    """Let ``mbpp`` be imported without the hub's metric ``code_eval`` (lm-eval 0.4.13).

    Its module downloads that metric and runs a program with it at once, outside of any confinement.
    """
    import evaluate

    class Refusing:
        def compute(self, **_: Any) -> Any:
            return None

    original = evaluate.load
    evaluate.load = lambda *_, **__: Refusing()
    try:
        yield
    finally:
        evaluate.load = original
