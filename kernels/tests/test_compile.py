"""Every GPU kernel compiles for GPUs that are not here: within shared memory, without drowning in spills; Hopper's
own without any, and with its matrix and bulk copy instructions. `make compile-matrix` asks other Tritons too."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("compile_worker.py")
TARGETS = (*(("cuda", arch) for arch in ("80", "86", "89", "90", "100", "120")), ("hip", "gfx942"))
HOPPER = ("gluon_sm90", "gluon_sm90_ragged")
NAMES = ("triton_splitkv", "triton_ragged cache_write cache_gather merge")  # of operations, or of kernels: each takes
# a process of its own


def compiled(target, names, folder) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(WORKER.parents[1])}
    done = subprocess.run(
        [sys.executable, str(WORKER), *target, *names.split()], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("target", TARGETS, ids="-".join)
def test_compiles_for(target, names, tmp_path):
    rows = compiled(target, names, tmp_path)
    assert all({row["operation"], row["kernel"]} & set(names.split()) for row in rows)
    assert len({row["operation"] for row in rows}) == len(names.split())
    for row in rows:
        assert "refused" not in row, row
        assert row["faults"] == [], row


@pytest.mark.parametrize(
    ("kernel", "functions"),
    [
        (
            "gluon_sm90",
            {
                *("_decode_kernel", "_decode_few_kernel", "_decode_codes_kernel", "_decode_tiles_kernel"),
                *("_merge_kernel", "_merge_splits_kernel"),
            },
        ),
        ("gluon_sm90_ragged", {"_prefill_kernel", "_merge_pieces_kernel"}),
    ],
)
def test_hopper_kernel_compiles(kernel, functions, tmp_path):
    rows = compiled(("cuda", "90"), kernel, tmp_path)
    assert {row["function"] for row in rows} == functions
    assert {f"{row['function']} {row['variant']}": row["faults"] for row in rows if row["faults"]} == {}


@pytest.mark.parametrize("target", [("cuda", "80"), ("hip", "gfx942")], ids="-".join)
def test_hopper_kernels_refuse_other_gpus(target, tmp_path):
    rows = compiled(target, " ".join(HOPPER), tmp_path)
    assert {row["kernel"] for row in rows} == set(HOPPER)
    for row in rows:
        assert any("needs sm_90, got" in reason for reason in row["refused"]), row


def test_layouts_are_handed_over_by_a_name():
    """Triton 3.6, which vLLM 0.26 pins, takes no attribute such as x.type.layout as an argument of a jit function."""
    kernels = WORKER.parents[1] / "mla_kernels"
    wrong = [
        f"{path.name}:{argument.lineno}"
        for path in kernels.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        for argument in call.args
        if isinstance(argument, ast.Attribute) and argument.attr == "layout"
    ]
    assert wrong == []
