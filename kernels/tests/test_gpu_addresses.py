"""Addresses past 2^31 elements: the same values, spread out over gigabytes, give the same bits."""

import pytest
import torch

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, device_of, format_of
from mla_kernels.testing import make_decode, make_prefill, make_so_far

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GEOMETRY = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
FAR = 2**31 + 2**28  # elements


def spread(tensor: torch.Tensor, multiple: int = 64) -> torch.Tensor:
    """A copy whose first dimension has so large a stride that its last entries lie past FAR.

    multiple: of what the stride is one.
    """
    if torch.cuda.mem_get_info()[0] < 2 * FAR * tensor.itemsize:
        pytest.skip(f"needs {2 * FAR * tensor.itemsize >> 30} GiB of free memory")
    stride = -(-FAR // (len(tensor) - 1) // multiple) * multiple
    storage = torch.full(
        (stride * (len(tensor) - 1) + tensor[0].numel(),), torch.nan, dtype=tensor.dtype, device="cuda"
    )
    view = storage.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride()))
    return view.copy_(tensor)


def triton_kernel(operation: str):
    return next(k for k in OPERATIONS[operation] if k.name.startswith("triton"))


def skip_unless_it_runs(kernel, page_size: int = 64):
    layout = CacheLayout(geometry=GEOMETRY, format=format_of(torch.bfloat16), page_size=page_size)
    if reasons := kernel.unsupported(Problem(layout=layout, dtype=torch.bfloat16), device_of("cuda")):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("kernel", [k for k in OPERATIONS["decode"] if k.name[:5] != "torch"], ids=lambda k: k.name)
@pytest.mark.parametrize(("page_size", "multiple"), [(64, 576), (16, 576), (64, 64)])
@pytest.mark.parametrize("few_rows", [0, 32])
def test_decode_far_pages_queries_and_outputs(kernel, page_size, multiple, few_rows, monkeypatch):
    """Bulk copies see the pool as rows one token apart; where pages do not begin at a row, others take over.

    few_rows: up to which gluon_sm90 has queries as columns of its matrix instructions.
    """
    skip_unless_it_runs(kernel, page_size)
    if kernel.name == "gluon_sm90":
        monkeypatch.setattr(kernel.load(), "_FEW_ROWS", few_rows)
    elif few_rows:
        pytest.skip("has one form")
    case = make_decode(GEOMETRY, [700, 300], page_size=page_size, dtype=torch.bfloat16, device="cuda")
    q_latent, q_rope, cache, *rest = case.arrays
    run = kernel.run
    expected, expected_lse = run(*case.arrays, **case.options)
    out, lse = run(q_latent, q_rope, spread(cache, multiple), *rest, **case.options)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    far = spread(expected)
    run(spread(q_latent), spread(q_rope), cache, *rest, **case.options, out_TNL=far.fill_(torch.nan))
    assert torch.equal(far, expected)


@pytest.mark.parametrize("kernel", [k for k in OPERATIONS["prefill"] if k.name[:5] != "torch"], ids=lambda k: k.name)
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_far_tokens(kernel, causal):
    skip_unless_it_runs(kernel)
    case = make_prefill(GEOMETRY, [700, 300], causal=causal, dtype=torch.bfloat16, device="cuda")
    q, k_nope, k_rope, v, *starts = case.arrays
    run = kernel.run
    expected, expected_lse = run(*case.arrays, **case.options)
    for position, tensor in enumerate((q, k_nope, v)):
        arrays = [q, k_nope, k_rope, v, *starts]
        arrays[{0: 0, 1: 1, 2: 3}[position]] = spread(tensor)
        out, lse = run(*arrays, **case.options)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
    far = spread(expected)
    run(*case.arrays, **case.options, out_TNV=far.fill_(torch.nan))
    assert torch.equal(far, expected)
    so_far = make_so_far(case)
    near = [x.clone() for x in so_far]
    run(*case.arrays, **case.options, accumulate=True, out_TNV=near[0], lse_TN=near[1])
    run(*case.arrays, **case.options, accumulate=True, out_TNV=far.copy_(so_far[0]), lse_TN=so_far[1])
    assert torch.equal(far, near[0])
    assert torch.equal(so_far[1], near[1])


def test_cache_write_and_gather_far_pages():
    pages, page_size = 40, 16
    rows = torch.randn(pages * page_size, GEOMETRY.latent_dim, dtype=torch.bfloat16, device="cuda")
    cache = spread(torch.zeros(pages, page_size, GEOMETRY.latent_dim, dtype=torch.bfloat16, device="cuda"))
    slots = torch.randperm(len(rows), device="cuda")
    latent, rope = rows.split([GEOMETRY.kv_lora_rank, GEOMETRY.qk_rope_head_dim], -1)
    triton_kernel("cache_write").run(latent, rope, cache, slots)
    assert torch.equal(cache.flatten(0, 1)[slots], rows)
    table = torch.arange(pages, dtype=torch.int32, device="cuda")[None]
    bounds = torch.tensor([0, len(rows)], dtype=torch.int32, device="cuda")
    out = torch.empty_like(rows)
    triton_kernel("cache_gather").run(cache, table, bounds[:1], bounds, out, max_key_len=len(rows))
    assert torch.equal(out[slots], rows)


def test_merge_far_tokens():
    out, part = torch.randn(2, 600, 16, 128, device="cuda").bfloat16()
    lse, part_lse = torch.randn(2, 600, 16, device="cuda")
    run = triton_kernel("merge").run
    far, far_lse = run(spread(out), lse.clone(), spread(part), part_lse)
    expected, expected_lse = run(out.clone(), lse.clone(), part, part_lse)
    assert torch.equal(far, expected)
    assert torch.equal(far_lse, expected_lse)
