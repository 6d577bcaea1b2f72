"""What a user installs: the wheel holds every module of the two packages and nothing else."""

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "models", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel. Built from a copy: a stale `build/` would put deleted modules into it."""
    pytest.importorskip("build", reason="needs the package build")
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source") / "mla-backend"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source.parent / "dist", source],
        capture_output=True,
        text=True,
        cwd=source.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source.parent / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def info(wheel):
    """read(name): a file of the wheel's .dist-info."""
    folder = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    return lambda name: wheel.read(f"{folder}/{name}").decode()


@pytest.fixture(scope="module")
def metadata(info):
    return HeaderParser().parsestr(info("METADATA"))


def modules_of(package: str, parent: Path) -> set[str]:
    return {p.relative_to(parent).as_posix() for p in (parent / package).rglob("*.py")}


@pytest.mark.parametrize(("package", "parent"), [("mla_backend", ROOT), ("mla_kernels", ROOT / "kernels")])
def test_every_module_is_in_the_wheel(wheel, package, parent):
    packed = {name for name in wheel.namelist() if name.startswith(f"{package}/") and name.endswith(".py")}
    assert packed == modules_of(package, parent)


def test_every_folder_of_modules_is_a_package():
    """setuptools leaves out a folder without __init__.py, and an editable install hides that."""
    for package in (ROOT / "mla_backend", ROOT / "kernels/mla_kernels"):
        for folder in {path.parent for path in package.rglob("*.py")}:
            assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"


def test_nothing_else_is_in_the_wheel(wheel):
    """Above all no `kernels`, which is Hugging Face's, and none of the empty distributions of stubs/."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mla_backend", "mla_kernels"}
    assert not [
        name for name in wheel.namelist() if re.search(r"(^|/)(tests?|test_\w+\.py|conftest\.py|stubs)(/|$)", name)
    ]


def test_installs_on_every_platform(wheel):
    assert wheel.filename.endswith("-py3-none-any.whl")


def test_entry_points(info):
    """Both under one name: users who set VLLM_PLUGINS then name it once."""
    points = ConfigParser(delimiters="=")
    points.read_string(info("entry_points.txt"))
    assert dict(points["vllm.general_plugins"]) == {"mla_backend": "mla_backend:register_vllm"}
    assert dict(points["vllm.platform_plugins"]) == {"mla_backend": "mla_backend:vllm_cpu_platform"}
    assert dict(points["console_scripts"]) == {"mla-backend": "mla_backend.cli:main"}


def test_entry_points_exist():
    import mla_backend
    from mla_backend.cli import main

    assert callable(main)
    assert callable(mla_backend.register_vllm)
    assert callable(mla_backend.vllm_cpu_platform)


def test_installing_moves_no_version(metadata):
    """The engine pins torch and triton. We ask for lower bounds at most; exact versions only for our own tests."""
    for requirement in metadata.get_all("Requires-Dist"):
        needed, _, marker = requirement.partition(";")
        if re.search(r"extra == .(cpu|sglang-cpu|test).", marker):
            continue
        name = re.match(r"[\w.-]+", needed).group()
        bounds = [b.strip() for b in needed.removeprefix(name).strip(" ()").split(",") if b.strip()]
        assert all(bound.startswith(">=") for bound in bounds), requirement
        if name in ("torch", "triton"):
            assert not bounds, requirement


def test_engine_is_optional(metadata):
    """Installing the plugin beside an engine must not pull another engine in, nor a second build of the same."""
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w.-]+", r).group() for r in required} == {"torch", "packaging"}


def test_metadata(metadata, info):
    assert metadata["Name"] == "mla-backend"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache License" in info("licenses/LICENSE")
    assert "END OF TERMS AND CONDITIONS" in info("licenses/LICENSE")


def test_wheel_imports_from_elsewhere(wheel, tmp_path):
    """Unpacked, away from the repository, both packages import."""
    wheel.extractall(tmp_path)
    code = "import mla_backend, mla_kernels; print(mla_backend.__file__, mla_kernels.__file__)"
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    done = subprocess.run([sys.executable, "-c", path + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(tmp_path)) for place in done.stdout.split())
