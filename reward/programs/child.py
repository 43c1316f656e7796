"""The two processes behind `reward.programs.sandbox`: a judge that knows the tests, and a confined program.

The judge forks the program's process first and reads its request afterwards, so that no expected value was ever
in the memory of the process that runs the program. That process confines itself, executes the program and then
answers questions: it evaluates calls and returns plain data (`reward.programs.values`). The judge alone holds the
pipe to the parent. Hence nothing that a program does to itself, an early exit included, can report a success.

Requests and replies are JSON. Nothing is imported that costs time, for this starts once per program.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time

from reward.programs import limits
from reward.programs.values import Raised, decode, encode, encode_error

TYPE_CHECKING = False  # importing typing would cost a fifth of the child's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TICK_MILLISECONDS = 50
_MESSAGE_CHARS = 200
_LARGEST_REPLY = 2**24
_JUDGE_MEMORY_BYTES = 2**30
_REAP_SECONDS = 5.0


class _Ended(Exception):
    """The program's process is no longer worth asking: `timeout`, `died`, or `excess` of threads or files."""


class _Channel:
    def __init__(self, incoming: int, outgoing: int, wait: Callable[[], None] = lambda: None) -> None:
        self.incoming = incoming
        self.outgoing = outgoing
        self.wait = wait

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode("ascii")
        rest = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while rest:
                rest = rest[os.write(self.outgoing, rest) :]
        except OSError as error:
            raise _Ended("died") from error

    def receive(self) -> Any:
        length = int.from_bytes(self.read(4), "big")
        if length > _LARGEST_REPLY:
            raise _Ended("died")
        try:
            return json.loads(self.read(length))
        except (ValueError, RecursionError) as error:  # written by the program past its own channel
            raise _Ended("died") from error

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self.wait()
            piece = os.read(self.incoming, count - len(data))
            if not piece:
                raise _Ended("died")
            data += piece
        return bytes(data)


# The program's process.


def _run_program(channel: _Channel, settings: dict[str, Any]) -> None:
    os.chdir(settings["folder"])
    os.environ["TMPDIR"] = settings["folder"]
    sys.dont_write_bytecode = True
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    limits.limit_resources(
        settings["cpu_seconds"], settings["memory_bytes"], settings["file_bytes"], settings["open_files"]
    )
    channel.send(limits.confine(settings["folder"], settings["without"], settings["filters"]))
    os.dup2(null, 2)
    os.close(null)
    request = channel.receive()
    module = type(sys)("program")
    sys.modules["program"] = module
    namespace = module.__dict__
    try:
        for label in ("program", "setup"):  # model-written: this process is confined, and runs nothing else
            exec(compile(request[label], f"<{label}>", "exec"), namespace)
    except BaseException as error:  # SystemExit too: a program that stops here has not defined all it should
        channel.send({"error": _describe(error)})
        return
    channel.send({})
    while True:
        question = channel.receive()
        if "whole" in question:
            channel.send(_try_whole(question["whole"], namespace))
        else:
            channel.send([_try_call(call, namespace) for call in question["calls"]])


def _try_whole(source: str, namespace: dict[str, Any]) -> Any:
    try:  # beside the program, as confined as it is
        exec(compile(source, "<test>", "exec"), namespace)
    except BaseException as error:
        return encode_error(_describe(error))
    return True


def _try_call(source: str, namespace: dict[str, Any]) -> Any:
    try:  # a call of the program, in its confined process
        return encode(eval(compile(source, "<test>", "eval"), namespace))
    except BaseException as error:
        return encode_error(_describe(error))


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
    except BaseException:
        return type(error).__name__


# The judge.


