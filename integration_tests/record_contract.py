"""Record what each version of vLLM and SGLang has of everything that our adapters use of it.

    python integration_tests/record_contract.py [--wheels FOLDER] [--engine vllm] [--version 0.33.0]

What we use is read off the adapters' source: imports, attributes, calls, and methods that ours override. By hand there
are only the tables of contract_tables.py. What a version has is read off the source in its wheel; no engine is imported
or installed. `test_contract.py` compares the two.
"""

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from contract_ast import call_shape, definitions, describe, dotted, stored_on_self
from contract_engine import Engine
from contract_tables import BY_CALLS, BY_NAME, OBJECTS, STAND_INS

ROOT = Path(__file__).parents[1]
CONTRACT = Path(__file__).with_name("contract.json")
VERSIONS = {
    "vllm": ("0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0"),
    "sglang": tuple(f"0.5.{patch}" for patch in range(13, 24)),
}
UNRECORDED = "unrecorded"


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
