"""What a step of attention allocates beside its arguments, so that engines can leave room for it before they serve."""

from mla_kernels import Problem

CONTEXT_ROWS = 16384  # cached rows that are expanded at a time: 1 GiB for 128 heads of 128 + 128 in 16 bits


def most_bytes(problem: Problem, *, tokens: int, decode_tokens: int, context_rows: int) -> int:
    """Bytes that a layer needs at once in any step, without decode scratch and without the output of the layer.

    tokens, decode_tokens: most tokens of a step, and most of them that go to decode.
    context_rows: cached rows that are gathered and expanded at a time; the buffer for gathered ones stays.
    """
    geometry, size = problem.geometry, problem.dtype.itemsize
    expanded = geometry.num_heads * (geometry.qk_nope_head_dim + geometry.v_head_dim) * size
    lse = 4 * geometry.num_heads
    new = tokens * (expanded + lse)
    # A projection may want its input in one piece, which is a copy of the latent part.
    context = context_rows * (expanded + geometry.kv_lora_rank * size)
    context += tokens * (geometry.num_heads * geometry.v_head_dim * size + 2 * lse)
    decode = decode_tokens * (geometry.num_heads * geometry.kv_lora_rank * size + lse)
    return context_rows * geometry.latent_dim * size + max(new, context, decode)
