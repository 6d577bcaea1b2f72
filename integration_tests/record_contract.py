"""Record what each version of vLLM and SGLang has of everything that our adapters use of it.

    python integration_tests/record_contract.py [--wheels FOLDER] [--engine vllm] [--version 0.33.0]

What we use is read off the adapters' source: imports, attributes, calls, and methods that ours override. By hand there
are only the tables of contract_tables.py. What a version has is read off the source in its wheel; no engine is imported
or installed. `test_contract.py` compares the two.
"""

import argparse
import ast
import copy
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

from contract_tables import BY_CALLS, BY_NAME, FIELDS_ELSEWHERE, OBJECTS, STAND_INS

ROOT = Path(__file__).parents[1]
CONTRACT = Path(__file__).with_name("contract.json")
VERSIONS = {
    "vllm": ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"),
    "sglang": tuple(f"0.5.{patch}" for patch in range(13, 24)),
}
ABSENT, UNRECORDED = "absent", "unrecorded"


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
    attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return {n.attr: n for n in attributes if dotted(n.value) == "self"}


# What we use.


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of an engine at one place of our source.

    optional: a version may lack it.  either: shared by imports of which any version must have one.
    override: our definition in place of the engine's.  call: how we call it.
    """

    name: str
    place: str
    optional: bool = False
    either: str = ""
    override: str = ""
    call: str = ""


class _Reader(ast.NodeVisitor):
    """Collects the uses of one engine in one file."""

    def __init__(self, source: str, engine: str, path: str):
        self.engine, self.path, self.uses = engine, path, []
        self.scopes, self.tried, self.either = list(Path(path).with_suffix("").parts), False, ""
        self.bases, self.own = [], set()
        nodes = list(ast.walk(ast.parse(source)))
        self.imported = dict(pair for node in nodes for pair in self.imports(node))
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        self.visit(nodes[0])

    def use(self, name: str, node: ast.AST, *, optional: bool = False, **facts) -> None:
        """What is tried, and what stands in compat.py, deals with versions that lack it."""
        optional = optional or self.tried or self.path.endswith("compat.py")
        self.uses.append(Use(name=name, place=f"{self.path}:{node.lineno}", optional=optional, **facts))

    def imports(self, node: ast.AST) -> list[tuple[str, str]]:
        """Local and full names of what a statement imports from the engine."""
        pairs = []
        if isinstance(node, ast.ImportFrom):
            pairs = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            pairs = [(alias.asname or alias.name, alias.name) for alias in node.names]
        return [pair for pair in pairs if pair[1].split(".")[0] == self.engine]

    def bases_of(self, node: ast.ClassDef) -> list[str]:
        names = [dotted(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases]
        stand_in = STAND_INS.get(node.name, "")
        return [self.imported[name] for name in names if name in self.imported] + [stand_in] * bool(stand_in)

    def engine_names(self, node: ast.AST) -> list[str]:
        """Names in the engine that a name or attribute of ours may stand for."""
        chain = dotted(node)
        root, _, rest = chain.partition(".")
        if not isinstance(node, ast.Attribute):
            return [self.imported[chain]] if chain in self.imported else []
        if root in self.imported and "()" not in chain:
            return [f"{self.imported[root]}.{rest}"]
        owner = chain.split(".")[-2]
        if owner == "super()" or (owner == root and owner in ("self", "cls") and node.attr not in self.own):
            return [f"{base}.{node.attr}" for base in self.bases]
        for place in (*(f"{scope}.{owner}" for scope in reversed(self.scopes)), owner):
            types = [name for name, places in OBJECTS.items() if place in places.split()]
            types = [name for name in types if name.split(".")[0] == self.engine]
            if types:
                return [f"{name}.{node.attr}" for name in types]
        return []

    def visit_Import(self, node):
        for _, name in self.imports(node):
            self.use(name, node, either=self.either)

    visit_ImportFrom = visit_Import

    def visit_Try(self, node):
        outer, caught = (self.tried, self.either), " ".join(ast.unparse(h.type) for h in node.handlers if h.type)
        if "ImportError" in caught or "ModuleNotFoundError" in caught:
            self.tried = True
            if any(self.imports(inner) for handler in node.handlers for inner in ast.walk(handler)):
                self.either = f"{self.path}:{node.lineno}"
        self.generic_visit(node)
        self.tried, self.either = outer

    def visit_FunctionDef(self, node):
        self.scopes.append(node.name)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node):
        members = definitions(node.body)
        self.own, self.bases = members.keys() | stored_on_self(node).keys(), self.bases_of(node)
        for base in self.bases:
            for name, member in members.items():
                self.override(f"{base}.{name}", member)
        self.generic_visit(node)
        self.own, self.bases = set(), []

    def override(self, name: str, ours: ast.AST) -> None:
        method = name.split(".")[-1]
        by_calls = method in BY_CALLS
        name = f"{self.engine}.*.{method}" if by_calls else name
        self.use(name, ours, optional=not by_calls, override=describe(ours, in_class=True))

    def visit_Assign(self, node):
        """A function of ours that is put in place of a method of the engine's."""
        if isinstance(node.value, ast.Name) and node.value.id in self.functions:
            for name in (name for target in node.targets for name in self.engine_names(target)):
                self.override(name, self.functions[node.value.id])
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load) and node.attr not in ("__dict__", "__init__"):
            for name in self.engine_names(node):
                self.use(name, node)
        self.generic_visit(node)

    def visit_Call(self, node):
        called, own = dotted(node.func), ()
        names = self.engine_names(node.func)
        if called in self.classes:
            names, own = self.bases_of(self.classes[called]), definitions(self.classes[called].body)
        elif called in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
            read = ast.copy_location(ast.Attribute(node.args[0], node.args[1].value, ast.Load()), node)
            for name in self.engine_names(read):
                self.use(name, node, optional=called == "hasattr" or len(node.args) > 2)
        for name in names:
            constructor = ".__init__" * name.split(".")[-1][:1].isupper()
            self.use(name + constructor, node, optional=True, call=call_shape(node, but=own))
        self.generic_visit(node)


