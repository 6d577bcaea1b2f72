"""Absorbed decode for Hopper in Gluon: persistent, warp-specialised, one schedule for every batch.

  1. One program an SM, the SMs divided among tiles of 64 query rows, finds its share of the batch's blocks of 64
     tokens from the lengths on the device (schedule.py). One warp (four, if pages fit no TMA box) copies their cache
     rows into two stages, one warpgroup multiplies queries with keys and takes the online softmax, two multiply its
     weights with values, which are the latent part of the keys in the same buffers (hopper_decode.py). Where a request
     has no more than 32 query rows, the products are transposed (hopper_few.py), which take half as long then, or less.
     An fp8 cache is copied as it is and becomes float16 in registers, transposed: with one scale whatever the number of
     rows (hopper_codes.py; beyond 32 of them hopper_turns.py), tile-scaled up to 32 of them (hopper_tiles.py). Beyond,
     tile-scaled rows are unpacked on their way, by one warpgroup (hopper_unpack.py).
  2. A request that was cut leaves partial answers, which a second kernel merges (split_merge.py).

Each of the two is launched while the kernel ahead ends, and waits for it before it reads or writes (programmatic
dependent launch). The first lets the second begin at once. The second lets the next kernel, another call's first for
one, begin when it has itself stopped waiting: a kernel that is launched so has to wait, and any other begins when all
is over. It is taken for granted that the kernel ahead of ours, if launched so itself, has waited: ours waits for that
one alone.

The same bits for the same batch, always. In another batch a request has the same bits with `split_tokens` alone: then
programs share fixed splits (splits.py), each of which is a piece, instead of blocks; and the number of heads, not of
query rows, says whether products are transposed.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_kernels.device import Device
from mla_kernels.hopper import SWIZZLED, barrier, device_refusals
from mla_kernels.hopper_codes_launch import decode_codes
from mla_kernels.hopper_decode import ROWS, accumulate, attend
from mla_kernels.hopper_few_launch import COLUMNS, columns_of, decode_few
from mla_kernels.hopper_launch import parts_of, prepare_launch, row_tiles, scratch_rows, scratch_shapes
from mla_kernels.hopper_load import LATENT, Cache, gather_keys, load_keys
from mla_kernels.hopper_shared import allocate
from mla_kernels.hopper_tiles_launch import decode_tiles
from mla_kernels.hopper_unpack import unpack_keys
from mla_kernels.launching import launch
from mla_kernels.primitives import E4M3, decode_outputs, reaching_all, scratch
from mla_kernels.repeats import repeat
from mla_kernels.schedule import BLOCK, share, share_splits
from mla_kernels.split_merge import merge_form, merge_parts
from mla_kernels.splits import merge_columns, merge_splits, prepare, reserved_rows, shapes

# Shape suffixes: T query tokens, B requests, N heads, L latent, R rope, K = L + R, A pages, G tokens a page, M pages a
# request. Buffers in shared memory end in _s.

# Query rows of a request up to which products are transposed. On an H200 (2026-11-27) 128 x 4096 tokens with 16 heads
# took 144 us so, 148 otherwise.
_FEW_ROWS = max(COLUMNS)
PIECE = 3  # of schedule.share: 200 short requests and two long ones, 128 heads: 159 us instead of 188


@gluon.jit(
    do_not_specialize=[
        "batch",
        "parts",
        "query_len",
        "page_rows",
        "rows_per_slot",
        "stride_table",
        "stride8_page",
        "turn",
        "window",
    ],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "query_start_ptr", "plan_ptr", "lse_ptr", "scale_ptr"],
)
def _decode_kernel(
    k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table,
    q_latent_ptr, q_rope_ptr, stride8_ql_t, stride8_ql_n, stride8_qr_t, stride8_qr_n,
    seq_lens_ptr, query_start_ptr, query_len, batch, parts, scale_log2,
    out_ptr, stride_out_t, stride_out_n, lse_ptr, stride_lse_t, stride_lse_n,
    part_ptr, part_lse_ptr, plan_ptr, rows_per_slot, scale_ptr, turn, window,
    N: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, RAGGED: gl.constexpr, GATHER: gl.constexpr,
    PACKED: gl.constexpr, LOADER_WARPS: gl.constexpr, LOADER_REGS: gl.constexpr,
    SPLIT: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    WRITTEN: gl.constexpr = GATHER or PACKED  # by threads, not TMA
    smem, q_s, q_rope_s = allocate(q_latent_ptr.dtype.element_ty, ROWS, [ROWS, BLOCK], SWIZZLED, GATHER)

    gdc_wait()  # for whoever wrote queries, cache or lengths
    gdc_launch_dependents()
    part = gl.program_id(1)
    if SPLIT > 0:
        shared = share_splits(seq_lens_ptr, batch, part, parts, turn, window, SPLIT)
        plan = shared  # there is none, and roles take no None
    else:
        shared, pieces, cuts, cuts_before = share(
            seq_lens_ptr, query_start_ptr, batch, part, parts, rows_per_slot, RAGGED, PIECE
        )  # fmt: skip
        plan = (plan_ptr, pieces, cuts, cuts_before)
    barrier()

    lengths = (seq_lens_ptr, query_start_ptr, query_len)
    work = (shared, lengths)
    to_load = ((shared[0], shared[1], shared[2], shared[3]), lengths)  # without slots: its registers are few
    q = (q_latent_ptr, q_rope_ptr, (stride8_ql_t, stride8_ql_n), (stride8_qr_t, stride8_qr_n), q_s, q_rope_s)
    lse = (lse_ptr, stride_lse_t, stride_lse_n, part_lse_ptr, rows_per_slot)
    out = (out_ptr, stride_out_t, stride_out_n, part_ptr, rows_per_slot)
    cache = Cache(k_desc, page_rows, cache_ptr, stride8_page, stride8_token, table_ptr, stride_table)
    if PACKED:
        gl.warp_specialize(
            [
                (
                    attend,
                    (q, lse, plan, scale_log2, scale_ptr, work, smem, N, R, RAGGED, WRITTEN, PACKED, SPLIT),
                ),
                (accumulate, (out, work, smem, N, RAGGED, WRITTEN, SPLIT)),
                (unpack_keys, (cache, to_load, smem, N, R, PAGE, RAGGED, ROWS)),
            ],
            [8, LOADER_WARPS],
            [160, LOADER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    attend,
                    (q, lse, plan, scale_log2, scale_ptr, work, smem, N, R, RAGGED, WRITTEN, PACKED, SPLIT),
                ),
                (accumulate, (out, work, smem, N, RAGGED, WRITTEN, SPLIT)),
                (gather_keys if GATHER else load_keys, (cache, to_load, smem, N, R, PAGE, RAGGED, ROWS)),
            ],
            [8, LOADER_WARPS],
            [160, LOADER_REGS],
        )


def _transposed(rows: int, heads: int, split_tokens: int | None) -> bool:
    """Whether queries are columns, which those of an fp8 cache with one scale always are. With fixed splits the heads
    alone decide: bits of a query row must not depend on how many query tokens the batch brings."""
    return (heads if split_tokens else rows) <= _FEW_ROWS


def _height(rows: int, heads: int, split_tokens: int | None = None) -> int:
    """Query rows of a tile."""
    return columns_of(rows) if _transposed(rows, heads, split_tokens) else ROWS.value


def unsupported(problem, device: Device) -> list[str]:
    reasons = device_refusals(device)
    geometry, layout = problem.geometry, problem.layout
    fp8 = layout.format.packed or layout.format.dtype == E4M3
    if problem.dtype not in (torch.bfloat16, torch.float16) or not (fp8 or layout.format.dtype == problem.dtype):
        got = f"{problem.dtype} queries and {layout.format.name} cache"
        reasons.append(f"needs bfloat16 or float16 queries, and a cache of the same or fp8, got {got}")
    if problem.split_tokens and fp8:
        got = f"{layout.format.name} and splits of {problem.split_tokens} tokens"
        reasons.append(f"needs a 16-bit cache for fixed splits, got {got}")
    if geometry.kv_lora_rank != 512 or geometry.qk_rope_head_dim not in (0, 64):
        reasons.append(f"needs latent 512 + rope 64 or 0, got {geometry.kv_lora_rank} + {geometry.qk_rope_head_dim}")
    rows = geometry.num_heads * problem.max_query_len
    height = _height(rows, geometry.num_heads, problem.split_tokens)
    if row_tiles(rows, height) > device.num_sms:
        reasons.append(f"needs heads x query tokens of {height * device.num_sms} or less, got {rows}")
    return reasons


def workspace(problem, device: Device, *, max_requests: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """(shape, dtype) of the scratch tensors that `run` takes: partial outputs, their base-2 LSE, the plan.

    The same for any number of requests: on a GPU of 132 multiprocessors 8.3 MiB for 16 query rows, 33.1 at most. With
    fixed splits what splits.py says, without a plan.
    """
    heads = problem.geometry.num_heads
    if problem.split_tokens:
        most = heads * problem.max_query_len
        return shapes(reserved_rows(most, max_requests, problem.max_seq_len, problem.split_tokens), LATENT.value)
    calls = (heads * tokens for tokens in range(1, problem.max_query_len + 1))
    return scratch_shapes(max(scratch_rows(rows, _height(rows, heads), device) for rows in calls), device)


def variants(problem, device: Device, *, max_requests: int, query_lens) -> list[tuple[int, int]]:
    """(requests, query tokens of each) of calls that between them take every form that kernels have for up to
    `max_requests` requests of any of `query_lens` tokens."""

    def forms(requests, query_len):
        heads = problem.geometry.num_heads
        rows = query_len * heads
        height = _height(rows, heads, problem.split_tokens)
        if problem.split_tokens:
            return height, merge_columns(requests, rows, LATENT.value)
        return height, merge_form(requests, parts_of(rows, height, device), rows)

    return reaching_all(forms, max_requests, query_lens)


def _decode_rows(
    prepared, rows: int, parts: int, part, part_lse, plan, cache_scale=None, *, turn=None, window=None, split=0
) -> None:
    """Start the kernel whose queries are rows.  split: blocks of a fixed one; with it there are turns and no plan."""
    gather, packed, page = prepared.gather, prepared.packed, prepared.constants["PAGE"]
    gather_registers = 40 if split else 32
    loader_registers = 72 if packed else gather_registers if gather or page < BLOCK.value else 24
    launch(
        _decode_kernel, (row_tiles(rows, ROWS.value), parts),
        *prepared.before_parts, parts, *prepared.behind_parts, part, part_lse, plan, rows, cache_scale, turn, window,
        GATHER=gather, PACKED=packed, SPLIT=split, PIECE=PIECE, **prepared.constants,
        LOADER_WARPS=4 if gather or packed else 1, LOADER_REGS=loader_registers, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def run(
    q_latent_TNL,
    q_rope_TNR,
    cache_AGK,
    block_table_BM,
    seq_lens_B,
    *,
    scale,
    query_len=1,
    query_start_B1=None,
    out_TNL=None,
    lse_TN=None,
    workspace=None,
    cache_scale=None,
    split_tokens=None,
):
    """Same contract as reference.decode, but rows of `out_TNL` that no request owns keep what they held."""
    outputs = decode_outputs(
        q_latent_TNL, len(seq_lens_B), query_len, ragged=query_start_B1 is not None, out_TNL=out_TNL, lse_TN=lse_TN
    )
    tensors = q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B, query_start_B1, *outputs, cache_scale
    repeat(_launch_all, (scale, query_len, split_tokens), (*tensors, *(() if workspace is None else workspace)))
    return outputs


def _launch_all(
    scale, query_len, split_tokens,
    q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B, query_start_B1, out_TNL, lse_TN, cache_scale,
    *workspace,
) -> None:  # fmt: skip
    """workspace: none for new tensors."""
    workspace = workspace or None
    heads = q_latent_TNL.shape[1]
    rows = query_len * heads
    prepared = prepare_launch(
        q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B,
        scale=scale, query_len=query_len, query_start_B1=query_start_B1, out_TNL=out_TNL, lse_TN=lse_TN,
        in_words=not _transposed(rows, heads, split_tokens),
    )  # fmt: skip
    if prepared.empty:
        return
    device, requests = prepared.device, len(seq_lens_B)
    height = _height(rows, heads, split_tokens)
    parts = parts_of(rows, height, device)
    if split_tokens is None:
        needed = scratch_shapes(scratch_rows(rows, height, device), device)
        part, part_lse, plan = scratch(workspace, needed, cache_AGK.device)
        if prepared.codes:
            decode_codes(prepared, rows, height, parts, part, part_lse, plan, cache_scale)
        elif prepared.packed and _transposed(rows, heads, None):
            decode_tiles(prepared, rows, height, parts, part, part_lse, plan)
        elif _transposed(rows, heads, None):
            decode_few(prepared, rows, height, parts, part, part_lse, plan, cache_scale)
        else:
            _decode_rows(prepared, rows, parts, part, part_lse, plan, cache_scale)
        merge_parts(
            out_TNL, lse_TN, part, part_lse, plan, query_start_B1,
            query_len=query_len, rows=rows, requests=requests, parts=parts, num_sms=device.num_sms, overlap=True,
        )  # fmt: skip
        return

    assert not prepared.codes, "`unsupported` refuses fixed splits of fp8 caches"
    assert not prepared.packed, "and of tile-scaled ones"
    part, part_lse, turns = prepare(
        workspace, (rows, LATENT.value), block_table_BM, cache_AGK, split_tokens=split_tokens
    )
    for turn in range(turns.count):
        of_turn = {"turn": turn, "window": turns.window, "split": split_tokens // BLOCK.value}
        if _transposed(rows, heads, split_tokens):
            decode_few(prepared, rows, height, parts, part, part_lse, None, **of_turn)
        else:
            _decode_rows(prepared, rows, parts, part, part_lse, None, **of_turn)
        merge_splits(
            out_TNL, lse_TN, part, part_lse, seq_lens_B, query_start_B1,
            query_len=query_len, split_tokens=split_tokens, turns=turns, turn=turn, device=device, overlap=True,
        )  # fmt: skip
