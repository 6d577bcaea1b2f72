"""Selection: best first, named never replaced, every reason told."""

import re
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from mla_kernels import (
    FORMATS,
    OPERATIONS,
    CacheLayout,
    Device,
    Kernel,
    MLAGeometry,
    Problem,
    UnsupportedMLA,
    by_name_alone,
    select,
)
from mla_kernels.device import device_of, interpreting

H200 = Device("cuda", 90, "NVIDIA H200", 132)
A100 = Device("cuda", 80, "NVIDIA A100", 108)
B200 = Device("cuda", 100, "NVIDIA B200", 148)
T4 = Device("cuda", 75, "Tesla T4", 40)
MI300 = Device("hip", "gfx942", "AMD Instinct MI300X", 304)
CPU = Device("cpu")
INTERPRETER = Device("cpu", interpreted=True)
GEOMETRY = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def problem_for(dtype=torch.bfloat16, name="bf16", page_size=64, geometry=GEOMETRY, **more):
    layout = CacheLayout(geometry=geometry, format=FORMATS[name], page_size=page_size)
    return Problem(layout=layout, dtype=dtype, **more)


PROBLEM = problem_for()


def fake_kernel(monkeypatch, name: str, *reasons: str, unsupported=None) -> Kernel:
    """A kernel module `fake_kernels.<name>` that gives these reasons, or calls `unsupported`."""
    module = ModuleType(f"fake_kernels.{name}")
    module.unsupported = unsupported or (lambda problem, device: list(reasons))
    module.run = lambda: f"ran {name}"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Kernel(module=module.__name__)


@pytest.fixture
def offer(monkeypatch):
    """offer(*kernels): make these the candidates for decode, best first."""
    return lambda *kernels: monkeypatch.setitem(OPERATIONS, "decode", kernels)


def raising(error: Exception):
    def unsupported(problem, device):
        raise error

    return unsupported


def test_best_supported_kernel_wins(monkeypatch, offer):
    offer(fake_kernel(monkeypatch, "best"), fake_kernel(monkeypatch, "second"))
    chosen = select("decode", PROBLEM, H200)
    assert chosen.kernel.name == "best"
    assert chosen.kernel.run() == "ran best"
    assert chosen.refused == {}
    assert str(chosen) == "best"


def test_selection_goes_down_the_list_and_says_why(monkeypatch, offer):
    offer(
        fake_kernel(monkeypatch, "best", "needs sm_100, got sm_90"),
        fake_kernel(monkeypatch, "second", "page size must be 128, got 64", "heads must be 128, got 16"),
        fake_kernel(monkeypatch, "third"),
        fake_kernel(monkeypatch, "fourth", unsupported=raising(AssertionError("asked although a better one fits"))),
    )
    chosen = select("decode", PROBLEM, H200)
    assert chosen.kernel.name == "third"
    assert list(chosen.refused) == ["best", "second"]
    assert str(chosen) == (
        "third (not best: needs sm_100, got sm_90; second: page size must be 128, got 64, heads must be 128, got 16)"
    )


def test_named_kernel_is_used_although_a_better_one_fits(monkeypatch, offer):
    offer(fake_kernel(monkeypatch, "best"), fake_kernel(monkeypatch, "second"))
    assert select("decode", PROBLEM, H200, kernel="second").kernel.name == "second"


def test_named_kernel_is_never_replaced(monkeypatch, offer):
    offer(fake_kernel(monkeypatch, "best", "needs sm_100, got sm_90"), fake_kernel(monkeypatch, "second"))
    with pytest.raises(UnsupportedMLA, match="best: needs sm_100, got sm_90") as error:
        select("decode", PROBLEM, H200, kernel="best")
    assert "second" not in str(error.value)


def test_error_lists_every_reason_of_every_kernel(monkeypatch, offer):
    offer(
        fake_kernel(monkeypatch, "best", "needs sm_100, got sm_75", "fp8 only, got bf16"),
        fake_kernel(monkeypatch, "second", "no bf16 before sm_80, got sm_75"),
    )
    with pytest.raises(UnsupportedMLA) as error:
        select("decode", PROBLEM, T4)
    assert str(error.value).splitlines() == [
        "no MLA decode kernel for 16 heads, latent 512 + rope 64, nope 128, v 128; torch.bfloat16 queries, bf16 cache, "
        "pages of 64, up to 1 query tokens on Tesla T4 sm_75",
        "  best: needs sm_100, got sm_75; fp8 only, got bf16",
        "  second: no bf16 before sm_80, got sm_75",
    ]
    assert isinstance(error.value, NotImplementedError)


