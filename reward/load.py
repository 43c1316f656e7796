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


def text_of(error: BaseException) -> str:
    """The text of a user's error on one line; that may raise, too."""
    try:
        return " ".join(str(error).split())
    except BaseException:
        return "(its text cannot be had)"


def load_function(path: str | Path, name: str, source: bytes | None = None) -> Callable[..., Any]:
    """Execute the file `path` in this process, or the `source` that it had, and return its function `name`.

    It may import its neighbours: its folder comes last on the import path, for good.

    The module is registered in `sys.modules` under a name of its own (verl does not register what it loads
    by path), so that dataclasses and pickling work in it. Raises RewardError for a missing file, a syntax
    error, an exception while the file runs, and a name that is missing or not callable.
    """
    file = Path(path).expanduser().absolute()
    if source is None:
        source = read_source(file)
    tree = _parse(file, source)
    module = _execute(file, source)
    function = getattr(module, name, None)
    if function is None:
        raise RewardError(_no_such_function(file, name, tree))
    if not callable(function):
        raise RewardError(
            f"{name!r} in reward file {file} is a {type(function).__name__}, not a function: "
            f"set reward.name to a function"
        )
    loaded: Callable[..., Any] = function
    return loaded


def read_source(path: str | Path) -> bytes:
    """The bytes of a reward file. Raises RewardError."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise RewardError(f"reward file {file} does not exist: set reward.path to a Python file")
    try:
        return file.read_bytes()
    except OSError as error:
        raise RewardError(f"reward file {file} cannot be read: {error.strerror or error}") from error


def _parse(file: Path, source: bytes) -> ast.Module:
    try:
        return ast.parse(source, filename=str(file))
    except SyntaxError as error:
        raise RewardError(f"reward file {file} has a syntax error in line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise RewardError(f"reward file {file} cannot be read as Python: {error}") from error


def _execute(file: Path, source: bytes) -> Any:
    module_name = "reward_user_" + hashlib.sha256(str(file).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None:
        raise RewardError(f"reward file {file} cannot be imported: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        exec(compile(source, str(file), "exec"), module.__dict__)  # the user's own code, which they ask to run
    except BaseException as error:
        sys.modules.pop(module_name, None)
        remedy = "install it in every worker's environment" if isinstance(error, ImportError) else "mend the file"
        raise RewardError(
            f"importing reward file {file} failed{_at_line(error, file)} with "
            f"{type(error).__name__}: {text_of(error)}; {remedy}"
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
