r"""The child process that runs math-verify for `reward.judge_pool`: questions as JSON in, one word out.

It is a script and not a `multiprocessing` target, so that it imports neither the parent's main module nor
this package. It bounds itself, because its parent may be gone by the time an answer turns out to be
`9^{9^{9^9}}`:

- CPU time and not wall time, so that a busy machine does not change a score. A Python-level timer interrupts
  ordinary code and the process lives on; for a loop inside C that never looks for signals, a second timer,
  whose signal has no handler, lets the kernel end the process. (Not RLIMIT_CPU: set from getrusage before each
  answer, it was seen to strike early in a process that had already used its CPU time many times over.)
- Address space: a huge power raises MemoryError here instead of waking the machine's OOM killer.
- A parent that disappears: end of file on its pipe, or a changed parent id for children of a forking parent,
  whose siblings keep the pipe open. (PR_SET_PDEATHSIG would fire when the *thread* that started us ends.)
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

_KILL_AFTER_SECONDS = 1.0
_TIMER_REPEAT_SECONDS = 0.5
_PARENT_POLL_SECONDS = 1.0
_IMAGINARY = re.compile(r"(?<![A-Za-z\\])([0-9}])i(?![A-Za-z])")


class _TimeUp(BaseException):
    """Not an Exception: math-verify and sympy swallow those."""


class _Timer:
    """Raise _TimeUp in the main thread once `limit_seconds` of CPU time are spent inside `running`."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self.armed = False
        signal.signal(signal.SIGPROF, self._ring)

    def _ring(self, *_: Any) -> None:
        if self.armed:
            raise _TimeUp

    @contextlib.contextmanager
    def running(self) -> Any:
        signal.setitimer(signal.ITIMER_VIRTUAL, self.limit_seconds + _KILL_AFTER_SECONDS)
        self.armed = True
        # Repeated, in case that a bare `except:` of a library swallows the first one.
        signal.setitimer(signal.ITIMER_PROF, self.limit_seconds, _TIMER_REPEAT_SECONDS)
        try:
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def _wrap(latex: str) -> str:
    r"""Put an answer where math-verify finds it: it reads a percent sign only behind the closing `$`."""
    for sign in (r"\%", "%"):
        if latex.endswith(sign):
            return f"${latex.removesuffix(sign).rstrip()}$%"
    return f"\\boxed{{{latex}}}"


def _is_equal(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, grader, parse, verify

    # LaTeX only: math-verify's plain-expression extraction would pick a number out of prose in the box. Units are
    # dropped already, and it would take the t of `3t` for one.
    normal = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
    config = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=normal),)
    spaced = [_IMAGINARY.sub(r"\1 i", text) for text in (gold, answer)]  # `2i` it takes for two and a real i
    parsed_gold, parsed_answer = (parse(_wrap(text), config, parsing_timeout=None) for text in spaced)
    theirs, grader.sympy_numeric_eq = grader.sympy_numeric_eq, _numbers_agree
    try:
        return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None, allow_set_relation_comp=True))
    finally:
        grader.sympy_numeric_eq = theirs


def _numbers_agree(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """What math-verify calls to compare two values, entries or bounds; its own calls all below 1e-15 equal, and
    all decimals below 1e-6.

    Exact values must be equal. A decimal, which may be rounded, must agree to `float_rounding` places and to four
    digits.
    """
    import sympy
    from math_verify import grader

    if isinstance(a, (sympy.MatrixBase, sympy.MatrixExpr)) or isinstance(b, (sympy.MatrixBase, sympy.MatrixExpr)):
        a, b = grader.safe_sympy_doit(a), grader.safe_sympy_doit(b)
        same_shape = isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase) and a.shape == b.shape
        return same_shape and all(
            _numbers_agree(x, y, float_rounding, numeric_precision) for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    if all(grader.is_atomic_or_pct_atomic(value, sympy.Integer) for value in (a, b)):
        return grader.get_pct_val(a, a) == grader.get_pct_val(b, b)  # 9% is 9 as well
    rounded = a.has(sympy.Float) or b.has(sympy.Float)
    a, b = (
        grader.safe_sympy_doit(value.replace(lambda e: e.is_Float, lambda e: sympy.Rational(str(e))))
        for value in (a, b)
    )
    difference = a - b
    if difference.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return bool(a == b) and not a.has(sympy.nan, sympy.zoo)
    if difference.free_symbols:
        return difference.expand() == 0
    size = _size(difference)
    if size == 0 or not rounded:
        return size == 0
    return bool(size <= 0.5 * sympy.Rational(10) ** -float_rounding and size <= max(_size(a), _size(b)) / 10**4)


def _size(value: Any) -> Any:
    """The absolute value of a number; 0 if even 200 digits do not tell it from 0 (sympy then leaves one bit)."""
    import sympy

    parts = (sympy.Abs(part) for part in value.evalf(15, maxn=200).as_real_imag())
    return max((part for part in parts if getattr(part, "_prec", 2) > 1), default=sympy.Integer(0))


def _texts_agree(gold: str, text: str) -> bool:
    """Of two whole texts, whatever math-verify takes for their answers."""
    from math_verify import parse, verify

    return bool(verify(parse(gold, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))


def _answer(timer: _Timer, gold: str, answer: str, whole_texts: bool) -> str:
    try:
        with timer.running():
            equal = _texts_agree(gold, answer) if whole_texts else _is_equal(gold, answer)
            return "equal" if equal else "different"
    except _TimeUp:
        return "timeout"
    except Exception:
        # Of any kind, as sympy raises many: verify() catches its own, and what still arrives decides nothing. A text
        # that cannot be compared is no right answer.
        return "different"


def main(descriptor: int, parent_pid: int, limit_seconds: float, memory_bytes: int) -> None:
    """Answer `[gold, answer, whole_texts]` with a word until the pipe closes. The first word, `ready`, answers none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent closes us
    threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()
    connection = Connection(descriptor)
    logging.disable(logging.CRITICAL)
    timer = _Timer(limit_seconds)
    _is_equal("1", "1+0")  # imports and compiles everything before the first clock starts
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    word = "ready"
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send_bytes(word.encode("ascii"))
            word = _answer(timer, *json.loads(connection.recv_bytes()))


if __name__ == "__main__":
    main(*json.loads(sys.argv[3]))