def uses_in(source: str, engine: str, path: str) -> list[Use]:
    return _Reader(source, engine, path).uses


def uses_of(engine: str) -> list[Use]:
    """Every use of an engine in its adapter."""
    folder = ROOT / f"mla_backend/{engine}_adapter"
    uses = [
        use
        for path in sorted(folder.glob("*.py"))
        for use in uses_in(path.read_text(), engine, f"{folder.name}/{path.name}")
    ]
    for owner, attributes in BY_NAME.items():
        if owner.split(".")[0] == engine:
            for attribute in attributes.split():
                name, optional = f"{owner}.{attribute.rstrip('?')}", attribute.endswith("?")
                uses.append(Use(name=name, place=f"{Path(__file__).name}: BY_NAME", optional=optional))
    return uses


# What a version has.


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
        self.module = cache(self.module)

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

    @cache  # noqa: B019 - lives as long as the script
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


# The file.


def source_of(engine: str, version: str, wheels: Path) -> Path:
    """The folder with a version's source, which is downloaded unless it is there."""
    folder = wheels / f"{engine}-{version}"
    if not folder.exists():
        wheels.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheels) as place:
            wanted = ["--no-deps", "--only-binary=:all:", f"--dest={place}", f"{engine}=={version}"]
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True)
            with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
                names = [n for n in wheel.namelist() if n.startswith(f"{engine}/") and n.endswith(".py")]
                wheel.extractall(f"{place}/source", names)
            Path(place, "source").rename(folder)
    return folder


@dataclass
class Contract:
    """What is recorded of an engine: {version: {name: what it is}}, and {class: names of its members in any version}
    for classes that ours are based on."""

    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    members: dict[str, set[str]] = field(default_factory=dict)


def read() -> dict[str, Contract]:
    """The file says of a name what it is since when."""
    contracts = {}
    for engine, recorded in json.loads(CONTRACT.read_text()).items() if CONTRACT.exists() else ():
        versions = {version: {} for version in recorded["versions"]}
        for name, history in recorded["names"].items():
            what = UNRECORDED
            for version, names in versions.items():
                names[name] = what = history.get(version, what)
        contracts[engine] = Contract(versions, {name: set(known) for name, known in recorded["members"].items()})
    return contracts


def write(contracts: dict[str, Contract]) -> None:
    """One line for each name, so that a diff shows what an engine changed."""
    lines, separator = [], ",\n "
    for engine, contract in sorted(contracts.items()):
        entries = []
        for name in sorted(set().union(*contract.versions.values())):
            known = [(version, names.get(name, UNRECORDED)) for version, names in contract.versions.items()]
            changes = dict(now for before, now in pairwise([("", ""), *known]) if now[1] != before[1])
            entries.append(f"{json.dumps(name)}: {json.dumps(changes)}")
        members = [
            f"{json.dumps(name)}: {json.dumps(sorted(contract.members[name]))}" for name in sorted(contract.members)
        ]
        lines.append(
            f'"{engine}": {{\n"versions": {json.dumps(list(contract.versions))},\n'
            f'"names": {{\n {separator.join(entries)}\n}},\n"members": {{\n {separator.join(members)}\n}}\n}}'
        )
    CONTRACT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def is_hook(use: Use, members: dict[str, set[str]]) -> bool:
    """Whether what our class defines takes the place of something in the engine's, and is not just a helper."""
    owner, _, name = use.name.rpartition(".")
    return not use.override or name in members.get(owner, (name,))


def record(engine: str, contract: Contract, versions: Iterable[str], wheels: Path) -> Contract:
    """The contract with these versions recorded anew."""
    uses = uses_of(engine)
    sources = {version: Engine(source_of(engine, version, wheels), engine) for version in versions}
    members = dict(contract.members)
    for base in {use.name.rpartition(".")[0] for use in uses if use.override and ".*." not in use.name}:
        members[base] = members.get(base, set()).union(*(source.members(base) for source in sources.values()))
    names = {use.name for use in uses if is_hook(use, members)}
    known = dict(contract.versions)
    for version, source in sources.items():
        known[version] = {name: source.what_is(name) for name in names}
        print(f"{engine} {version}: {len(names)} names")
    return Contract({version: known[version] for version in VERSIONS[engine] if version in known}, members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=Path(tempfile.gettempdir(), "mla-contract"), help="kept sources")
    parser.add_argument("--engine", choices=sorted(VERSIONS), help="leave the other as it is recorded")
    parser.add_argument("--version", help="leave the others as they are recorded")
    chosen = parser.parse_args()
    contracts = read()
    for engine in [chosen.engine] if chosen.engine else VERSIONS:
        versions = [chosen.version] if chosen.version else VERSIONS[engine]
        contracts[engine] = record(engine, contracts.get(engine, Contract()), versions, chosen.wheels)
    write(contracts)


if __name__ == "__main__":
    main()
