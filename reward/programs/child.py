"""The three processes behind `reward.programs.sandbox`: a judge, a confined program, and a referee as confined.

The judge forks the other two first and reads its request afterwards, so that no expected value was ever in the memory
of the process that runs the program. That process executes the program and then answers questions: it evaluates
calls and returns plain data (`reward.programs.values`). The referee knows the setup and the expected values, and holds
them against that data. The judge evaluates nothing and unpacks no value: it carries messages from one to the other,
watches both, and alone holds the pipe to the parent. Hence nothing that a program does to itself, an early exit
included, can report a success, and nothing that a test does to a returned value happens outside a confined process.

Requests and replies are JSON. Nothing is imported that costs time, for this starts once per program.
"""

from __future__ import annotations

import collections
import json
import os
import select
import signal
import sys
import time

from reward.programs import limits
from reward.programs.values import Raised, decode, encode, encode_error, encode_plain

TYPE_CHECKING = False  # importing typing would cost a fifth of the child's start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TICK_MILLISECONDS = 50
_MESSAGE_CHARS = 200
_LARGEST_MESSAGE = 2**23
# What the judge itself reads of the program.
_LARGEST_REPORT = 2**12
_JUDGE_MEMORY_BYTES = 2**30
_REAP_SECONDS = 5.0
# The judge starts with no more than its standard ones.
_MOST_DESCRIPTORS = 256
_CHANGEABLE = (list, dict, set, bytearray, collections.deque)


class _Ended(Exception):
    """The program's process is no longer worth asking: `timeout`, `died`, or `excess` of threads or files."""


class _Channel:
    """Messages behind their length. `wait` returns once one may go on, or raises; without it, reading just blocks."""

    def __init__(self, incoming: int, outgoing: int, wait: Callable[[int, int], None] | None = None) -> None:
        self.incoming = incoming
        self.outgoing = outgoing
        self.wait = wait
        if wait is not None:
            os.set_blocking(incoming, False)
            os.set_blocking(outgoing, False)

    def send(self, message: Any, raw: bytes = b"") -> None:
        data = json.dumps(message).encode("ascii")
        self.write(len(data).to_bytes(4, "big") + data + raw)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                if self.wait is not None:
                    self.wait(self.outgoing, select.POLLOUT)
                rest = rest[os.write(self.outgoing, rest) :]
        except BlockingIOError:  # less room than was said
            self.write(bytes(rest))
        except OSError as error:
            raise _Ended("died") from error

    def receive(self, largest: int = _LARGEST_MESSAGE) -> Any:
        try:
            return json.loads(self.receive_raw(largest)[4:])
        except (ValueError, RecursionError) as error:  # written by the program past its own channel
            raise _Ended("died") from error

    def receive_raw(self, largest: int = _LARGEST_MESSAGE) -> bytes:
        """A message as it came, its length included."""
        head = self.read(4)
        length = int.from_bytes(head, "big")
        if length > largest:
            raise _Ended("died")
        return head + self.read(length)

    def read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            if self.wait is not None:
                self.wait(self.incoming, select.POLLIN)
            piece = os.read(self.incoming, count - len(data))
            if not piece:
                raise _Ended("died")
            data += piece
        return bytes(data)


# Both confined processes.


def _confine(channel: _Channel, settings: dict[str, Any]) -> None:
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
    if null > 2:
        os.close(null)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
    except BaseException:
        return type(error).__name__


# The program's process.


def _run_program(channel: _Channel) -> None:
    module = type(sys)("program")
    sys.modules["program"] = module
    namespace = module.__dict__
    done: set[int] = set()
    for source in channel.receive()["before"]:
        try:
            exec(compile(source, "<setup>", "exec"), namespace)
        except BaseException:  # what fails fails in the referee's process, too, and is said there
            continue
    request = channel.receive()
    try:  # model-written: this process is confined, and runs nothing else
        exec(compile(request["program"], "<program>", "exec"), namespace)
        _set_up(request["setup"], namespace, done)
    except BaseException as error:  # SystemExit too: a program that stops here has not defined all it should
        channel.send({"error": _describe(error)})
        return
    channel.send({})
    while True:
        question = channel.receive()
        try:
            _set_up(question["setup"], namespace, done)
            answer = _try_calls(question, namespace)
        except BaseException as error:
            answer = {"error": _describe(error)}
        channel.send(answer)


def _set_up(statements: list[list[Any]], namespace: dict[str, Any], done: set[int]) -> None:
    """Run the statements of the setup that are new to this process, for their values live on."""
    for number, source in statements:
        if number not in done:
            done.add(number)
            exec(compile(source, "<setup>", "exec"), namespace)


def _try_calls(question: dict[str, Any], namespace: dict[str, Any]) -> Any:
    if question["whole"]:  # beside the program, as confined as it is
        exec(compile(question["whole"], "<test>", "exec"), namespace)
        return {"values": [True], "after": []}
    inputs = tuple(
        decode(encoded) if plain else eval(compile(encoded, "<test>", "eval"), namespace)
        for plain, encoded in question["inputs"]
    )
    values = [_try_call(call, namespace, inputs) for call in question["calls"]]
    after = [_try_encode(value) if question["inputs"][i][0] else None for i, value in enumerate(inputs)]
    return {"values": values, "after": after}


