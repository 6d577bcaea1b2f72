"""Who may import, ask and know what. Each rule is one small scan of the source; CONTRIBUTING.md has the picture."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels/mla_kernels"
BACKEND = ROOT / "mla_backend"
ENGINES = {"vllm", "sglang"}
HEAVY = {*ENGINES, "triton", "flashinfer"}
ADAPTERS = tuple(p.name for p in sorted(BACKEND.glob("*_adapter")))
COMPAT = tuple(f"{adapter}/compat.py" for adapter in ADAPTERS)
OPERATION_FOLDERS = ("decode", "prefill", "cache", "merge")
MODEL_NAMES = re.compile(r"deepseek|kimi|glm|minicpm|longcat|pangu|mistral|bailing|ling_|hy_v", re.IGNORECASE)
ATTENTION_ARITHMETIC = {
    *("softmax", "log_softmax", "logsumexp", "exp", "exp2", "einsum", "matmul", "bmm", "baddbmm", "mm", "addmm"),
    "scaled_dot_product_attention",
}
DEVICE_QUESTIONS = {
    *("get_device_properties", "get_device_capability", "get_device_name", "device_count", "is_available"),
    *("torch.version.hip", "torch.version.cuda", "multi_processor_count"),
}


def sources(folder: Path, *, but: tuple[str, ...] = ()) -> list:
    """Python files under `folder` as pytest parameters, less those below or named as in `but`."""
    paths = sorted(folder.rglob("*.py"))
    kept = [p for p in paths if not any(p.is_relative_to(folder / name) for name in but)]
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in kept]


def is_kernel(path: Path) -> bool:
    return path.parent.name in OPERATION_FOLDERS and path.name != "__init__.py"


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; what is before a call or subscript is left out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, inside functions too, and names taken from them as `module.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here: they hide which layer is meant"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def roots(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def reads_environment(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and dotted(node).split(".")[-1] in ("environ", "getenv"):
            yield dotted(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (alias.name for alias in node.names if alias.name in ("environ", "getenv"))


def compares_versions(tree: ast.AST) -> Iterator[str]:
    """Ways to find out an engine's version. Our own distribution's version may be asked anywhere."""
    yield from (name for name in imports(tree) if name.startswith("packaging") or name.endswith("__version__"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("__version__", "__version_tuple__"):
            yield dotted(node)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "version":
            asked = [ast.unparse(argument) for argument in node.args]
            yield from () if asked == ["'mla-backend'"] else (ast.unparse(node),)


def asks_device(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr in DEVICE_QUESTIONS or dotted(node) in DEVICE_QUESTIONS):
            yield dotted(node)


def computes_attention(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield "@"
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ATTENTION_ARITHMETIC:
            yield dotted(node.func)


def names_models(tree: ast.AST) -> Iterator[str]:
    """String constants that name a model; docstrings may."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            in_code = not isinstance(node, ast.Expr) and isinstance(child, ast.Constant)
            if in_code and isinstance(child.value, str) and MODEL_NAMES.search(child.value):
                yield child.value


