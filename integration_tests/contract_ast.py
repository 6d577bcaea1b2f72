"""What record_contract.py needs to read Python without running it."""

import ast
import copy
from collections.abc import Iterable

ABSENT = "absent"


def dotted(node: ast.AST) -> str:
    """`a.b().c` of a chain of attributes and calls; "" stands for anything else in it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        return f"{dotted(node.func)}()"
    return node.id if isinstance(node, ast.Name) else ""


def parameters(arguments: ast.arguments) -> str:
    """`(self, x, *, y=...)`: without annotations, every default alike."""
    arguments = copy.deepcopy(arguments)
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(...) for default in arguments.kw_defaults]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments)})"


def call_shape(call: ast.Call, but: Iterable[str] = ()) -> str:
    """`(_, _, y=_)` of a call, without the keywords in `but`."""
    words = ["*_" if isinstance(argument, ast.Starred) else "_" for argument in call.args]
    words += [f"{keyword.arg}=_" if keyword.arg else "**_" for keyword in call.keywords if keyword.arg not in but]
    return f"({', '.join(words)})"


def describe(node: ast.AST | None, *, in_class: bool) -> str:
    """What the contract says of a definition."""
    if isinstance(node, ast.ClassDef):
        return f"class {', '.join(map(ast.unparse, node.bases))}".strip()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        marks = {dotted(mark).split(".")[-1] for mark in node.decorator_list}
        if marks & {"property", "cached_property"}:
            return "property"
        kind = "method" if in_class else "function"
        return f"{next(iter(marks & {'classmethod', 'staticmethod'}), kind)} {parameters(node.args)}"
    return ABSENT if node is None else "module" if isinstance(node, ast.Module) else "name"


def definitions(body: list[ast.stmt]) -> dict[str, ast.AST]:
    """What statements define, also under `if`, `try` and `with`; a name from an import is its statement."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            stored = [n.id for n in names if isinstance(n.ctx, ast.Store)]
            made_over = {n for n in stored if isinstance(found.get(n), ast.ClassDef)}  # the class says more
            found |= dict.fromkeys(set(stored) - made_over, node)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            parts = [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
            parts += [handler.body for handler in getattr(node, "handlers", [])]
            for part in reversed(parts):  # an except branch gives way to what it stands in for
                found |= definitions(part)
    return found


def stored_on_self(node: ast.ClassDef) -> dict[str, ast.AST]:
    """By assignment, or as vLLM stores a weight: `replace_parameter(self, "name", ...)`."""
    attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and dotted(n.func) == "replace_parameter"]
    weights = {n.args[1].value: n for n in calls if dotted(n.args[0]) == "self" and isinstance(n.args[1], ast.Constant)}
    return weights | {n.attr: n for n in attributes if dotted(n.value) == "self"}
