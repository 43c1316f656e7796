"""What a piece of Python code reads, binds and changes, by its syntax tree. Nothing is executed here."""

import ast


def loaded_names(tree: ast.AST) -> set[str]:
    """Return the names that a piece of code reads, without those of its own comprehensions and functions."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    added = [node.target for node in nodes if isinstance(node, ast.AugAssign)]
    names |= {target.id for target in added if isinstance(target, ast.Name)}
    return names - local_names(tree)


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


def local_names(tree: ast.AST) -> set[str]:
    """Names of comprehensions, lambdas, functions' arguments and `except ... as`."""
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    local |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    for node in ast.walk(tree):
        if isinstance(node, (ast.comprehension, ast.NamedExpr)):
            local |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    return local


def changed_names(statement: ast.stmt) -> set[str]:
    """Names whose values a statement may change in place: `root.next = x`, `heapify(heap)`, `items.append(1)`."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return set()
    changed = set[str]()
    for node in ast.walk(statement):
        if isinstance(node, ast.Expr):
            changed |= loaded_names(node.value)
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            changed.add(root_name(node) or "")
    return changed


def root_name(node: ast.expr) -> str | None:
    """The name that an expression starts with: `f` of `f(x)[0].y`; None if it starts with something else."""
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def needed(statements: list[ast.stmt], wanted: set[int], names: set[str]) -> set[int]:
    """The statements that define `names` or change their values, with those that they need in turn."""
    wanted = set(wanted)
    names = names.union(*(loaded_names(statements[index]) for index in wanted))
    grown = True
    while grown:
        more = {i for i, s in enumerate(statements) if i not in wanted and (bound_names(s) | changed_names(s)) & names}
        wanted |= more
        names = names.union(*(loaded_names(statements[index]) for index in more))
        grown = bool(more)
    return wanted
