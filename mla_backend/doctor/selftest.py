"""The chosen kernels against the reference, on this machine, with a model's own head widths."""

from collections.abc import Callable

import torch

from mla_kernels import Problem, Selection, reference
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode, make_prefill

SEQ_LENS = [130, 1, 65]  # on both sides of pages and tiles
SCALE = 0.3  # of a cache that has one


def _scaled(problem: Problem, where: str) -> dict:
    return {"cache_scale": torch.tensor([SCALE], device=where)} if problem.layout.format.scaled else {}


def _decode(selection: Selection, problem: Problem, where: str) -> None:
    layout = problem.layout
    case = make_decode(
        problem.geometry,
        SEQ_LENS,
        page_size=layout.page_size,
        dtype=problem.dtype,
        cache_dtype=layout.format.dtype,
        cache_scale=SCALE if layout.format.scaled else None,
        device=where,
    )
    splits = {"split_tokens": problem.split_tokens} if problem.split_tokens else {}
    out, lse = selection.kernel.run(*case.arrays, **case.options, **splits)
    wanted, wanted_lse = case.reference()
    assert_matches("lse", lse, wanted_lse, LSE_TOLERANCE)
    assert_matches("out", out, wanted, TOLERANCE[problem.dtype], case.magnitude())


def _prefill(selection: Selection, problem: Problem, where: str) -> None:
    case = make_prefill(problem.geometry, SEQ_LENS, dtype=problem.dtype, device=where)
    out, lse = selection.kernel.run(*case.arrays, **case.options)
    wanted, wanted_lse = case.reference()
    assert_matches("lse", lse, wanted_lse, LSE_TOLERANCE)
    assert_matches("out", out, wanted, TOLERANCE[problem.dtype])


def _rows(problem: Problem, where: str, tokens: int):
    geometry = problem.geometry
    rows = torch.randn(tokens, geometry.latent_dim, generator=torch.Generator().manual_seed(0)).to(where, problem.dtype)
    return rows, *rows.split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1)


def _cache_write(selection: Selection, problem: Problem, where: str) -> None:
    shape, dtype = problem.layout.shape(3), problem.layout.format.dtype
    got, wanted = torch.zeros(shape, dtype=dtype, device=where), torch.zeros(shape, dtype=dtype, device=where)
    rows, latent, rope = _rows(problem, where, shape[1] + 2)
    slots = torch.arange(len(rows), device=where).flip(0)
    slots[1] = -1  # padding
    selection.kernel.run(latent, rope, got, slots, **_scaled(problem, where))
    reference.cache_write(latent, rope, wanted, slots, **_scaled(problem, where))
    assert torch.equal(got.float(), wanted.float()), "rows are not where they belong"


def _cache_gather(selection: Selection, problem: Problem, where: str) -> None:
    layout = problem.layout
    rows, latent, rope = _rows(problem, where, 2 * layout.page_size)
    cache = torch.zeros(layout.shape(2), dtype=layout.format.dtype, device=where)
    reference.cache_write(latent, rope, cache, torch.arange(len(rows)), **_scaled(problem, where))
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=where)
    starts = torch.tensor([1], dtype=torch.int32, device=where)
    ends = torch.tensor([0, layout.page_size], dtype=torch.int32, device=where)
    got, wanted = torch.zeros_like(rows[: layout.page_size]), torch.zeros_like(rows[: layout.page_size])
    options = {"max_key_len": layout.page_size, **_scaled(problem, where)}
    selection.kernel.run(cache, table, starts, ends, got, **options)
    reference.cache_gather(cache, table, starts, ends, wanted, **options)
    assert torch.equal(got, wanted), "other rows than the cache holds"


def _merge(selection: Selection, problem: Problem, where: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, problem.geometry.num_heads, problem.geometry.v_head_dim)
    out, part = (torch.randn(shape, generator=generator).to(where, problem.dtype) for _ in range(2))
    lse, part_lse = (torch.randn(shape[:2], generator=generator).to(where) for _ in range(2))
    wanted, wanted_lse = out.double(), lse.double()
    reference.merge(wanted, wanted_lse, part.double(), part_lse.double())
    selection.kernel.run(out, lse, part, part_lse)
    assert_matches("lse", lse, wanted_lse, LSE_TOLERANCE)
    assert_matches("out", out, wanted, TOLERANCE[problem.dtype])


TESTS: dict[str, Callable[[Selection, Problem, str], None]] = {
    "decode": _decode,
    "prefill": _prefill,
    "cache_write": _cache_write,
    "cache_gather": _cache_gather,
    "merge": _merge,
}


def failure(selection: Selection, problem: Problem, where: str) -> str | None:
    """What is wrong with the kernel chosen for an operation, on one line; None if it computes what it should."""
    try:
        TESTS[selection.operation](selection, problem, where)
    except AssertionError as error:
        return f"{selection.kernel.name} computes something else than the reference: {error}"
    except Exception as error:  # whatever happens to a kernel here would happen in the engine
        return f"{selection.kernel.name} fails: {type(error).__name__}: {' '.join(str(error).split()):.200}"
    return None
