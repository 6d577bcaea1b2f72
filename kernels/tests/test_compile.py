"""Every Triton kernel compiles for GPUs that are not here: within shared memory, without drowning in spills."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("compile_worker.py")
TARGETS = (("cuda", "80"), ("cuda", "86"), ("cuda", "89"), ("cuda", "90"), ("hip", "gfx942"))
OPERATIONS = ("decode", "prefill", "cache_write cache_gather merge")
# Bytes a thread may spill to local memory. Float32 holds twice the accumulators and is there to be right, not fast.
MOST_SPILLED = 1024


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("target", TARGETS, ids="-".join)
def test_compiles_for(target, operations, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(WORKER.parents[1])}
    done = subprocess.run(
        [sys.executable, str(WORKER), *target, *operations.split()], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["operation"] for row in rows} == set(operations.split())
    for row in rows:
        assert "refused" not in row, row
        assert row["shared"] <= row["limit"], row
        assert row["spilled"] <= MOST_SPILLED, row
