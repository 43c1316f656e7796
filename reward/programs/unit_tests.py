"""Split unit tests into what the program computes and what its judge knows.

A program that runs in the same interpreter as its tests can read the expected values, replace `assert` or return
an object that equals everything. So `assert f(2) == 4` is split here: the call `f(2)` goes to the program's
process, `__value__(0) == 4` to the judge's, which gets the result as plain data. Nothing is executed here.

Tests that cannot be split run as a whole in the program's process and its word is taken: statements other than
`assert`, calls that use a variable of a comprehension or lambda, names of the program that are not called
(`isinstance(f(1), Point)`), and comparisons of two calls (`f(1) == Point(2)`).
"""

import ast
import builtins
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_KEYS = {"tests", "setup", "entry"}
_BUILTINS = frozenset(dir(builtins))
_VALUE = "__value__"

GroundTruth = str | Sequence[str] | Mapping[str, Any]


class UnitTest(NamedTuple):
    """`calls` are expressions for the program, `judge` one over `__value__(i)`; or `whole`, statements."""

    calls: tuple[str, ...] = ()
    judge: str = ""
    whole: str = ""


class Plan(NamedTuple):
    """`setup` runs after the program in its process, `judge_setup` is the part of it that needs no program."""

    tests: tuple[UnitTest, ...]
    setup: str = ""
    judge_setup: str = ""


def plan_tests(ground_truth: GroundTruth) -> Plan:
    """Return the plan of a ground truth: JSON text, a list of tests, or asserts as plain text, one after another.

    As JSON or a mapping it holds `tests` (a list of statements), and maybe `setup` (statements that run after the
    program and before the tests) and `entry` (a name or a list of names that the program defines; needed only
    where such a name is also that of a built-in function). Raises ValueError if it is anything else, if a test is
    not valid Python, and if a test uses nothing of the program, for it would always be paid or never.
    """
    if isinstance(ground_truth, str):
        return _plan_of_text(ground_truth)
    return _plan(*_fields(ground_truth))


@functools.lru_cache(maxsize=4096)
def _plan_of_text(text: str) -> Plan:
    stripped = text.strip()
    if not stripped.startswith(("{", "[")):
        return _plan(*_from_statements(stripped))
    try:
        content = json.loads(stripped)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"the ground truth {stripped[:60]!r} is not valid JSON ({error}): store it as JSON text, with double quotes"
        ) from None
    return _plan(*_fields(content))


def _from_statements(text: str) -> tuple[list[str], str, list[str]]:
    body = _parse(text, "the ground truth").body
    tests = [statement for statement in body if isinstance(statement, ast.Assert)]
    setup = [statement for statement in body if not isinstance(statement, ast.Assert)]
    if not tests:
        raise ValueError(f"the ground truth {text[:60]!r} holds no assert")
    late = [statement.lineno for statement in setup if statement.lineno > tests[0].lineno]
    if late:
        raise ValueError(f"line {late[0]} of the ground truth is no assert but follows one: write it as JSON instead")
    return [ast.unparse(test) for test in tests], "\n".join(map(ast.unparse, setup)), []


def _fields(content: Any) -> tuple[list[str], str, list[str]]:
    if isinstance(content, Mapping):
        unknown = sorted(set(content) - _KEYS)
        if unknown or "tests" not in content:
            problem = f"has unknown keys {unknown}" if unknown else "has no 'tests'"
            raise ValueError(f"the ground truth {problem}: it may hold tests, setup and entry")
        tests, setup, entry = content["tests"], content.get("setup") or "", content.get("entry") or []
    else:
        tests, setup, entry = content, "", []
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(t, str) and t.strip() for t in tests):
        raise ValueError(f"the tests of the ground truth must be a list of statements, not {str(tests)[:60]!r}")
    if not isinstance(setup, str):
        raise ValueError(f"the setup of the ground truth must be text, not {str(setup)[:60]!r}")
    names = [entry] if isinstance(entry, str) else entry
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ValueError(f"the entry of the ground truth must be a name or a list of names, not {str(entry)[:60]!r}")
    return list(tests), setup, list(names)


def _parse(source: str, what: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{what} is not valid Python ({error}): {source[:80]!r}") from None


def _plan(tests: list[str], setup: str, entry: list[str]) -> Plan:
    trees = [_parse(test.strip(), f"test {number}") for number, test in enumerate(tests, 1)]
    setup = setup.replace("\r\n", "\n")
    statements = _parse(setup, "the setup").body
    loaded = set[str]().union(*map(loaded_names, [*trees, *statements]))
    bound = set[str]().union(*map(bound_names, statements))
    # What neither Python nor the setup defines can only come from the program.
    program = set(entry) | (loaded - bound - _BUILTINS)
    untouched = []
    for statement in statements:
        if loaded_names(statement) & program:
            program |= bound_names(statement)
        else:
            untouched.append(ast.unparse(statement))
    for number, (tree, test) in enumerate(zip(trees, tests, strict=True), 1):
        if not loaded_names(tree) & program:
            raise ValueError(f"test {number} uses nothing of the program: {test[:80]!r} (name its function in 'entry')")
    return Plan(tuple(_split(tree, program) for tree in trees), setup, "\n".join(untouched))


def loaded_names(tree: ast.AST) -> set[str]:
    """Return the names that a piece of code reads, without those of its own comprehensions and functions."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return names - _local(tree)


def _local(tree: ast.AST) -> set[str]:
    """Names of comprehensions, lambdas, functions' arguments and `except ... as`."""
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    for node in ast.walk(tree):
        if isinstance(node, (ast.comprehension, ast.NamedExpr)):
            local |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    return local


def bound_names(statement: ast.AST) -> set[str]:
    """Return the names that a statement assigns, defines or imports, at any depth."""
    bound = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return bound


def _split(tree: ast.Module, program: set[str]) -> UnitTest:
    whole = UnitTest(whole=ast.unparse(tree))
    asserted = [statement.test for statement in tree.body if isinstance(statement, ast.Assert)]
    if len(asserted) < len(tree.body):
        return whole
    splitter = _Splitter(program)
    judged = [splitter.visit(test) for test in asserted]
    judge = judged[0] if len(judged) == 1 else ast.BoolOp(ast.And(), judged)
    if splitter.uncalled or splitter.names & _local(judge) or any(map(_compares_values_only, judged)):
        return whole
    return UnitTest(tuple(splitter.calls), ast.unparse(judge))


def _compares_values_only(test: ast.expr) -> bool:
    if not isinstance(test, ast.Compare):
        return False
    return all(_root(operand) == _VALUE for operand in [test.left, *test.comparators])


class _Splitter(ast.NodeTransformer):
    """Replace what starts with a name of the program (`f(x)[0].y`) by `__value__(i)`, arguments included."""

    def __init__(self, program: set[str]) -> None:
        self.program = program
        self.calls: list[str] = []
        self.names: set[str] = set()
        self.uncalled = False

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, ast.expr) or _root(node) not in self.program:
            return self.generic_visit(node)
        self.uncalled |= isinstance(node, ast.Name)
        self.names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        self.calls.append(ast.unparse(node))
        # A call and not a name, so that an error in it counts only where the test would have come to it.
        return ast.Call(ast.Name(_VALUE, ast.Load()), [ast.Constant(len(self.calls) - 1)], [])


def _root(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