def test_missing_library_is_a_reason(monkeypatch, offer):
    missing = Kernel(module="library_that_nobody_has.kernels")
    offer(missing, fake_kernel(monkeypatch, "second"))
    chosen = select("decode", PROBLEM, H200)
    assert chosen.kernel.name == "second"
    assert chosen.refused == {"kernels": ["needs the package library_that_nobody_has, which is not installed"]}


@pytest.mark.parametrize("error", [ImportError("libcuda.so.1"), OSError("bad ELF"), SyntaxError("oops"), KeyError("x")])
def test_other_import_errors_propagate(monkeypatch, offer, error):
    """A library that is there but broken must be seen, not silently replaced by a slower kernel."""
    offer(fake_kernel(monkeypatch, "best", unsupported=raising(error)), fake_kernel(monkeypatch, "second"))
    with pytest.raises(type(error)):
        select("decode", PROBLEM, H200)


def test_missing_module_of_ours_propagates(monkeypatch, offer):
    """A typo in our own import is a fault, not a package that the user lacks."""
    offer(Kernel(module="mla_kernels.decode.no_such_kernel"), fake_kernel(monkeypatch, "second"))
    with pytest.raises(ModuleNotFoundError, match="no_such_kernel"):
        select("decode", PROBLEM, H200)


