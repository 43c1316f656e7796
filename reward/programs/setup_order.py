"""Which statements of a setup run before the program, in its process. Nothing is executed here."""

import ast
from collections.abc import Iterable, Sequence

from reward.programs.names import bound_names, changed_names, loaded_names, needed, root_name

_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}


def before_program(statements: list[ast.stmt], ours: set[int], judges: list[ast.expr]) -> tuple[list[int], set[int]]:
    """The statements that run before the program, in its process, and those of them that do not run there again.

    These are imports and what changes an imported module (`sys.stdin = io.StringIO(text)`), with the values that it
    reads. What the referee reads itself stays out: a value that it compares with, a place in a module
    (`os.environ['ANSWER'] = '7'`).
    """
    imports = {number for number in ours if isinstance(statements[number], (ast.Import, ast.ImportFrom))}
    imported = _bound(statements[number] for number in imports)
    imported -= _bound(statement for number, statement in enumerate(statements) if number not in imports)
    imported.add("__import__")
    effects = {n for n in ours if (changed := _targets(statements[n])) and {root_name(c) for c in changed} <= imported}
    origins = {
        alias.asname or alias.name: alias.name
        for node in (statements[number] for number in imports)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    values = [ast.Pass() if number in effects else statement for number, statement in enumerate(statements)]
    needs = {n: needed(values, set(), loaded_names(statements[n]) - imported) - imports for n in effects}
    effects = {
        n for n in effects if needs[n] <= ours and not any(changed_names(values[v]) & imported for v in needs[n])
    }
    kept: set[int] | None = None
    while effects and kept != set():
        rest = [ast.Pass() if number in effects else statement for number, statement in enumerate(statements)]
        read: list[ast.AST] = [*judges]
        read += [rest[number] for number in needed(rest, set(), set[str]().union(*map(loaded_names, judges)))]
        names, places = set[str]().union(*map(loaded_names, read)), _places(read, origins) | {"__dict__"}
        places |= _ENVIRONMENT if places & _ENVIRONMENT else set()
        kept = {
            number
            for number in effects
            if _bound(statements[n] for n in needs[number] | {number}) & names
            or _places(_told(statements[number]), origins) & places
        }
        effects -= kept
    once = {number for number in effects if not needs[number]}
    return sorted(imports.union(effects, *(needs[number] for number in effects))), once


def _bound(statements: Iterable[ast.AST]) -> set[str]:
    return set[str]().union(*map(bound_names, statements))


def _targets(statement: ast.stmt) -> list[ast.expr]:
    """The module's part that a statement changes, if it does nothing else: `random.seed` of `random.seed(0)`."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return [statement.value.func]
    if isinstance(statement, (ast.Assign, ast.Delete)):
        targets = statement.targets
    elif isinstance(statement, (ast.AugAssign, ast.AnnAssign)):
        targets = [statement.target]
    return targets if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in targets) else []


def _told(statement: ast.stmt) -> list[ast.expr]:
    """What may hold a value afterwards: of a call all but its own name."""
    if not isinstance(statement, ast.Expr) or not isinstance(call := statement.value, ast.Call):
        return _targets(statement)
    owner = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return [*owner, *call.args, *(keyword.value for keyword in call.keywords)]


def _places(trees: Sequence[ast.AST], origins: dict[str, str]) -> set[str]:
    """The names of parts of modules: `environ` of `os.environ['A']`, and of a name that is imported as such."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    places = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return places | {origins[node.id] for node in nodes if isinstance(node, ast.Name) and node.id in origins}