def _try_call(source: str, namespace: dict[str, Any], inputs: tuple[Any, ...]) -> Any:
    try:  # a call of the program, in its confined process
        if not inputs:
            return encode(eval(compile(source, "<test>", "eval"), namespace))
        # An argument and no global, for the program's globals are its own; and lambdas inside see it.
        call = eval(compile(f"lambda __input__: {source}", "<test>", "eval"), namespace)
        return encode(call(inputs.__getitem__))
    except BaseException as error:
        return encode_error(_describe(error))


def _try_encode(value: Any) -> Any:
    try:
        return encode(value)
    except BaseException:
        return None


# The referee's process.


def _referee(channel: _Channel) -> None:
    namespace: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    try:  # unit tests are programs, too
        exec(compile(channel.receive()["setup"], "<setup>", "exec"), namespace)
    except BaseException as error:
        channel.send({"error": _describe(error)})
        return
    channel.send({})
    while True:
        question = channel.receive()
        if "inputs" in question:
            channel.send([_input(source, namespace | changed) for source in question["inputs"]])
        else:
            reply = channel.receive()
            channel.send(_verdict(question, reply, namespace, changed))


def _input(source: str, namespace: dict[str, Any]) -> Any:
    """The value of a part of a call as [True, data], or its source, if the program has to make it."""
    try:
        return [True, encode_plain(eval(compile(source, "<test>", "eval"), namespace))]
    except BaseException:
        return [False, source]


def _verdict(question: dict[str, Any], reply: Any, namespace: dict[str, Any], changed: dict[str, Any]) -> Any:
    def value(index: int) -> Any:
        return decode(reply["values"][index])

    def after(name: str) -> Any:
        return (namespace | changed)[name]

    try:
        if "error" in reply:
            return [False, str(reply["error"])]
        for name, data in zip(question["names"], reply["after"], strict=True):
            if name in namespace and data is not None:
                changed[name] = _left(after(name), decode(data))
        variables = namespace | {"__value__": value, "__after__": after}
        right = bool(eval(compile(question["judge"], "<test>", "eval"), variables))
        return [right, "" if right else "wrong result"]
    except Raised as error:
        return [False, str(error)]
    except BaseException as error:
        return [False, _describe(error)]


def _left(own: Any, theirs: Any) -> Any:
    """What calls can have left of a value: the program may report anything, and only containers change in place."""
    if type(own) is not type(theirs):
        return own
    if type(own) is tuple and len(own) == len(theirs):
        return tuple(map(_left, own, theirs))
    return theirs if type(own) in _CHANGEABLE else own


# The judge.


class _Watched:
    """The judge's view of a confined process. All of its time ends at one moment, `deadline`."""

    def __init__(self, settings: dict[str, Any], serve: Callable[[_Channel], None], deadline: float) -> None:
        self.folder = settings["folder"]
        self.most_threads = settings["threads"]
        self.most_files = settings["files"]
        self.cpu_seconds = settings["cpu_seconds"]
        self.deadline = deadline
        self.next_look = 0.0
        self.ended = False
        questions, replies = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _close_all_but(questions[0], replies[1])
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                channel = _Channel(questions[0], replies[1])
                _confine(channel, settings)
                serve(channel)
                status = 0
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)  # seen only as long as it is our own
            finally:
                os._exit(status)
        os.close(questions[0])
        os.close(replies[1])
        self.channel = _Channel(replies[0], questions[1], self.wait)

    def ask(self, question: Any) -> Any:
        self.channel.send(question)
        return self.channel.receive()

    def wait(self, descriptor: int, event: int) -> None:
        """Return once `descriptor` is ready. A process that drips bytes is never waited for longer than another."""
        poll = select.poll()
        poll.register(descriptor, event)
        while True:
            ready = poll.poll(_TICK_MILLISECONDS)
            now = time.monotonic()
            if now > self.deadline:
                raise _Ended("timeout")
            if now > self.next_look:
                self.next_look = now + _TICK_MILLISECONDS / 1000
                # Neither has a limit of its own that binds root, and files have none at all.
                if self.threads() > self.most_threads or len(os.listdir(self.folder)) > self.most_files:  # noqa: PTH208
                    raise _Ended("excess")
            if ready:
                return

    def threads(self) -> int:
        try:
            return os.stat(f"/proc/{self.pid}/task").st_nlink - 2  # noqa: PTH116
        except OSError:  # /proc is hidden
            return 0

    def end(self, why: str) -> str:
        """Kill the process; return `why`, or `timeout` if it died because its time was up."""
        if not self.ended:
            self.ended = True
            os.kill(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
            # The kernel kills by a count of clock ticks, which on a busy machine runs far ahead of the time used.
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if why == "died" and killed and usage.ru_utime + usage.ru_stime >= self.cpu_seconds / 4:
                return "timeout"
        return why


def _close_all_but(*kept: int) -> None:
    """Leave neither the judge's pipes nor those of the other process to one that it forks."""
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, _MOST_DESCRIPTORS)


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


