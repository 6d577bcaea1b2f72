"""FlashInfer's absorbed decode for Hopper (its backend "fa3"), taken by its name alone: it was not found to be faster.

For each call the host reads the batch's lengths, lists its pages and plans (flashinfer_calls.py). So it runs in no
CUDA graph, and in every layer the host waits for the GPU instead of running ahead of it.
Where FlashInfer's kernels are not installed ready made (package flashinfer-jit-cache), its first plan compiles them
with nvcc, for a minute or more; the warm-up before serving makes one.
"""

from itertools import accumulate, pairwise

import torch

from mla_kernels.device import Device
from mla_kernels.flashinfer_calls import aligned, clear_blind, ints, is_aligned, kept, on_host, refusals
from mla_kernels.primitives import LN_2, decode_outputs, require_adjacent, scratch

# Shape suffixes: T query tokens, B requests, N heads, L latent, R rope, K = L + R, A pages, G tokens a page, M pages a
# request, U pages that a batch uses.

CAPTURABLE = False

_WORKSPACE = (((128 << 20,), torch.uint8),)  # bytes that FlashInfer's documentation recommends
_TILE = 64  # query rows that a program has at least
_MOST_TILES = 1 << 13  # of a plan: FlashInfer (0.6.14) writes 16,384 pieces, each tile's and cuts', and does not count


def unsupported(problem, device: Device) -> list[str]:
    reasons, geometry, layout = refusals(problem, device), problem.geometry, problem.layout
    if layout.format.dtype != torch.bfloat16:
        reasons.append(f"cache must be bfloat16, got {layout.format.name}")
    if (geometry.kv_lora_rank, geometry.qk_rope_head_dim) != (512, 64):
        reasons.append(f"needs latent 512 + rope 64, got {geometry.kv_lora_rank} + {geometry.qk_rope_head_dim}")
    if problem.split_tokens:
        reasons.append(f"cuts requests where the batch wants it, got splits of {problem.split_tokens} tokens")
    rows = geometry.num_heads * problem.max_query_len
    if rows > _TILE * _MOST_TILES:
        reasons.append(f"needs heads x query tokens of {_TILE * _MOST_TILES} or less, got {rows}")
    return reasons


def workspace(problem, device: Device, *, max_requests: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """(shape, dtype) of the scratch tensors that `run` takes; FlashInfer has 8 MiB beside it."""
    return _WORKSPACE


def variants(problem, device: Device, *, max_requests: int, query_lens) -> list[tuple[int, int]]:
    """(requests, query tokens of each) of a call that compiles and loads what all calls take."""
    return [(1, query_len) for query_len in list(query_lens)[:1]]


def _wrapper(workspace):
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    return BatchMLAPagedAttentionWrapper(workspace, backend="fa3")


def _pages_of(block_table_BM, pages: list[int]):
    """The first pages[b] entries of each row b of a block table, one after another; found without a wait."""
    total, device = sum(pages), block_table_BM.device
    if not total:
        return block_table_BM.new_zeros(1)  # never read, but an address
    pages_B = torch.tensor(pages, device=device)
    request_U = torch.repeat_interleave(pages_B, output_size=total)
    place_U = torch.arange(total, device=device) - (pages_B.cumsum(0) - pages_B)[request_U]
    return block_table_BM[request_U, place_U].int()


def _plans(starts: list[int], heads: int):
    """Slices of requests, in their order, of as many tiles of query rows as one plan may have."""
    first = tiles = 0
    for b, (begin, end) in enumerate(pairwise(starts)):
        mine = -(-(end - begin) * heads // _TILE)
        if tiles + mine > _MOST_TILES and b > first:
            yield slice(first, b)
            first, tiles = b, 0
        tiles += mine
    yield slice(first, len(starts) - 1)


def _in_reach(x):
    """`x`, or a copy whose elements FlashInfer's 32-bit offsets count."""
    return aligned(x) if len(x) * x.stride(0) < 1 << 32 else x.clone(memory_format=torch.contiguous_format)


def _attend(wrapper, queries, cache_AGK, block_table_BM, lens, starts, scale, out_TNL, lse_TN) -> None:
    """Plan for these requests and write their rows; `starts` begins with 0."""
    (_, heads, latent), page_size = out_TNL.shape, cache_AGK.shape[1]
    pages = [-(-length // page_size) for length in lens]
    wrapper.plan(
        ints(starts),
        ints([0, *accumulate(pages)]),
        _pages_of(block_table_BM, pages),
        ints(lens),
        heads,
        latent,
        cache_AGK.shape[2] - latent,
        page_size,
        True,  # causal: query tokens are the last of their request
        scale,
        out_TNL.dtype,
        cache_AGK.dtype,
    )
    if not len(out_TNL):  # planned all the same, which compiles and loads the kernel: a warm-up has no more to ask
        return
    writable = is_aligned(out_TNL) and len(out_TNL) * out_TNL.stride(0) < 1 << 32
    answer_TNL, lse2_TN = wrapper.run(
        *map(_in_reach, queries),
        cache_AGK[..., :latent],
        cache_AGK[..., latent:],
        out=out_TNL if writable else None,
        return_lse=True,
    )
    if not writable:
        out_TNL.copy_(answer_TNL)
    torch.mul(lse2_TN, LN_2.value, out=lse_TN)  # FlashInfer's has base 2
    clear_blind(out_TNL, lse_TN, starts, lens, causal=True)


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
):
    """Same contract as reference.decode, but rows of `out_TNL` that no request owns keep what they held.

    Waits for the GPU, and raises RuntimeError in a CUDA graph.
    """
    requests, ragged = len(seq_lens_B), query_start_B1 is not None
    out_TNL, lse_TN = decode_outputs(q_latent_TNL, requests, query_len, ragged=ragged, out_TNL=out_TNL, lse_TN=lse_TN)
    require_adjacent(q_latent=q_latent_TNL, q_rope=q_rope_TNR, cache=cache_AGK, out=out_TNL)
    if not is_aligned(cache_AGK):
        raise ValueError(f"rows of the cache must lie at multiples of 16 bytes, got strides of {cache_AGK.stride()}")
    if not requests or not len(q_latent_TNL):
        return out_TNL, lse_TN
    if ragged:
        lens, starts = on_host("flashinfer_mla", seq_lens_B, query_start_B1)
    else:
        (lens,), starts = on_host("flashinfer_mla", seq_lens_B), [query_len * b for b in range(requests + 1)]
    (buffer,) = scratch(workspace, _WORKSPACE, cache_AGK.device)
    wrapper = kept("decode", (buffer.device, buffer.data_ptr(), len(buffer)), lambda: _wrapper(buffer))
    for mine in _plans(starts, q_latent_TNL.shape[1]):
        first, last = starts[mine.start], starts[mine.stop]
        _attend(
            wrapper,
            (q_latent_TNL[first:last], q_rope_TNR[first:last]),
            cache_AGK,
            block_table_BM[mine],
            lens[mine],
            [start - first for start in starts[mine.start : mine.stop + 1]],
            scale,
            out_TNL[first:last],
            lse_TN[first:last],
        )
    return out_TNL, lse_TN
