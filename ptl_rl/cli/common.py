"""What all commands share: arguments, how errors end a command, and a progress bar. Only here are errors put into words
of the command line."""

import contextlib
import errno
import functools
import inspect
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from typer.models import ArgumentInfo, OptionInfo

from ptl_rl.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
"""A full disk or quota, and file systems that stopped: neither bad input nor our bugs."""
PATH_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.ENOTDIR, errno.EISDIR}
"""What the file system says of a path that was given: whoever gave it can mend it."""
SHOW_TRACEBACK = "PTL_TRACEBACK"
"""Environment variable: print the traceback of an unexpected error, too."""


app = typer.Typer(
    name="ptl",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Compact a reasoning language model gradually: prune a little, recover with RL, check, repeat.",
    epilog="Exit status: 0 done, 1 a stage failed (resumable) or something unexpected, 2 bad input, 130 interrupted "
    "(resumable).",
)
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. recovery.steps=4."),
]
Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or a shipped model: 'testbed:llama'.")]


def _options(function: Callable[..., Any]) -> dict[str, str]:
    """What each parameter is called: the name that its declaration gives, else the one that typer makes of it."""
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        for part in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(part, ArgumentInfo):
                found[parameter.name] = parameter.name.upper()
            if isinstance(part, OptionInfo):
                # In ``Annotated`` an option's first name stands in ``default`` until typer reads the function.
                given = [str(name) for name in (part.default, *(part.param_decls or ())) if str(name).startswith("--")]
                found[parameter.name] = given[0] if given else f"--{parameter.name.replace('_', '-')}"
    return found


def command(name: str | None = None) -> Callable[[Function], Function]:
    """Make a function a command that ends as all do: a sentence for what a user can mend, else a kept traceback."""

    def decorate(function: Function) -> Function:
        options = _options(function)

        @functools.wraps(function)
        def ended(*arguments: Any, **named: Any) -> Any:
            try:
                return function(*arguments, **named)
            except UserError as error:
                refuse(in_options(str(error), options))
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
                    fail(f"{error.filename or 'a file'}: {error.strerror}")
                if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename:
                    refuse(f"{error.filename}: {error.strerror}; name another place, or its permissions")
                unexpected(error)

        return app.command(name)(ended)  # type: ignore[return-value]

    return decorate


def in_options(message: str, options: Mapping[str, str]) -> str:
    """An error's words for the command line: a parameter in backticks, as ``run_dir``, becomes ``--run-dir``,
    or ``RUN_DIR`` where the command takes it without a name.

    Args:
        options: parameter to option, as the command spells it.
    """
    return re.sub(r"`(\w+)`", lambda found: options.get(found[1], found[0]), message)


def refuse(message: str) -> NoReturn:
    """Say what is wrong with what was given, and end with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


def fail(message: str) -> NoReturn:
    """Say what went wrong on the way, and end with status 1."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


def unexpected(error: Exception) -> NoReturn:
    """Keep the traceback of an error that nobody foresaw, and end with status 1."""
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    if os.environ.get(SHOW_TRACEBACK):
        print(text, file=sys.stderr)
    path = Path(tempfile.gettempdir()) / f"ptl-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    where = f"shown with {SHOW_TRACEBACK}=1"
    with contextlib.suppress(OSError):
        path.write_text(f"{' '.join(sys.argv)}\n\n{text}")
        where = f"{path}; {where}"
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    fail(f"unexpected {type(error).__name__}: {reason}\n  This is not about what was given. Traceback: {where}")


@contextlib.contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end with status 130 and ``kept``, which says what is left and how to go on."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has what it starts in the background ignore the former
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        raise typer.Exit(130) from None


def make_console(width: int = 160, stderr: bool = False):
    """On a terminal as wide as that, elsewhere ``width`` columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else width, stderr=stderr, emoji=False)


@contextlib.contextmanager
def bar(console, what: str) -> Iterator[Any]:
    """A progress bar that appears with the first progress; gives the function to tell it of that."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    shown = Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), remaining, console=console)
    task = shown.add_task(what, total=None)

    def progress(done: int, total: int) -> None:
        shown.start()
        shown.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        shown.stop()