def asks_bytes(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("itemsize", "element_size", "nbytes"):
            yield dotted(node)


def adds_row_width(tree: ast.AST) -> Iterator[str]:
    """`kv_lora_rank + qk_rope_head_dim`, which is `MLAGeometry.latent_dim`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = {dotted(node.left).split(".")[-1], dotted(node.right).split(".")[-1]}
            if sides == {"kv_lora_rank", "qk_rope_head_dim"}:
                yield ast.unparse(node)


@pytest.mark.parametrize(
    ("scan", "planted"),
    [
        (roots, "def f():\n    from vllm.config import x"),
        (roots, "import importlib\nimportlib.import_module('sglang.srt')"),
        (reads_environment, "import os\nos.environ.get('X')"),
        (reads_environment, "import os\nos.getenv('X')"),
        (reads_environment, "from os import environ"),
        (compares_versions, "from packaging.version import Version"),
        (compares_versions, "import vllm\nvllm.__version__ > '0.30'"),
        (compares_versions, "from importlib import metadata\nmetadata.version('vllm')"),
        (asks_device, "import torch\ntorch.cuda.get_device_properties(0)"),
        (asks_device, "import torch\ntorch.version.hip"),
        (computes_attention, "y = (a @ b)"),
        (computes_attention, "y = torch.softmax(a, -1)"),
        (computes_attention, "y = scores.exp()"),
        (names_models, "'''doc of DeepSeek'''\nx = config.model_type == 'deepseek_v3'"),
        (asks_bytes, "row = width * dtype.itemsize"),
        (adds_row_width, "width = g.kv_lora_rank + g.qk_rope_head_dim"),
    ],
)
def test_scans_find_what_they_look_for(scan, planted):
    found = set(scan(ast.parse(planted)))
    assert found & ENGINES if scan is roots else found


def test_scans_let_harmless_code_pass():
    harmless = ast.parse(
        "'''About DeepSeek.'''\nfrom importlib.metadata import version\nversion('mla-backend')\nx = a * b"
    )
    for scan in (reads_environment, compares_versions, asks_device, computes_attention, names_models, asks_bytes):
        assert list(scan(harmless)) == []


# Rule 1: kernels know no engine, no Hugging Face config, no environment variable.


@pytest.mark.parametrize("path", sources(KERNELS))
def test_kernels_know_no_engine(path):
    assert not roots(parse(path)) & {*ENGINES, "mla_backend", "transformers", "huggingface_hub"}


@pytest.mark.parametrize("path", sources(KERNELS, but=("device.py",)))
def test_kernels_read_no_environment(path):
    assert list(reads_environment(parse(path))) == []


def test_device_reads_only_the_interpreter_switch():
    strings = [n.value for n in ast.walk(parse(KERNELS / "device.py")) if isinstance(n, ast.Constant)]
    variables = {s for s in strings if isinstance(s, str) and re.fullmatch(r"[A-Z]+_[A-Z_]+", s)}
    assert variables == {"TRITON_INTERPRET"}


@pytest.mark.parametrize("path", [p for p in sources(KERNELS) if is_kernel(p.values[0])])
def test_kernels_import_only_leaves(path):
    """Neither one another nor the reference: a test that compares two must compare two independent ones."""
    ours = {name.split(".")[1] for name in imports(parse(path)) if name.startswith("mla_kernels.")}
    assert not ours & {*OPERATION_FOLDERS, "reference", "testing", "dispatch"}


LEAVES = {
    "geometry": (),
    "device": (),
    "cache_layout": ("geometry",),
    "reference": ("geometry", "device", "cache_layout"),
    "primitives": ("geometry", "device", "cache_layout"),
    "packed_rows": ("cache_layout",),
    "bfloat16": (),
    "float32": (),
    "cpu_attention": ("bfloat16", "float32"),
    "flashinfer_calls": ("device",),
    "hopper": ("device",),
    "schedule": ("hopper",),
    "launching": ("device",),
    "repeats": ("launching",),
    "prefill_pieces": ("launching", "primitives"),
    "split_merge": ("launching", "primitives"),
    "splits": ("launching", "primitives"),
    "tiles": ("device",),
    "triton_piece": ("primitives", "cache_layout"),
    "hopper_load": ("hopper", "schedule"),
    "hopper_unpack": ("hopper", "hopper_load", "schedule"),
    "hopper_shrink": ("hopper", "hopper_load"),
    "hopper_shared": ("hopper", "hopper_load", "schedule"),
    "hopper_decode": ("hopper", "hopper_load", "primitives", "schedule"),
    "hopper_columns": ("hopper_load",),
    "hopper_tiles": (
        *("hopper", "hopper_codes", "hopper_codes_load", "hopper_columns", "hopper_decode", "hopper_load"),
        *("hopper_shrink", "schedule"),
    ),
    "hopper_tiles_launch": (
        *("hopper", "hopper_codes_load", "hopper_launch", "hopper_shared", "hopper_tiles", "launching", "schedule"),
    ),
    "hopper_codes_load": ("hopper", "hopper_load", "schedule"),
    "hopper_codes": ("hopper", "hopper_codes_load", "hopper_columns", "hopper_load", "schedule"),
    "hopper_few": (
        *("hopper", "hopper_codes", "hopper_columns", "hopper_decode", "hopper_load", "hopper_shrink", "schedule"),
    ),
    "hopper_turns": (
        *("hopper", "hopper_codes", "hopper_columns", "hopper_decode", "hopper_load", "hopper_shared", "hopper_shrink"),
        "schedule",
    ),
    "hopper_codes_launch": (
        *("hopper", "hopper_codes", "hopper_codes_load", "hopper_few", "hopper_launch", "hopper_load", "hopper_shared"),
        *("hopper_turns", "launching", "schedule"),
    ),
    "hopper_few_launch": (
        *("hopper", "hopper_decode", "hopper_few", "hopper_launch", "hopper_load", "hopper_shared"),
        *("launching", "schedule"),
    ),
    "hopper_launch": (
        *("cache_layout", "device", "hopper_codes_load", "hopper_load", "primitives", "schedule", "split_merge", "tma"),
    ),
    "hopper_prefill": ("hopper", "hopper_prefill_load", "primitives"),
    "hopper_prefill_load": ("hopper",),
    "tma": ("hopper",),
}


def test_every_leaf_has_its_rule():
    names = {path.stem for path in KERNELS.glob("*.py")}
    assert names == {*LEAVES, "dispatch", "testing", "__init__"}


@pytest.mark.parametrize(("leaf", "below"), LEAVES.items())
def test_leaves_import_only_leaves(leaf, below):
    ours = {name for name in imports(parse(KERNELS / f"{leaf}.py")) if name.split(".")[0] == "mla_kernels"}
    assert {name.split(".")[1] for name in ours} <= set(below)


# Rule 2: adapters translate and call; they compute nothing of attention. They do not know one another.


@pytest.mark.parametrize("path", [p for adapter in ADAPTERS for p in sources(BACKEND / adapter)])
def test_adapters_compute_no_attention(path):
    assert list(computes_attention(parse(path))) == []


@pytest.mark.parametrize("path", [p for adapter in ADAPTERS for p in sources(BACKEND / adapter)])
def test_adapter_knows_one_engine(path):
    engine = next(part for part in path.parts if part.endswith("_adapter")).removesuffix("_adapter")
    names = list(imports(parse(path)))
    assert not {name.split(".")[0] for name in names} & (ENGINES - {engine})
    adapters = {name.split(".")[1] for name in names if re.match(r"mla_backend\.\w+_adapter", name)}
    assert adapters <= {f"{engine}_adapter"}


@pytest.mark.parametrize("path", sources(BACKEND, but=(*ADAPTERS, "bench", "doctor")))
def test_engines_are_imported_only_by_adapters(path):
    """Inside a function counts. Benchmarks call other people's kernels, and the doctor asks adapters, so they may."""
    tree = parse(path)
    assert not roots(tree) & ENGINES
    if path.name != "__init__.py":  # the entry points hand over to an adapter
        assert not [name for name in imports(tree) if re.match(r"mla_backend\.\w+_adapter", name)]


# Rule 3: the bytes of a cache row are known to cache_layout.py. (Kernels use item sizes to fit tiles into a GPU.)


@pytest.mark.parametrize("path", [*sources(BACKEND, but=("bench",)), *sources(KERNELS, but=OPERATION_FOLDERS)])
def test_bytes_of_a_row_are_known_in_one_place(path):
    tree = parse(path)
    if path.name != "cache_layout.py":
        assert list(asks_bytes(tree)) == []
    if path.name != "geometry.py":
        assert list(adds_row_width(tree)) == []


# Rule 4: model names stand in models.py.


@pytest.mark.parametrize("path", [*sources(BACKEND, but=("models.py", "bench")), *sources(KERNELS)])
def test_model_names_stand_in_one_place(path):
    assert list(names_models(parse(path))) == []


# Rule 5: only device.py asks what this machine is.


@pytest.mark.parametrize("path", [*sources(BACKEND, but=("bench",)), *sources(KERNELS, but=("device.py",))])
def test_device_is_asked_in_one_place(path):
    assert list(asks_device(parse(path))) == []


# Rule 6: engine versions are looked at only in compat.py; the plugin's environment variables only in config.py.


@pytest.mark.parametrize("path", [*sources(BACKEND, but=("bench", "doctor", *COMPAT)), *sources(KERNELS)])
def test_engine_versions_are_compared_in_one_place(path):
    assert list(compares_versions(parse(path))) == []


@pytest.mark.parametrize("path", sources(BACKEND, but=("config.py",)))
def test_environment_is_read_in_one_place(path):
    assert list(reads_environment(parse(path))) == []


# Rule 7: importing is cheap, and this project hides nobody else's package.


def run_python(code: str, *, path: tuple[Path, ...] = (), cwd: Path = ROOT) -> str:
    """Output of `code` in a fresh interpreter that finds our packages without an installation."""
    places = os.pathsep.join(map(str, [ROOT, ROOT / "kernels", *path]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def newly_imported(modules: list[str]) -> set[str]:
    """Top-level names that come with `modules`. torch is imported first: what it brings along is not our doing."""
    code = (
        f"import sys, torch; before = set(sys.modules); import {', '.join(modules)}; print(*set(sys.modules) - before)"
    )
    return {name.split(".")[0] for name in run_python(code).split()}


@pytest.mark.parametrize("module", ["mla_backend", "mla_kernels"])
def test_import_is_cold(module):
    assert not newly_imported([module]) & {*HEAVY, "transformers"}


def test_engine_free_modules_import_no_engine():
    paths = [p.values[0].relative_to(ROOT) for p in sources(BACKEND, but=(*ADAPTERS, "bench", "doctor"))]
    modules = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in paths]
    assert "mla_backend.attention" in modules
    assert not newly_imported(modules) & HEAVY


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "kernels", ROOT / "integration_tests"], ids=lambda p: p.name)
def test_hugging_face_kernels_is_not_shadowed(tmp_path, cwd):
    """Hugging Face's `kernels` is played by a package at the very end of the path; it must win over our folder."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("MARK = 'theirs'\n")
    assert run_python("import kernels; print(kernels.MARK)", path=(tmp_path,), cwd=cwd) == "theirs"


def test_installed_hugging_face_kernels_still_works():
    if (
        run_python(
            "import importlib.util as u; print(u.find_spec('kernels.layer') if u.find_spec('kernels') else None)"
        )
        == "None"
    ):
        pytest.skip("Hugging Face's package `kernels` is not installed")
    run_python("from kernels import get_kernel")


def test_pytest_does_not_shadow_hugging_face_kernels(tmp_path):
    """With `--import-mode=importlib`, pytest would put a module `kernels` of its own making into sys.modules."""
    place = tmp_path / "site"
    (place / "kernels").mkdir(parents=True)
    (place / "kernels/__init__.py").write_text("MARK = 'theirs'\n")
    probe = "import sys, pytest\nsys.path.append(sys.argv.pop())\nexit(pytest.main(sys.argv[1:]))"
    house = tmp_path / "house"
    (house / "kernels/tests").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", house)
    (house / "integration_tests").mkdir()
    (house / "kernels/tests/test_probe.py").write_text(
        "def test():\n    import kernels\n    assert kernels.MARK == 'theirs'\n"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    subprocess.run(
        [sys.executable, "-c", probe, "-q", "-p", "no:cacheprovider", str(place)], cwd=house, env=plain, check=True
    )


def test_test_files_have_unique_names():
    """pytest's default import mode takes a test module by its bare name."""
    names = [p.name for folder in ("kernels/tests", "integration_tests") for p in (ROOT / folder).rglob("*.py")]
    names = [name for name in names if name != "conftest.py"]  # pytest keeps these apart by itself
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_no_folder_is_named_like_a_package_we_look_for(engine):
    """`importorskip("vllm")` in a test would find the empty folder."""
    for folder in (ROOT, ROOT / "kernels", ROOT / "kernels/tests", ROOT / "integration_tests", ROOT / "examples"):
        assert not (folder / engine).exists()


@pytest.mark.parametrize("module", ["vllm", "sglang", "mla_backend"])
def test_lint_flags_the_arrow_too(module):
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not ruff:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [ruff, "check", "--no-cache", "--stdin-filename", "kernels/mla_kernels/decode/planted.py", "-"],
        input=f"def f():\n    import {module}\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "TID251" in done.stdout
