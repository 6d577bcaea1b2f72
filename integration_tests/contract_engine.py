"""What a version of an engine has, read off its source."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from contract_ast import ABSENT, call_shape, definitions, describe, dotted, stored_on_self
from contract_tables import FIELDS_ELSEWHERE


@dataclass(frozen=True)
class Found:
    """A definition, the name of its module, and whether a class holds it."""

    node: ast.AST
    module: str
    in_class: bool = False


class Engine:
    """The source of one version."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.module, self._fields = cache(self.module), cache(self._fields)

    def module(self, name: str) -> ast.Module | None:
        place = self.folder.joinpath(*name.split("."))
        files = [p for p in (place.parent / f"{place.name}.py", place / "__init__.py") if p.is_file()]
        return ast.parse(files[0].read_text()) if files else None

    def find(self, name: str) -> Found | None:
        """The definition of a dotted name, through imports and base classes."""
        module, rest = name, []
        while not self.module(module):
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
            if not module:
                return None
        return self._within(Found(self.module(module), module), rest)

    def _within(self, found: Found | None, names: list[str]) -> Found | None:
        for name in names:
            found = found and self._member(found, name)
        return found

    def _member(self, found: Found, name: str) -> Found | None:
        if isinstance(found.node, ast.Module):
            return self._in_module(found, name)
        if isinstance(found.node, ast.ClassDef):
            return next(filter(None, (self._in_class(c, name) for c in self._with_bases(found))), None)
        value = getattr(found.node, "value", None)
        made_by = self._named(dotted(value.func), found.module) if isinstance(value, ast.Call) else None
        return self._member(made_by, name) if made_by else found  # an object of unknown class: taken on trust

    def _named(self, chain: str, module: str) -> Found | None:
        return self._within(Found(self.module(module), module), chain.split("."))

    def _in_module(self, found: Found, name: str) -> Found | None:
        node = definitions(found.node.body).get(name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = self._source(node, name, found.module)
            if source.split(".")[0] == self.name:
                return self.find(source)
        if node is None and self.module(f"{found.module}.{name}"):
            return self.find(f"{found.module}.{name}")
        return Found(node, found.module) if node else None

    def _source(self, node: ast.Import | ast.ImportFrom, name: str, module: str) -> str:
        """The full name of what is imported under `name`."""
        original = next(a.name for a in node.names if (a.asname or a.name).split(".")[0] == name)
        if isinstance(node, ast.Import):
            return original
        is_package = (self.folder.joinpath(*module.split(".")) / "__init__.py").is_file()
        above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
        return ".".join([*above, *filter(None, [node.module]), original])

    def _with_bases(self, found: Found) -> Iterator[Found]:
        yield found
        for base in found.node.bases:
            above = self._named(dotted(base.value if isinstance(base, ast.Subscript) else base), found.module)
            if above and isinstance(above.node, ast.ClassDef):
                yield from self._with_bases(above)

    def _in_class(self, found: Found, name: str) -> Found | None:
        node = (stored_on_self(found.node) | definitions(found.node.body)).get(name)
        if node is None and name == "__init__" and "dataclass" in " ".join(map(ast.unparse, found.node.decorator_list)):
            node = self._dataclass_init(found)
        if node is None and "__getattr__" in definitions(found.node.body):  # it may have anything
            node = ast.Pass()
        return Found(node, found.module, in_class=True) if node else None

    def _dataclass_init(self, found: Found) -> ast.FunctionDef:
        fields = {}
        for above in reversed(list(self._with_bases(found))):
            for node in above.node.body:
                if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                    value = ast.unparse(node.value) if node.value else ""
                    optional = value and (not value.startswith("field(") or "default" in value)
                    fields[node.target.id] = "=..." if optional else ""
        words = ["self", *(name + default for name, default in fields.items())]
        return ast.parse(f"def __init__({', '.join(words)}): pass").body[0]

    def members(self, name: str) -> set[str]:
        """What a class and those above it define or store in their objects."""
        found = self.find(name)
        classes = [above.node for above in self._with_bases(found)] if found else []
        return {member for node in classes for member in stored_on_self(node) | definitions(node.body)}

    def calls(self, method: str) -> str:
        """Every form in which the engine calls a method of this name, but for calls of a parent's."""
        texts = [path.read_text() for path in (self.folder / self.name).rglob("*.py")]
        nodes = [node for text in texts if f".{method}(" in text for node in ast.walk(ast.parse(text))]
        calls = [(node, dotted(node.func).split(".")) for node in nodes if isinstance(node, ast.Call)]
        shapes = {call_shape(node) for node, chain in calls if chain[-1] == method and chain[0] != "super()"}
        return f"calls {' | '.join(sorted(shapes))}" if shapes else ABSENT

    def _fields(self, folder: str) -> set[str]:
        trees = [ast.parse(path.read_text()) for path in (self.folder / folder).rglob("*.py")]
        classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
        return {name for node in classes for name in definitions(node.body)}

    def what_is(self, name: str) -> str:
        if ".*." in name:
            return self.calls(name.split(".")[-1])
        owner, _, attribute = name.rpartition(".")
        found = self.find(name)
        if found is None and owner in FIELDS_ELSEWHERE and attribute in self._fields(FIELDS_ELSEWHERE[owner]):
            return "name"
        return describe(found.node, in_class=found.in_class) if found else ABSENT