class _Judge:
    """Both processes, and the verdict on one request."""

    def __init__(self, settings: dict[str, Any]) -> None:
        deadline = time.monotonic() + settings["wall_seconds"]
        # The first child is process 1 of its namespace, and takes the others with it when it ends.
        self.referee = _Watched(settings, _referee, deadline)
        try:
            self.program = _Watched(settings, _run_program, deadline)
        except BaseException:
            self.referee.end("died")
            raise

    def held(self) -> list[str]:
        """The layers that confine both."""
        theirs = self.program.channel.receive(_LARGEST_REPORT)
        return [layer for layer in self.referee.channel.receive() if layer in theirs]

    def end(self, why: str) -> str:
        """Kill both and all that may descend from them; say how the program ended, as far as it is to be blamed."""
        why = self.program.end(why)
        why = self.referee.end(why)
        _reap_all()
        return why

    def judge(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return `passed` (a bool per test), `ended` and `message` (the first error)."""
        passed = [False] * len(request["tests"])
        messages: list[str] = []
        verdict = {"passed": passed, "ended": "ok", "message": ""}
        try:
            self.program.channel.send({"before": request["before"]})  # meanwhile, the referee does the same and more
            broken = self.referee.ask({"setup": request["judge_setup"]}).get("error")
            if broken is not None:
                return verdict | {"ended": "setup", "message": str(broken)[:_MESSAGE_CHARS]}
            setup = [[number, request["setup"][number]] for number in request["first"]]
            self.program.channel.send({"program": request["program"], "setup": setup})
            broken = self.program.channel.receive(_LARGEST_REPORT).get("error")
            if broken is not None:
                return verdict | {"ended": "error", "message": str(broken)[:_MESSAGE_CHARS]}
            for number, test in enumerate(request["tests"]):
                passed[number] = self.passes(test, request["setup"], messages)
        except _Ended as end:
            verdict["ended"] = str(end)
        except (AttributeError, TypeError, ValueError):  # a reply of another shape, written past its own channel
            verdict["ended"] = "died"
        return verdict | {"message": messages[0] if messages else ""}

    def passes(self, test: dict[str, Any], setup: list[str], messages: list[str]) -> bool:
        """Carry one test's inputs, calls and results between the two."""
        inputs = self.referee.ask({"inputs": test["inputs"]}) if test["inputs"] else []
        whole = test["whole"]
        needs = test["needs"] if whole or not all(plain for plain, _ in inputs) else []
        question = {"whole": whole, "calls": test["calls"], "inputs": inputs}
        self.program.channel.send(question | {"setup": [[number, setup[number]] for number in needs]})
        # Carried and not read: it is the program's.
        reply = self.program.channel.receive_raw()
        judge = "__value__(0) is True" if whole else test["judge"]
        self.referee.channel.send({"judge": judge, "names": test["inputs"]}, reply)
        right, message = self.referee.channel.receive()
        if right is not True:
            messages.append(str(message)[:_MESSAGE_CHARS])
        return right is True


def _remove(folder: str) -> None:
    try:
        for name in os.listdir(folder):  # noqa: PTH208
            os.unlink(f"{folder}/{name}")  # noqa: PTH108
        os.rmdir(folder)  # noqa: PTH106
    except OSError:
        return  # the parent removes what is left


def _answer(judge: _Judge, namespaces: bool, settings: dict[str, Any]) -> None:
    """Tell the parent which layers hold, then the verdict on its one request."""
    held = judge.held() + (["namespaces"] if namespaces else [])
    request = json.loads(sys.stdin.buffer.read())
    needed = ["seccomp"] + ([] if {"landlock", "namespaces"} & set(held) else ["landlock or user namespaces"])
    missing = [layer for layer in needed if layer not in held]
    print(json.dumps({"token": request["token"], "held": held, "missing": missing}), flush=True)
    if not missing or settings["allow_weaker_limits"]:
        verdict = judge.judge(request)
        verdict["ended"] = judge.end(verdict["ended"])
        print(json.dumps({"token": request["token"], **verdict}), flush=True)


def main() -> None:
    """Judge the one request on stdin. Settings are the first argument, for the forks come before the request."""
    settings = json.loads(sys.argv[1])
    judge = None
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        namespaces = "namespaces" not in settings["without"] and limits.enter_namespaces()
        if limits.guard_judge(settings["parent"]):
            judge = _Judge(settings)
            limits.limit_resources(settings["cpu_seconds"] + 5, _JUDGE_MEMORY_BYTES, 2**20, 64)
            _answer(judge, namespaces, settings)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if judge is not None:
            judge.end("died")
        _remove(settings["folder"])
    os._exit(0)  # nothing is left to do, and the interpreter would take its time
