"""Load a user's reward function from its file, with errors that say what to mend."""

import ast
import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RewardError(ValueError):
    """The configured reward function cannot be used; the message names file, function and remedy."""


def load_function(path: str | Path, name: str) -> Callable[..., Any]:
    """Execute the file `path` and return its function `name`.

    The module is registered in `sys.modules` under a name of its own (verl does not register what it loads
    by path), so that dataclasses and pickling work in it. Raises RewardError for a missing file, a syntax
    error, an exception while the file runs, and a name that is missing or not callable.
    """
    file = Path(path).expanduser().absolute()
    source = _read(file)
    module = _execute(file)
    function = getattr(module, name, None)
    if function is None:
        raise RewardError(_no_such_function(file, name, source))
    if not callable(function):
        raise RewardError(
            f"{name!r} in reward file {file} is a {type(function).__name__}, not a function: "
            f"set reward.name to a function"
        )
    loaded: Callable[..., Any] = function
    return loaded


def _read(file: Path) -> ast.Module:
    if not file.is_file():
        raise RewardError(f"reward file {file} does not exist: set reward.path to a Python file")
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise RewardError(f"reward file {file} has a syntax error in line {error.lineno}: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise RewardError(f"reward file {file} cannot be read as Python: {error}") from error


def _execute(file: Path) -> Any:
    module_name = "reward_user_" + hashlib.sha256(str(file).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward file {file} cannot be imported: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        remedy = "install it in every worker's environment" if isinstance(error, ImportError) else "mend the file"
        raise RewardError(
            f"importing reward file {file} failed{_at_line(error, file)} with {type(error).__name__}: {error}; {remedy}"
        ) from error
    return module


def _at_line(error: BaseException, file: Path) -> str:
    line = None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(file):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f" at line {line}" if line else ""


def _no_such_function(file: Path, name: str, source: ast.Module) -> str:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    defined = [node.name for node in source.body if isinstance(node, functions)]
    if not defined:
        return f"reward file {file} defines no function {name!r}, nor any other: define it there"
    close = difflib.get_close_matches(name, defined, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "set reward.name to one of them"
    return f"reward file {file} defines no function {name!r}, only {', '.join(defined)}: {hint}"
