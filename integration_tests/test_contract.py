"""Our adapters against what each version of their engine has, as recorded in contract.json by record_contract.py.

No engine is imported. A failure is one line for each break: engine, version, dotted name, place in our source, reason.
"""

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterator

import pytest
from contract_ast import ABSENT, call_shape
from contract_tables import BY_CALLS, OBJECTS, STAND_INS
from record_contract import (
    ROOT,
    UNRECORDED,
    VERSIONS,
    Use,
    is_hook,
    read,
    uses_in,
    uses_of,
)

CONTRACTS = read()
USES = {engine: uses_of(engine) for engine in VERSIONS}
CALLABLE = ("function", "method", "classmethod", "staticmethod")
AGAIN = "is not recorded: run python integration_tests/record_contract.py"
# What is known to break, as (engine, version): why.
KNOWN = {}


def signature(what: str) -> inspect.Signature:
    """Of something recorded as `method (self, x, y=...)`, as its callers see it."""
    kind, _, parameters = what.partition(" ")
    whole = inspect.signature(eval(f"lambda {parameters[1:-1]}: None"))
    bound = list(whole.parameters.values())[kind in ("method", "classmethod") :]
    return whole.replace(parameters=bound)


def refusal(ours: inspect.Signature, positional: list[str], named: set[str], *, partial: bool = False) -> str:
    """Why a signature does not take a call that hands over these parameters; "" if it does."""
    try:
        bind = ours.bind_partial if partial else ours.bind
        bound = bind(*positional, **{name: name for name in named}).arguments
    except TypeError as error:
        return str(error)
    given = {name: value for name, value in bound.items() if isinstance(value, str) and value in ours.parameters}
    swapped = [f"{value} is taken as {name}" for name, value in given.items() if value != name]
    return "; ".join(swapped)


def calls_allowed(theirs: inspect.Signature, *, least: bool) -> Iterator[tuple[list[str], set[str]]]:
    """Positional and named parameters of calls that a signature allows; only the shortest one if `least`."""
    positional = [p for p in theirs.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p for p in theirs.parameters.values() if p.kind == p.KEYWORD_ONLY]
    needed = {p.name for p in named if p.default is p.empty}
    names, required = [p.name for p in positional], [p.name for p in positional if p.default is p.empty]
    yield required, needed
    if not least:
        yield from ((names[:count], needed) for count in range(len(required), len(names) + 1))
        yield [], {p.name for p in (*positional, *named)}


def call_of(shape: str) -> tuple[list[str], set[str], bool]:
    """Positional and named parameters of `(_, _, y=_)`, and whether it unpacks others."""
    call = ast.parse(f"f{shape}").body[0].value
    positional = ["?" for argument in call.args if not isinstance(argument, ast.Starred)]
    named = {keyword.arg for keyword in call.keywords if keyword.arg}
    return positional, named, "*" in shape


def override_difference(theirs: str, ours: str, *, is_constructor: bool) -> str:
    """What the engine may do with its own definition and could not with ours."""
    kind, our_kind = theirs.split()[0], ours.split()[0]
    if kind == "calls":
        calls = [call_of(shape) for shape in theirs.removeprefix("calls ").split(" | ")]
        refusals = [refusal(signature(ours), positional, named, partial=more) for positional, named, more in calls]
    elif (kind in CALLABLE) != (our_kind in CALLABLE):
        refusals = [f"ours is a {our_kind}"]
    elif kind in CALLABLE:
        mine, hers = signature(ours), signature(theirs)
        refusals = [refusal(mine, *call) for call in calls_allowed(hers, least=is_constructor)]
        for more in () if is_constructor else ("VAR_POSITIONAL", "VAR_KEYWORD"):
            has_hers, has_mine = ([p.kind.name for p in s.parameters.values()] for s in (hers, mine))
            refusals += [f"ours lacks {more}"] if more in has_hers and more not in has_mine else []
    else:
        refusals = []
    reason = next(filter(None, refusals), "")
    return reason and f"{reason}; theirs is {theirs}, ours is {ours}"


