"""What a step of attention allocates beside its arguments, so that engines can leave room for it before they serve."""

import torch

from mla_kernels import Problem, tensor_bytes

CONTEXT_ROWS = 16384  # cached rows that are expanded at a time: 1 GiB for 128 heads of 128 + 128 in 16 bits


def most_bytes(
    problem: Problem, *, tokens: int, decode_tokens: int, context_rows: int, latent_tokens: int = 0, ranks: int = 1
) -> int:
    """Bytes that a layer needs at once in any step, without decode scratch and without the output of the layer.

    tokens, decode_tokens: most tokens of a step that go to prefill, none if none ever do, and most that go to decode.
    context_rows: cached rows that are gathered and expanded at a time; the buffer for gathered ones stays.
    latent_tokens: most tokens of prefill that attend in latent space at a time (`MLAAttention.extend`).
    ranks: that share the cache. Then decode has the heads of all of them, and a rank gathers its share of the rows,
        then everybody's, and puts these in order.
    """
    geometry, dtype = problem.geometry, problem.dtype
    heads, latent, value = geometry.num_heads, geometry.kv_lora_rank, geometry.v_head_dim

    def expanded(rows: int) -> int:
        return tensor_bytes((rows, heads, geometry.qk_nope_head_dim + value), dtype)

    def lse(rows: int) -> int:
        return tensor_bytes((rows, heads), torch.float32)

    gathered = tensor_bytes((context_rows, geometry.latent_dim), dtype)
    if ranks > 1:
        gathered = 3 * gathered + gathered // ranks
    new = expanded(tokens) + lse(tokens)
    # A projection may want its input in one piece, which is a copy of the latent part.
    context = expanded(context_rows) + tensor_bytes((context_rows, latent), dtype)
    context += lse(tokens)
    decode = tensor_bytes((decode_tokens, ranks * heads, latent), dtype) + ranks * lse(decode_tokens)
    extend = 2 * tensor_bytes((latent_tokens, heads, latent), dtype) + lse(latent_tokens)
    prefill = max(new, context) if tokens else 0
    return gathered + max(prefill, decode, extend)
