"""Our kernels without any engine: fill a paged latent cache, attend to it, check the result, count the bytes.

    python examples/kernels_only.py

With DeepSeek-V3's geometry, on the GPU where there is one, else on the CPU (`TRITON_INTERPRET=1` takes the Triton
kernels there, too).
"""

import torch

from mla_kernels import (
    CacheLayout,
    MLAGeometry,
    Problem,
    device_of,
    expanded_bytes_per_token,
    format_of,
    reference,
    select,
)
from mla_kernels.testing import TOLERANCE, assert_matches

GEOMETRY = MLAGeometry(num_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
LAYERS = 61
PAGE_SIZE = 64
SEQ_LENS = [700, 1, 129]  # cached tokens of three requests


def shuffled_pages(layout: CacheLayout, seq_lens: list[int], device: str):
    """An empty pool, and a block table that gives each request pages from anywhere in it."""
    counts = [-(-seq_len // layout.page_size) for seq_len in seq_lens]
    cache_AGK = torch.zeros(layout.shape(sum(counts)), dtype=layout.format.dtype, device=device)
    table_BM = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
    for row, pages in zip(table_BM, torch.randperm(sum(counts)).split(counts), strict=True):
        row[: len(pages)] = pages
    return cache_AGK, table_BM


def slots_of(table_BM, seq_lens: list[int], page_size: int) -> torch.Tensor:
    """Where each token's row goes: page number * page size + place in the page."""
    tokens = [torch.arange(seq_len, device=table_BM.device) for seq_len in seq_lens]
    return torch.cat(
        [pages[t // page_size] * page_size + t % page_size for pages, t in zip(table_BM, tokens, strict=True)]
    )


def decode_once(problem: Problem, device: str) -> None:
    """Write rows of random tokens, let one query a request attend to them, compare both with the reference."""

    def random(*shape):
        return torch.randn(*shape, device=device).to(problem.dtype)

    layout, geometry = problem.layout, problem.geometry
    write, decode = (select(operation, problem, device_of(device)) for operation in ("cache_write", "decode"))
    print(f"cache write by {write}\ndecode by {decode}")

    cache, table = shuffled_pages(layout, SEQ_LENS, device)
    layout.check(cache)
    rows = random(sum(SEQ_LENS), geometry.latent_dim).split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1)
    slots, expected_cache = slots_of(table, SEQ_LENS, layout.page_size), cache.clone()
    write.kernel.run(*rows, cache, slots)
    reference.cache_write(*rows, expected_cache, slots)
    assert torch.equal(cache, expected_cache)

    # Absorbed queries: the key up-projection has been applied, so they have the width of the latent.
    q_latent = random(len(SEQ_LENS), geometry.num_heads, geometry.kv_lora_rank)
    q_rope = random(len(SEQ_LENS), geometry.num_heads, geometry.qk_rope_head_dim)
    seq_lens = torch.tensor(SEQ_LENS, dtype=torch.int32, device=device)
    batch, scale = (table, seq_lens), geometry.softmax_scale
    out, lse = decode.kernel.run(q_latent, q_rope, cache, *batch, scale=scale)
    expected, expected_lse = reference.decode(q_latent.double(), q_rope.double(), cache.double(), *batch, scale=scale)
    assert_matches("attention", out, expected, TOLERANCE[problem.dtype])
    assert_matches("log-sum-exp", lse, expected_lse, TOLERANCE[torch.float32])
    error = (out - expected).abs().max().item()
    print(f"{len(SEQ_LENS)} requests of {SEQ_LENS} tokens: equal to the reference, largest error {error:.1e}\n")


def print_memory(geometry: MLAGeometry, dtype: torch.dtype) -> None:
    """Cache bytes a token of the whole model, and the tokens that 1 GiB holds, beside other kinds of attention."""
    latent = CacheLayout(geometry=geometry, format=format_of(dtype), page_size=PAGE_SIZE)
    bytes_per_token = {
        "MLA": latent.row_bytes,
        "MHA": expanded_bytes_per_token(geometry, dtype),
        "GQA-8": expanded_bytes_per_token(geometry, dtype, kv_heads=8),
        "MQA": expanded_bytes_per_token(geometry, dtype, kv_heads=1),
    }
    print(f"{geometry}; {LAYERS} layers, {dtype} cache")
    print(f"{'':6}{'bytes a token and layer':>25}{'bytes a token':>15}{'tokens in 1 GiB':>17}")
    for name, one_layer in bytes_per_token.items():
        tokens = latent.tokens_in(1 << 30, num_layers=LAYERS) if name == "MLA" else (1 << 30) // (one_layer * LAYERS)
        print(f"{name:6}{one_layer:25,}{one_layer * LAYERS:15,}{tokens:17,}")
    print("\nMLA makes a token small, not free: the cache still grows linearly with the number of tokens.")
    for tokens in (16_384, 32_768, 131_072):
        print(f"{tokens:10,} tokens {latent.bytes_for(tokens, num_layers=LAYERS) / (1 << 30):6.2f} GiB")


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layout = CacheLayout(geometry=GEOMETRY, format=format_of(dtype), page_size=PAGE_SIZE)
    decode_once(Problem(layout=layout, dtype=dtype), device)
    print_memory(GEOMETRY, torch.bfloat16)  # what such a model is served with


if __name__ == "__main__":
    main()