def difference(use: Use, what: str) -> str:
    """Why a use of ours fails in a version that has `what` of that name; "" if it works."""
    if what == UNRECORDED:
        return AGAIN
    if what == ABSENT:
        return "" if use.optional else "is absent"
    if use.override:
        return override_difference(what, use.override, is_constructor=use.name.endswith(".__init__"))
    if use.call and what.split()[0] in CALLABLE:
        positional, named, partial = call_of(use.call)
        reason = refusal(signature(what), positional, named, partial=partial)
        return reason and f"{reason}; theirs is {what}, our call is {use.call}"
    return ""


def breaks(uses: list[Use], names: dict[str, str], members: dict[str, set[str]] | None = None) -> list[str]:
    """Every use that fails, and imports of which none is left, with the reason."""
    known = [(use, names.get(use.name, UNRECORDED)) for use in uses if is_hook(use, members or {})]
    found = [f"{use.name} ({use.place}) {reason}" for use, what in known if (reason := difference(use, what))]
    either = defaultdict(dict)
    for use, what in known:
        if use.either:
            either[use.either][use.name] = what
    return found + [f"{' or '.join(e)} ({at}) is absent" for at, e in either.items() if set(e.values()) == {ABSENT}]


METHOD = "from vllm.a import Base\nclass Ours(Base):\n    def run(self, x, y=1):\n        pass"
NAMES = {"vllm.a.Base": "class ABC", "vllm.a.Base.run": "method (self, x)", "vllm.a.f": "function (x, y=...)"}


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (METHOD, {"vllm.a.Base.run": "method (self, x, y=..., z=...)"}, "too many positional arguments"),
        (METHOD, {"vllm.a.Base.run": "method (self, x, *, z)"}, "unexpected keyword argument 'z'"),
        (METHOD, {"vllm.a.Base.run": "method (self, z)"}, "missing a required argument: 'x'"),
        (METHOD, {"vllm.a.Base.run": "method (self)"}, "missing a required argument: 'x'"),
        (METHOD, {"vllm.a.Base.run": "method (self, y, x)"}, "y is taken as x"),
        (METHOD, {"vllm.a.Base.run": "method (self, x, **more)"}, "lacks VAR_KEYWORD"),
        (METHOD, {"vllm.a.Base.run": "property"}, "ours is a method"),
        (METHOD.replace("run", "_build_decode"), {"vllm.*._build_decode": "calls (x=_) | (z=_)"}, "argument"),
        (METHOD.replace("run", "_build_decode"), {"vllm.*._build_decode": ABSENT}, "is absent"),
        ("import vllm.gone", {"vllm.gone": ABSENT}, "vllm.gone (vllm_adapter/x.py:1) is absent"),
        ("def f():\n    from vllm.new import x", {}, AGAIN),
        ("from vllm import a\na.new", {"vllm.a": "module"}, AGAIN),
        (METHOD.replace("run", "new"), {}, AGAIN),
        (METHOD + "\n        self.lost", {"vllm.a.Base.lost": ABSENT}, "vllm.a.Base.lost (vllm_adapter/x.py:5)"),
        ("def f(vllm_config):\n    vllm_config.lost", {"vllm.config.VllmConfig.lost": ABSENT}, "is absent"),
        ("from vllm.a import f\nf(1, z=2)", {}, "unexpected keyword argument 'z'"),
        ("from vllm.a import f\nf()", {}, "missing a required argument: 'x'"),
        (
            "try:\n    from vllm.a import b\nexcept ImportError:\n    from vllm.a import c",
            {"vllm.a.b": ABSENT, "vllm.a.c": ABSENT},
            "vllm.a.b or vllm.a.c (vllm_adapter/x.py:1) is absent",
        ),
    ],
)
def test_checks_find_what_they_look_for(ours, theirs, reason):
    assert any(reason in line for line in breaks(uses_in(ours, "vllm", "vllm_adapter/x.py"), {**NAMES, **theirs}))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (METHOD, {}),
        (METHOD, {"vllm.a.Base.run": "classmethod (cls, x, y=...)"}),
        (METHOD, {"vllm.a.Base.run": ABSENT}),
        (METHOD + "\n    def _helper(self): pass", {}),
        (METHOD.replace("x, y=1", "*args, **kwargs"), {"vllm.a.Base.run": "method (self, z, *, more)"}),
        ("from vllm.a import f\nf(1, *more, **others)", {}),
        ("def f(vllm_config):\n    getattr(vllm_config, 'lost', 1)", {"vllm.config.VllmConfig.lost": ABSENT}),
        ("try:\n    from vllm.a import b\nexcept ImportError:\n    b = None", {"vllm.a.b": ABSENT}),
    ],
)
def test_checks_let_harmless_code_pass(ours, theirs):
    uses = uses_in(ours, "vllm", "vllm_adapter/x.py")
    assert breaks(uses, {**NAMES, **theirs}, {"vllm.a.Base": {"run"}}) == []