def test_broken_module_propagates(monkeypatch, offer, tmp_path):
    (tmp_path / "broken_kernel_module.py").write_text("from torch import there_is_no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    offer(Kernel(module="broken_kernel_module"), fake_kernel(monkeypatch, "second"))
    with pytest.raises(ImportError, match="there_is_no_such_name"):
        select("decode", PROBLEM, H200)


def test_another_triton_is_a_reason(monkeypatch, offer, tmp_path):
    (tmp_path / "kernel_of_tomorrow.py").write_text("from triton.language import there_is_no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    offer(Kernel(module="kernel_of_tomorrow"), fake_kernel(monkeypatch, "second"))
    chosen = select("decode", PROBLEM, H200)
    assert chosen.kernel.name == "second"
    assert re.search("needs another Triton: .*there_is_no_such_name", chosen.refused["kernel_of_tomorrow"][0])


def test_unknown_operation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown operation 'encode'; choose from decode, prefill, cache_write"):
        select("encode", PROBLEM, H200)


@pytest.mark.parametrize("name", ["flashinfer", "", "mla_kernels.decode.triton_splitkv", "AUTO"])
def test_unknown_kernel_names_the_known_ones(name):
    known = "auto, gluon_sm90, triton_splitkv, torch_decode"
    with pytest.raises(ValueError, match=rf"unknown decode kernel .*; choose from {known}"):
        select("decode", PROBLEM, H200, kernel=name)


CANDIDATES = [
    pytest.param(operation, kernel, id=f"{operation}-{kernel.name}")
    for operation, kernels in OPERATIONS.items()
    for kernel in kernels
]


@pytest.mark.parametrize(("operation", "kernel"), CANDIDATES)
def test_every_candidate_has_the_two_functions(operation, kernel):
    module = kernel.load()
    assert callable(module.unsupported)
    assert callable(module.run)


@pytest.mark.parametrize(("operation", "kernel"), CANDIDATES)
def test_unsupported_answers_without_the_device(operation, kernel):
    """Reasons are about a described device: none of these is in this machine."""
    for device in (H200, T4, MI300, CPU, INTERPRETER):
        reasons = kernel.unsupported(PROBLEM, device)
        assert isinstance(reasons, list)
        assert all(isinstance(reason, str) and reason for reason in reasons)


@pytest.mark.parametrize(("operation", "kernel"), CANDIDATES)
def test_cpu_without_interpreter_refuses_gpu_kernels(operation, kernel):
    if kernel.name.startswith("torch_"):
        assert kernel.unsupported(problem_for(torch.float32, "fp32"), CPU) == []
        return
    assert kernel.unsupported(problem_for(torch.float32, "fp32"), CPU) != []
    with pytest.raises(UnsupportedMLA, match=f"{kernel.name}: "):
        select(operation, problem_for(torch.float32, "fp32"), CPU, kernel=kernel.name)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_automatic_choice(operation):
    """Triton on GPUs and in the interpreter (on Hopper Gluon for attention), PyTorch on a plain CPU, and the reason."""
    assert select(operation, PROBLEM, MI300).kernel.name.startswith("triton_")
    assert select(operation, PROBLEM, H200).kernel.name.startswith(
        "gluon_" if operation in ("decode", "prefill") else "triton_"
    )
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16")):
        chosen = select(operation, problem_for(dtype, name), INTERPRETER)
        assert chosen.kernel.name.startswith("triton_"), str(chosen)
    plain = select(operation, problem_for(torch.float32, "fp32"), CPU)
    assert plain.kernel.name.startswith("torch_")
    assert all(plain.refused.values())


def test_what_is_taken_by_its_name_alone():
    """With what speaks against it here; no automatic choice says a word about it."""
    told = {operation: by_name_alone(operation, PROBLEM, CPU) for operation in OPERATIONS}
    assert {operation: list(names) for operation, names in told.items() if names} == {
        "decode": ["flashinfer_mla"],
        "prefill": ["flashinfer_ragged"],
    }
    assert all("needs sm_90, got cpu" in reasons for names in told.values() for reasons in names.values())


@pytest.mark.parametrize(
    ("problem", "device", "reason"),
    [
        (problem_for(torch.float32, "fp32"), H200, "needs bfloat16 or float16 queries, and a cache of the same or fp8"),
        (problem_for(torch.bfloat16, "fp16"), H200, "a cache of the same or fp8, got torch.bfloat16 queries and fp16"),
        (
            problem_for(torch.bfloat16, "fp8", split_tokens=384, max_seq_len=4096),
            H200,
            "needs a 16-bit cache for fixed splits, got fp8",
        ),
        (problem_for(torch.bfloat16, "fp8", max_query_len=529), H200, "tokens of 8448 or less, got 8464"),
        (problem_for(geometry=replace(GEOMETRY, kv_lora_rank=256)), H200, "needs latent 512 .* got 256"),
        (PROBLEM, A100, "needs sm_90, got NVIDIA A100 sm_80"),
        (PROBLEM, B200, "needs sm_90, got NVIDIA B200 sm_100"),
        (PROBLEM, MI300, "needs sm_90, got AMD Instinct MI300X gfx942"),
        (problem_for(torch.float16, "fp16"), INTERPRETER, "needs sm_90, got cpu, Triton interpreter"),
        (PROBLEM, replace(H200, interpreted=True), "Triton's interpreter does not run Gluon"),
    ],
    ids=str,
)
def test_hopper_kernel_says_where_it_does_not_fit(problem, device, reason):
    with pytest.raises(UnsupportedMLA) as error:
        select("decode", problem, device, kernel="gluon_sm90")
    (only,) = str(error.value).splitlines()[1:]
    assert re.search(f"gluon_sm90: .*{reason}", only)


def test_hopper_kernel_takes_pages_of_any_size():
    for page_size in (1, 16, 48, 64):
        assert select("decode", problem_for(page_size=page_size), H200, kernel="gluon_sm90").kernel.name == "gluon_sm90"


def test_problem_says_what_was_asked():
    assert str(problem_for(torch.float16, "fp32", page_size=16, max_query_len=4)) == (
        "16 heads, latent 512 + rope 64, nope 128, v 128; torch.float16 queries, fp32 cache, "
        "pages of 16, up to 4 query tokens"
    )


def test_device_of_a_cpu_follows_the_interpreter_switch(monkeypatch):
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert interpreting() is expected
        assert device_of(torch.zeros(1)) == Device("cpu", interpreted=expected)
        assert device_of("cpu").runs_triton is expected
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not interpreting()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (H200, 232448),
        (Device("cuda", 86), 101376),  # 99 KB: the smallest that kernels must fit since sm_80
        (Device("cuda", 89), 101376),
        (Device("cuda", 120), 101376),
        (Device("cuda", 80), 166912),
        (MI300, 65536),
        (Device("cuda", 999), 65536),  # unknown: the smallest known
    ],
    ids=str,
)
def test_shared_memory(device, expected):
    assert device.shared_bytes == expected