class _Program:
    """The judge's view of the program's process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.folder = settings["folder"]
        self.most_threads = settings["threads"]
        self.most_files = settings["files"]
        self.cpu_seconds = settings["cpu_seconds"]
        self.deadline = time.monotonic() + settings["wall_seconds"]
        self.ended = False
        questions, replies = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(questions[1])
                os.close(replies[0])
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                _run_program(_Channel(questions[0], replies[1]), settings)
                status = 0
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)  # seen only as long as it is our own
            finally:
                os._exit(status)
        os.close(questions[0])
        os.close(replies[1])
        self.channel = _Channel(replies[0], questions[1], self.wait)
        self.poll = select.poll()
        self.poll.register(replies[0], select.POLLIN)

    def ask(self, question: Any) -> Any:
        self.channel.send(question)
        return self.channel.receive()

    def wait(self) -> None:
        while not self.poll.poll(_TICK_MILLISECONDS):
            if time.monotonic() > self.deadline:
                raise _Ended("timeout")
            # Neither has a limit of its own that binds root, and files have none at all.
            if self.threads() > self.most_threads or len(os.listdir(self.folder)) > self.most_files:  # noqa: PTH208
                raise _Ended("excess")

    def threads(self) -> int:
        try:
            return os.stat(f"/proc/{self.pid}/task").st_nlink - 2  # noqa: PTH116
        except OSError:  # /proc is hidden
            return 0

    def end(self, why: str) -> str:
        """Kill the process and all that may descend from it; return `why`, or `timeout` if its time was up."""
        if not self.ended:
            self.ended = True
            os.kill(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
            _reap_all()
            # The kernel kills by a count of clock ticks, which on a busy machine runs far ahead of the time used.
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if why == "died" and killed and usage.ru_utime + usage.ru_stime >= self.cpu_seconds / 4:
                return "timeout"
        return why


def _reap_all() -> None:
    """Kill what a program left behind where seccomp did not hold; as their subreaper, the judge inherits them."""
    deadline = time.monotonic() + _REAP_SECONDS
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123
                for pid in file.read().split():
                    os.kill(int(pid), signal.SIGKILL)
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except (ChildProcessError, FileNotFoundError):
            return
        except ProcessLookupError:
            continue


def _judge(program: _Program, request: dict[str, Any]) -> dict[str, Any]:
    """Return `passed` (a bool per test), `ended` and `message` (the first error)."""
    passed = [False] * len(request["tests"])
    messages: list[str] = []
    ended = "ok"
    try:
        broken = program.ask({"program": request["program"], "setup": request["setup"]}).get("error")
        if broken is not None:
            return {"passed": passed, "ended": "error", "message": str(broken)[:_MESSAGE_CHARS]}
        namespace: dict[str, Any] = {}
        # Unit tests are programs: those of the user's data are trusted, and run in this process, which has limits.
        exec(compile(request["judge_setup"], "<setup>", "exec"), namespace)
        for number, test in enumerate(request["tests"]):
            passed[number] = _passes(program, test, namespace, messages)
    except _Ended as end:
        ended = str(end)
    except AttributeError:  # a reply of another shape, written by the program past its own channel
        ended = "died"
    return {"passed": passed, "ended": ended, "message": messages[0] if messages else ""}


def _passes(program: _Program, test: dict[str, Any], namespace: dict[str, Any], messages: list[str]) -> bool:
    reply = program.ask({"whole": test["whole"]} if test["whole"] else {"calls": test["calls"]})
    try:
        if test["whole"]:
            right = decode(reply) is True
        else:
            variables = namespace | {"__value__": lambda index: decode(reply[index])}
            # The user's own unit test is trusted; what it gets of the program is plain data.
            right = bool(eval(compile(test["judge"], "<test>", "eval"), variables))
    except Raised as error:
        messages.append(str(error)[:_MESSAGE_CHARS])
        return False
    except Exception as error:
        messages.append(_describe(error))
        return False
    if not right:
        messages.append("wrong result")
    return right


def _remove(folder: str) -> None:
    try:
        for name in os.listdir(folder):  # noqa: PTH208
            os.unlink(f"{folder}/{name}")  # noqa: PTH108
        os.rmdir(folder)  # noqa: PTH106
    except OSError:
        return  # the parent removes what is left


def _answer(program: _Program, namespaces: bool, settings: dict[str, Any]) -> None:
    """Tell the parent which layers hold, then the verdict on its one request."""
    held = program.channel.receive() + (["namespaces"] if namespaces else [])
    request = json.loads(sys.stdin.buffer.read())
    needed = ["seccomp"] + ([] if {"landlock", "namespaces"} & set(held) else ["landlock or user namespaces"])
    missing = [layer for layer in needed if layer not in held]
    print(json.dumps({"token": request["token"], "held": held, "missing": missing}), flush=True)
    if not missing or settings["allow_weaker_limits"]:
        verdict = _judge(program, request)
        verdict["ended"] = program.end(verdict["ended"])
        print(json.dumps({"token": request["token"], **verdict}), flush=True)


def main() -> None:
    """Judge the one request on stdin. Settings are the first argument, for the fork comes before the request."""
    settings = json.loads(sys.argv[1])
    program = None
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        namespaces = "namespaces" not in settings["without"] and limits.enter_namespaces()
        if limits.guard_judge(settings["parent"]):
            program = _Program(settings)
            limits.limit_resources(settings["cpu_seconds"] + 5, _JUDGE_MEMORY_BYTES, 2**20, 64)
            _answer(program, namespaces, settings)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if program is not None:
            program.end("died")
        _remove(settings["folder"])
    os._exit(0)  # nothing is left to do, and the interpreter would take its time