@pytest.mark.parametrize(
    ("engine", "version"),
    [
        pytest.param(engine, version, marks=[pytest.mark.xfail(strict=True, reason=KNOWN[engine, version])])
        if (engine, version) in KNOWN
        else (engine, version)
        for engine, versions in VERSIONS.items()
        for version in versions
    ],
)
def test_adapter_fits_version(engine, version):
    contract = CONTRACTS[engine]
    lines = breaks(USES[engine], contract.versions.get(version, {}), contract.members)
    if lines:
        pytest.fail("\n".join(f"{engine} {version}: {line}" for line in lines), pytrace=False)


def gone_hooks(uses: list[Use], versions: dict[str, dict[str, str]]) -> Iterator[str]:
    """What ours take the place of and the engine has no more, so that nobody calls ours. Those in compat.py say
    themselves when they can go."""
    for use in uses:
        if "/compat.py:" in use.place:
            continue
        had = False
        for version, names in versions.items():
            has = names.get(use.name, ABSENT) != ABSENT
            if use.override and had and not has:
                yield f"{version}: {use.name} ({use.place}) is gone, and ours is called by nobody"
            had = has


def test_gone_hooks_are_found():
    uses, known = uses_in(METHOD, "vllm", "vllm_adapter/x.py"), {"vllm.a.Base.run": "method (self, x)"}
    assert len(list(gone_hooks(uses, {"1": {}, "2": known, "3": {}}))) == 1
    assert list(gone_hooks(uses, {"1": {}, "2": known})) == []
    uses = uses_in(METHOD, "vllm", "vllm_adapter/compat.py")
    assert list(gone_hooks(uses, {"1": {}, "2": known, "3": {}})) == []


@pytest.mark.parametrize("engine", sorted(VERSIONS))
def test_no_hook_is_gone(engine):
    lines = [f"{engine} {line}" for line in gone_hooks(USES[engine], CONTRACTS[engine].versions)]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("engine", sorted(VERSIONS))
def test_what_is_optional_is_in_some_version(engine):
    """What no version has is a slip of the pen."""
    histories = defaultdict(set)
    for names in CONTRACTS[engine].versions.values():
        for name, what in names.items():
            histories[name].add(what)
    optional = [use for use in USES[engine] if use.optional and not use.override and not use.call]
    assert [f"{engine}: {use.name} ({use.place})" for use in optional if histories[use.name] == {ABSENT}] == []


@pytest.mark.parametrize("engine", sorted(VERSIONS))
def test_recorded_versions_are_those_we_serve(engine):
    tree = ast.parse((ROOT / f"mla_backend/{engine}_adapter/compat.py").read_text())
    limits = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets) == "(FIRST, LAST)")
    recorded = list(CONTRACTS[engine].versions)
    assert recorded == list(VERSIONS[engine])
    for version, limit in zip((recorded[0], recorded[-1]), ast.literal_eval(limits.value), strict=True):
        assert f"{version}.".startswith(f"{limit}.")


def test_tables_name_nothing_that_is_gone():
    used = {use.name.rpartition(".")[0] for uses in USES.values() for use in uses}
    assert [name for name in (*OBJECTS, *STAND_INS.values()) if name not in used] == []
    assert {use.name.split(".")[-1] for uses in USES.values() for use in uses if ".*." in use.name} == BY_CALLS


def test_shapes_of_calls():
    call = ast.parse("f(1, *a, x=2, y=3, **b)").body[0].value
    assert call_shape(call, but=["y"]) == "(_, *_, x=_, **_)"
