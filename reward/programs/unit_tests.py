"""Split unit tests into what the program computes and what its referee knows.

A program that runs in the same interpreter as its tests can read the expected values, replace `assert` or return
an object that equals everything. So `assert f(data) == 4` is split here: the call `f(__input__(0))` goes to the
program's process, `__value__(0) == 4` to the referee's. That one knows the setup, too: it computes `data`, and gets
the result as plain data. Nothing is executed here.

Tests that cannot be split run as a whole in the program's process and its word is taken: statements other than
`assert`, calls that use a variable of a comprehension or lambda, names of the program that are not called
(`isinstance(f(1), Point)`), and comparisons of two calls (`f(1) == Point(2)`).
"""

import ast
import builtins
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reward.programs.names import bound_names, loaded_names, local_names, needed, root_name
from reward.programs.setup_order import before_program

_KEYS = {"tests", "setup", "entry"}
# Those that `site` adds are not there in the program's process.
_BUILTINS = frozenset(dir(builtins)) - {"copyright", "credits", "exit", "help", "license", "quit"}
_VALUE, _INPUT, _AFTER = "__value__", "__input__", "__after__"
# What runs text or finds code by its name: `eval(f())` would give the program a say in its own verdict.
_EVALUATORS = {
    *("eval", "exec", "compile", "__import__", "getattr", "setattr", "delattr", "globals", "locals", "vars"),
    *("breakpoint", "__builtins__", "__loader__"),
}
_EVALUATING_MODULES = {
    *("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "yaml", "importlib", "runpy"),
    *("code", "codeop", "builtins", "ctypes", "subprocess", "timeit", "pdb", "doctest"),
}
_EVALUATING_ATTRIBUTES = {
    *("__globals__", "__builtins__", "__subclasses__", "__import__", "__reduce__", "__reduce_ex__", "__code__"),
    *("__getattribute__", "__loader__", "modules", "system", "popen", "attrgetter", "methodcaller"),
}

GroundTruth = str | Sequence[str] | Mapping[str, Any]


class UnitTest(NamedTuple):
    """`calls` are expressions for the program, `judge` one over `__value__(i)`; or `whole`, statements.

    The calls read `__input__(k)`, the value of the k-th of `inputs`, which the referee computes. Where that is no plain
    data, the program computes it, after the statements `needs` of the plan's setup.
    """

    calls: tuple[str, ...] = ()
    judge: str = ""
    whole: str = ""
    inputs: tuple[str, ...] = ()
    needs: tuple[int, ...] = ()


class Plan(NamedTuple):
    """`setup` has the statements of the setup, `first` the numbers of those that run after the program, in its process.

    `judge_setup` is the part of them that needs no program. It runs in the referee's process, and there alone but for
    `before`: imports and what they are told (`random.seed(0)`), which run before the program in its process, too.
    """

    tests: tuple[UnitTest, ...]
    setup: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    first: tuple[int, ...] = ()
    judge_setup: str = ""


def plan_tests(ground_truth: GroundTruth) -> Plan:
    """Return the plan of a ground truth: JSON text, a list of tests, or asserts as plain text, one after another.

    As JSON or a mapping it holds `tests` (a list of statements), and maybe `setup` (statements that run after the
    program and before the tests) and `entry` (a name or a list of names that the program defines; needed where such
    a name is also that of a built-in function, and where a test reads several names that nothing defines). Raises
    ValueError if it is anything else, if a test is not valid Python, reads what only the program could define
    and is not said to, uses nothing of the program, or would evaluate what the program returned.
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
    statements = _parse(setup.replace("\r\n", "\n"), "the setup").body
    statements = _missing_imports([*statements, *trees], set(entry)) + statements
    program = set(entry)
    known = _BUILTINS.union(*map(bound_names, [*statements, *trees]))
    for number, tree in enumerate(trees, 1):
        program |= _names_of_program(number, tree, statements, known, set(entry))
    for statement in statements:
        program |= loaded_names(statement) - known
    first, untouched = set[int](), []
    for number, statement in enumerate(statements):
        if loaded_names(statement) & program:
            program |= bound_names(statement)
            first |= needed(statements, {number}, set())
        else:
            untouched.append(statement)
    ours = {n for n, s in enumerate(statements) if not (loaded_names(s) | bound_names(s)) & program}
    splitter = _Planner(program, statements, untouched)
    planned = []
    for number, (tree, test) in enumerate(zip(trees, tests, strict=True), 1):
        if not loaded_names(tree) & (program | splitter.given):
            raise ValueError(f"test {number} uses nothing of the program: {test[:80]!r} (name its function in 'entry')")
        planned.append(splitter.plan(number, tree))
        program |= bound_names(tree)  # statements, which run in the program's process
    before, once = before_program(statements, ours, splitter.judges)
    planned = [test._replace(needs=tuple(n for n in test.needs if n not in once)) for test in planned]
    texts = tuple(map(ast.unparse, statements))
    return Plan(
        tuple(planned),
        texts,
        before=tuple(texts[number] for number in before),
        first=tuple(sorted(first - once)),
        judge_setup="\n".join(map(ast.unparse, untouched)),
    )


def _missing_imports(trees: Sequence[ast.AST], entry: set[str]) -> list[ast.stmt]:
    """Imports of standard modules that are read (`math.isclose`) and that nothing defines: else the program would."""
    bound = set[str]().union(entry, *map(bound_names, trees))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    roots = [node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    free = [name for tree in trees for name in loaded_names(tree)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    names = set(roots).intersection(free, sys.stdlib_module_names) - bound - called
    return [ast.Import([ast.alias(name)]) for name in sorted(names)]


def _names_of_program(
    number: int, tree: ast.Module, statements: list[ast.stmt], known: frozenset[str], entry: set[str]
) -> set[str]:
    """The names of a test, and of what it needs of the setup, that only the program can define."""
    read = [statements[index] for index in needed(statements, set(), loaded_names(tree))]
    unknown = set[str]().union(*map(loaded_names, [tree, *read])) - known
    alien = sorted(unknown - entry)
    if alien and (entry or len(alien) > 1):
        raise ValueError(
            f"test {number} reads {' and '.join(alien)}, and neither Python nor the setup defines "
            f"{'it' if len(alien) == 1 else 'them'}: import or define in 'setup' what is a helper of the test, and "
            "name in 'entry' all that the program defines"
        )
    return unknown


class _Planner:
    """Plans one test after another; `given` are the names of the setup that calls of the program have got."""

    def __init__(self, program: set[str], statements: list[ast.stmt], untouched: list[ast.stmt]) -> None:
        self.program = program
        self.statements = statements
        self.untouched = untouched
        self.known = set[str]().union(*map(bound_names, untouched))
        self.given = set[str]()
        self.judges: list[ast.expr] = []

    def plan(self, number: int, tree: ast.Module) -> UnitTest:
        whole = UnitTest(whole=ast.unparse(tree), needs=self.needs(loaded_names(tree)))
        asserted = [statement.test for statement in tree.body if isinstance(statement, ast.Assert)]
        if len(asserted) < len(tree.body):
            return whole
        self.known -= self.program
        splitter = _Splitter(self.program, self.known, self.importers())
        judged = [splitter.visit(test) for test in asserted]
        judge = judged[0] if len(judged) == 1 else ast.BoolOp(ast.And(), judged)
        if splitter.uncalled or splitter.names & local_names(judge) or any(map(_compares_values_only, judged)):
            return whole
        self.refuse_evaluators(number, judge)
        self.judges.append(judge)
        self.given |= {expression for expression in splitter.inputs if expression in self.known}
        needs = self.needs(set[str]().union(*(loaded_names(ast.parse(text)) for text in splitter.inputs)))
        text = ast.unparse(_with_changes(judge, self.given))
        return UnitTest(tuple(splitter.calls), text, inputs=tuple(splitter.inputs), needs=needs)

    def needs(self, names: set[str]) -> tuple[int, ...]:
        return tuple(sorted(needed(self.statements, set(), names)))

    def importers(self) -> set[str]:
        """Names by which tests may call what evaluates: of Python, and from imports of the setup."""
        names = _EVALUATORS - self.known
        for node in (node for statement in self.untouched for node in ast.walk(statement)):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and _imports_evaluators(node):
                names |= bound_names(node)
        return names

    def refuse_evaluators(self, number: int, judge: ast.expr) -> None:
        """Raise ValueError if what the referee runs over a returned value could run that value."""
        read = [self.untouched[index] for index in needed(self.untouched, set(), loaded_names(judge))]
        for node in (node for tree in [judge, *read] for node in ast.walk(tree)):
            found = ""
            if isinstance(node, ast.Name) and node.id in _EVALUATORS - self.known:
                found = node.id
            elif isinstance(node, ast.Attribute) and node.attr in _EVALUATING_ATTRIBUTES:
                found = node.attr
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and _imports_evaluators(node):
                found = ast.unparse(node)
            if found:
                raise ValueError(
                    f"test {number} holds what the program returned against code with `{found}`, which could run it: "
                    "compare plain values, or call it on the program's own call alone, as in `eval(f(2)) == 4`"
                )


def _imports_evaluators(node: ast.Import | ast.ImportFrom) -> bool:
    names = {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        module = (node.module or "").partition(".")[0]
        return module in _EVALUATING_MODULES or bool(names & _EVALUATING_ATTRIBUTES)
    return bool({name.partition(".")[0] for name in names} & _EVALUATING_MODULES)


def _with_changes(judge: ast.expr, given: set[str]) -> ast.expr:
    """Read names of the setup as calls left them, in comparisons without a returned value.

    So `sort(a) is None and a == [1, 2]` looks at the sorted list, and `f(a) == sorted(a)` at what `a` was: a program
    that empties the list gains nothing.
    """
    if isinstance(judge, ast.BoolOp):
        return ast.BoolOp(judge.op, [_with_changes(value, given) for value in judge.values])
    if isinstance(judge, ast.UnaryOp) and isinstance(judge.op, ast.Not):
        return ast.UnaryOp(judge.op, _with_changes(judge.operand, given))
    if any(isinstance(node, ast.Name) and node.id == _VALUE for node in ast.walk(judge)):
        return judge
    changed: ast.expr = _Changed(given - local_names(judge)).visit(judge)
    return changed


class _Changed(ast.NodeTransformer):
    def __init__(self, given: set[str]) -> None:
        self.given = given

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _placeholder(_AFTER, node.id) if node.id in self.given else node


def _placeholder(function: str, argument: str | int) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), [ast.Constant(argument)], [])


def _compares_values_only(test: ast.expr) -> bool:
    if not isinstance(test, ast.Compare):
        return False
    return all(root_name(operand) == _VALUE for operand in [test.left, *test.comparators])


class _Splitter(ast.NodeTransformer):
    """Replace what starts with a name of the program (`f(x)[0].y`) by `__value__(i)`, arguments included.

    So is what evaluates a result of the program (`eval(f(x))`): it belongs into the program's process.
    """

    def __init__(self, program: set[str], known: set[str], evaluators: set[str]) -> None:
        self.program = program
        self.known = known
        self.evaluators = evaluators
        self.calls: list[str] = []
        self.inputs: list[str] = []
        self.names: set[str] = set()
        self.uncalled = False

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, ast.expr) or not (root_name(node) in self.program or self.evaluates(node)):
            return self.generic_visit(node)
        self.uncalled |= isinstance(node, ast.Name)
        self.names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        call = _Inputs(self.program, self.known, self.inputs).visit(node)
        self.calls.append(ast.unparse(call))
        # A call and not a name, so that an error in it counts only where the test would have come to it.
        return _placeholder(_VALUE, len(self.calls) - 1)

    def evaluates(self, node: ast.expr) -> bool:
        return (
            isinstance(node, ast.Call)
            and root_name(node.func) in self.evaluators
            and bool(loaded_names(node) & self.program)
        )


class _Inputs(ast.NodeTransformer):
    """Replace the largest parts of a call that read the setup and nothing of the program by `__input__(k)`."""

    def __init__(self, program: set[str], known: set[str], inputs: list[str]) -> None:
        self.program = program
        self.known = known
        self.inputs = inputs
        self.local = set[str]()
        self.repeated = False

    def visit(self, node: ast.AST) -> Any:
        names = loaded_names(node) if isinstance(node, ast.expr) else set()
        parts = (ast.Starred, ast.Slice, ast.FormattedValue)
        # In a loop or a lambda, `next(it)` is another value each time.
        called = self.repeated and any(isinstance(part, ast.Call) for part in ast.walk(node))
        if isinstance(node, parts) or called or not names & self.known or names & (self.program | self.local):
            return self.visit_parts(node)
        text = ast.unparse(node)
        # A name is one value, which calls may change. Anything else may be another one each time: `next(it)`.
        if not isinstance(node, ast.Name) or text not in self.inputs:
            self.inputs.append(text)
            return _placeholder(_INPUT, len(self.inputs) - 1)
        return _placeholder(_INPUT, self.inputs.index(text))

    def visit_parts(self, node: ast.AST) -> ast.AST:
        """Visit them in the order in which they are evaluated."""
        if isinstance(node, ast.Dict):
            for index, key in enumerate(node.keys):
                node.keys[index] = key and self.visit(key)
                node.values[index] = self.visit(node.values[index])
            return node
        loops = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        if isinstance(node, loops):  # once, and outside of the loop
            node.generators[0].iter = self.visit(node.generators[0].iter)
        outer = self.local, self.repeated
        if isinstance(node, (ast.Lambda, *loops)):
            self.local, self.repeated = self.local | local_names(node), True
        visited = self.generic_visit(node)
        self.local, self.repeated = outer
        return visited
