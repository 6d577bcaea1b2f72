"""After the warm-up no batch makes Triton compile anything, on GPUs that are not here; and scratch is reserved once."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from mla_backend.scratch import Scratch

WORKER = pathlib.Path(__file__).with_name("warmup_worker.py")


SPECULATION = {"uniform": [1, 2, 3, 4], "ragged": [4]}
FP8 = {"cache_dtype": "float8_e4m3fn"}
TILE_SCALED = {"cache_dtype": "uint8"}
SPLITS = {"split_tokens": 256, "tiled": [4]}
CASES = [
    ("H200", {}),
    ("H200", {"joined": True, **SPECULATION}),
    ("H200", {"heads": 128, "max_requests": 140, **SPECULATION}),
    ("H200", {"heads": 4, "ranks": 2, "ragged": [], "joined": True}),
    ("H200", {"heads": 6, "page_size": 1, "rope": 0, "dtype": "float16", "cache_dtype": "float16"}),
    ("H200", {"dtype": "float32", "cache_dtype": "float32"}),
    ("H200", FP8),
    ("H100 PCIe", {}),  # one form of its merge is taken by batches of 5 to 7 requests alone
    ("A100", {"heads": 5, **SPECULATION}),
    ("A100", {"latent": 256, "rope": 32, "heads": 40}),
    ("RTX 3090", {"page_size": 16, **FP8}),
    ("H200", {**TILE_SCALED, "max_requests": 140, **SPECULATION}),
    ("H200", {"ragged": [], "tiled": [4]}),
    ("A100", {"heads": 5, "ragged": [], "tiled": [12], "max_requests": 20, **FP8}),
    ("H200", SPLITS),
    ("H200", {"heads": 5, "page_size": 1, "max_requests": 20, **SPECULATION, **SPLITS}),
    ("H200", {**FP8, **SPLITS}),
    ("A100", {"heads": 5, "max_requests": 20, **SPECULATION, **SPLITS}),
    ("RTX 3090", {"page_size": 16, "max_requests": 20, **TILE_SCALED, **SPLITS}),
]
FORGETFUL = {"uniform": [1, 2], "max_requests": 20}
CUT_ANYWHERE, IN_SPLITS = {"ragged": [2], **FORGETFUL}, {"ragged": [], **SPLITS, **FORGETFUL}


@functools.cache
def lines(device: str, changes: str, *options: str) -> list[list[dict]]:
    """What warmup_worker.py prints of several cases, in one process: to start takes longer than most of them."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(WORKER), device, changes, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{device}-{i}" for i, (device, _) in enumerate(CASES)])
def test_no_batch_compiles_anything_after_the_warm_up(case):
    device, changes = CASES[case]
    beside = [changes for name, changes in CASES if name == device]
    (line,) = lines(device, json.dumps(beside))[beside.index(changes)]
    assert line["late"] == []
    assert line["compiled"] >= line["calls"]


@pytest.mark.parametrize("device", ["H200", "A100"])
@pytest.mark.parametrize("case", range(2), ids=["cut anywhere", "splits"])
def test_a_call_left_out_of_the_warm_up_is_missed(device, case):
    """So the test above can fail, and no call is for nothing."""
    for line in lines(device, json.dumps([CUT_ANYWHERE, IN_SPLITS]), "--forget")[case]:
        assert line["late"], f"without one call for {line['forgotten']} nothing is missed"


def test_scratch_is_shared_and_never_grows_while_serving():
    small, large = (((3,), torch.float32),), (((100,), torch.float32), ((5, 2), torch.int32))
    scratch = Scratch(torch.device("cpu"))
    scratch.reserve(small)
    scratch.reserve(large)
    assert scratch.bytes == 512 + 256
    floats, ints = scratch.take(large)
    assert (floats.shape, ints.shape, ints.dtype) == ((100,), (5, 2), torch.int32)
    assert scratch.take(small)[0].data_ptr() == floats.data_ptr()
    assert ints.data_ptr() % 16 == 0
    scratch.reserve(small)
    assert scratch.take(large)[0].data_ptr() == floats.data_ptr(), "what is enough stays where it is"
    with pytest.raises(ValueError, match="scratch of 1024 bytes is needed, and 768 were reserved"):
        scratch.take((((256,), torch.float32),))
