"""Run hostile programs: shared by the tests of the code reward's processes."""

import sys
import textwrap

import pytest

from reward.programs.sandbox import Sandbox
from reward.programs.unit_tests import plan_tests

if not sys.platform.startswith("linux"):
    pytest.skip("programs are confined on Linux only", allow_module_level=True)

DEFAULT = Sandbox()
WITHOUT_LANDLOCK = Sandbox(without=("landlock",))
ONLY_NAMESPACES = Sandbox(without=("seccomp", "landlock"), allow_weaker_limits=True)
ONE = plan_tests("assert f() == 1")
ATTEMPT = """
def f():
    try:
        attempt()
    except Exception as error:
        return type(error).__name__
    return "it worked"
"""


def run(program, tests=ONE, sandbox=DEFAULT):
    try:
        return sandbox.run(textwrap.dedent(program), plan_tests(tests) if isinstance(tests, (str, list)) else tests)
    except RuntimeError as error:
        if "cannot be confined" in str(error):
            pytest.skip(str(error))
        raise


def needs(layer):
    if layer not in run("").held:
        pytest.skip(f"this kernel has no {layer} for us")


def attempt(body, sandbox=DEFAULT, setup="import ctypes, os, socket, subprocess, sys\n"):
    """Return the name of the error that `body` (of a function) meets, or "it worked"."""
    program = setup + "def attempt():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + ATTEMPT
    for name in ("PermissionError", "OSError", "BlockingIOError", "FileNotFoundError", "it worked"):
        if run(program, [f"assert f() == {name!r}"], sandbox).passed == (True,):
            return name
    return run(program, sandbox=sandbox)


def libc(number, *arguments):
    """A system call past Python's own wrappers, as the body of an attempt."""
    return f"""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall({", ".join(map(str, (number, *arguments)))}) < 0:
            raise OSError(ctypes.get_errno(), "")
    """
