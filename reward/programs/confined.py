"""What the two confined processes do: one runs the program and its calls, the other, the referee, judges results."""

from __future__ import annotations

import collections
import os
import sys

from reward.programs import limits
from reward.programs.channel import Channel
from reward.programs.values import Raised, decode, encode, encode_error, encode_plain

TYPE_CHECKING = False  # importing typing would cost a fifth of the child's start
if TYPE_CHECKING:
    from typing import Any

MESSAGE_CHARS = 200
_CHANGEABLE = (list, dict, set, bytearray, collections.deque)

# Both confined processes.


def confine_process(channel: Channel, settings: dict[str, Any]) -> None:
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
        return f"{type(error).__name__}: {error}"[:MESSAGE_CHARS]
    except BaseException:
        return type(error).__name__


# The program's process.


def run_program(channel: Channel) -> None:
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


def referee(channel: Channel) -> None:
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
