"""Inputs and comparisons shared by tests, benchmarks and examples.

Random inputs alone hide most attention bugs: averaged over thousands of tokens, one token too many is noise. So makers
plant *needles* (each query head looks mostly at one token on an edge: first, last, page, tile), make the first token
that a query may not see loud, fill rows that nobody owns with NaN, and put impossible page numbers behind the end of
every table.
"""

from dataclasses import dataclass

import torch

from mla_kernels import reference
from mla_kernels.cache_layout import PackedRow
from mla_kernels.geometry import MLAGeometry

IMPOSSIBLE_PAGE = 2_000_000_000
EDGES = (16, 32, 64, 128)  # page and tile sizes


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """An element passes if its absolute *or* relative error is small; the whole passes by cosine (FlashMLA's rule)."""

    absolute: float
    relative: float
    cosine: float


# Against float64 on the same rounded inputs, values of about unit size. A half-precision kernel rounds every softmax
# weight p (relative error up to eps / 2), so an output sum(p v) is off by up to eps / 2 * sum(p |v|) however small it
# is itself, and is then rounded once more: absolute eps / 2, or relative 2 eps where values agree in sign. float32
# pays for sums of 576 products inside an exponential. 1 - cosine is half the square of the relative error of the whole.
TOLERANCE = {
    torch.bfloat16: Tolerance(absolute=2**-8, relative=2.01 / 128, cosine=5e-6),
    torch.float16: Tolerance(absolute=2**-11, relative=2.01 / 1024, cosine=1e-7),
    torch.float32: Tolerance(absolute=1e-5, relative=1e-4, cosine=1e-10),
}
LSE_TOLERANCE = Tolerance(absolute=1e-5, relative=1e-4, cosine=1e-8)


def assert_matches(name: str, actual, expected, tolerance: Tolerance, magnitude=None) -> None:
    """Raise AssertionError unless shapes agree, infinities sit in the same places, nothing is NaN and values are
    close.

    magnitude: sum of |weight * value| of each element, where it may be more than the unit size that the absolute
        tolerance is made for; rounding errors grow with it.
    """
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    a, e = actual.double().cpu(), expected.double().cpu()
    assert not a.isnan().any(), f"{name}: {int(a.isnan().sum())} of {a.numel()} values are NaN"
    assert torch.equal(a.isinf(), e.isinf()), f"{name}: infinities in other places"
    assert torch.equal(a[a.isinf()], e[e.isinf()]), f"{name}: infinities of the other sign"
    unit = torch.ones_like(e) if magnitude is None else magnitude.double().cpu().clamp(min=1)
    a, e, unit = a[~e.isinf()], e[~e.isinf()], unit[~e.isinf()]
    if not e.numel():
        return
    error = (a - e).abs()
    bad = (error > tolerance.absolute * unit) & (error > tolerance.relative * e.abs())
    size = (a * a + e * e).sum().item()
    cosine = 1 - 2 * (a * e).sum().item() / size if size else 0.0
    off = f"{int(bad.sum())} of {bad.numel()} values off, largest error {error.max():.3e}, 1 - cosine {cosine:.2e}"
    assert not bad.any(), f"{name}: {off}"
    assert cosine <= tolerance.cosine, f"{name}: {off}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _plant(q_MNK, key_SNK, visible_M, page_size: int, scale: float) -> None:
    """Add needles to the queries of one request, in place; query i sees keys 0 .. visible[i] - 1."""
    heads = q_MNK.shape[1]
    sees = (visible_M > 0).nonzero().flatten()
    if not len(sees):
        return
    last_M1 = visible_M[sees, None] - 1
    fixed = torch.tensor(sorted({0, *(p + d for p in (page_size, *EDGES) for d in (-1, 0))}))
    edges_MC = torch.cat([fixed.expand(len(sees), -1), last_M1, last_M1 - 1, last_M1 // 2], 1)
    edges_MC = edges_MC.clamp(min=0).minimum(last_M1)
    head_N = torch.arange(heads)
    position_MN = edges_MC.gather(1, (sees[:, None] + head_N) % edges_MC.shape[1])
    loudness_MN1 = ((last_M1 + 1).log() + head_N % 3)[..., None] / scale

    def pull(key_MNK):
        return key_MNK / key_MNK.square().sum(-1, keepdim=True)

    q_MNK[sees] += pull(key_SNK[position_MN, head_N]) * loudness_MN1
    hidden = visible_M[sees] < len(key_SNK)
    forbidden = pull(key_SNK[visible_M[sees[hidden]]])
    q_MNK[sees[hidden]] += forbidden * (loudness_MN1[hidden] + 3 / scale)


@dataclass(frozen=True, kw_only=True)
class PagedCase:
    """Inputs of decode, positional in `arrays` and by keyword in `options`, and the geometry that made them."""

    geometry: MLAGeometry
    arrays: tuple[torch.Tensor, ...]  # q_latent_TNL, q_rope_TNR, cache_AGK, block_table_BM, seq_lens_B
    options: dict

    def _doubles(self):
        """The arrays with every number in float64, those of the cache less the scale of its layer."""
        q_latent, q_rope, cache, *rest = self.arrays
        rows = reference.values_of(cache, self.geometry.latent_dim, torch.float64)
        return q_latent.double(), q_rope.double(), rows, *rest

    def reference(self):
        """Expected (out_TNL, lse_TN) in float64."""
        return reference.decode(*self._doubles(), **self.options)

    def magnitude(self):
        """Sum of |weight * value| behind each element of the output, [T, N, L], in float64."""
        q_latent, q_rope, cache, *rest = self._doubles()
        # Rows [|c|, c, r] and queries [0, q, q_r]: the scores are the same, the values are absolute.
        rows = torch.cat([cache[..., : q_latent.shape[-1]].abs(), cache], -1)
        query = torch.cat([q_latent, q_rope], -1)
        return reference.decode(torch.zeros_like(q_latent), query, rows, *rest, **self.options)[0]


def make_pool(rows_per_request, width: int, *, page_size: int, generator, page_gap: int = 0):
    """Shuffled pages that hold the given rows. Returns cache_AGK (NaN where nobody wrote) and block_table_BM.

    page_gap: values between two pages, so that the page stride is larger than a page.
    """
    counts = [-(-len(rows) // page_size) for rows in rows_per_request]
    pages = sum(counts) + 3
    storage = torch.full((pages, page_size * width + page_gap), torch.nan)
    cache = storage[:, : page_size * width].view(pages, page_size, width)
    order = torch.randperm(pages, generator=generator).tolist()
    table = torch.full((len(counts), max([1, *counts]) + 1), IMPOSSIBLE_PAGE, dtype=torch.int32)
    for b, rows in enumerate(rows_per_request):
        mine = [order.pop() for _ in range(counts[b])]
        table[b, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for i, page in enumerate(mine):
            part = rows[i * page_size : (i + 1) * page_size]
            cache[page, : len(part)] = part
    return cache, table


def _to(tensor, dtype, device):
    """Change dtype and device and keep the page stride (`.to` alone would make an expanded stride dense)."""
    if tensor.dim() == 3 and tensor.stride(0) != tensor.shape[1] * tensor.stride(1):
        gap = tensor.stride(0) - tensor.shape[1] * tensor.shape[2]
        shape = tensor.shape[0], tensor.shape[1] * tensor.shape[2] + gap
        storage = torch.full(shape, torch.nan if dtype.is_floating_point else 0xFF, dtype=dtype, device=device)
        view = storage[:, : tensor.shape[1] * tensor.shape[2]].view(tensor.shape)
        return view.copy_(tensor)
    return tensor.to(device=device, dtype=dtype)


def pack_cache(cache_AGK, geometry: MLAGeometry):
    """A tile-scaled cache of these rows, with the same gap between pages in bytes. A row of NaN becomes bytes without a
    0 in them, which is NaN in every part."""
    pages, page_size, _ = cache_AGK.shape
    gap = cache_AGK.stride(0) - page_size * geometry.latent_dim
    row = PackedRow(latent=geometry.kv_lora_rank, rope=geometry.qk_rope_head_dim)
    storage = torch.full((pages, page_size * row.bytes + gap), 0xFF, dtype=torch.uint8)
    packed = storage[:, : page_size * row.bytes].view(pages, page_size, row.bytes)
    rows = cache_AGK.flatten(0, 1)
    slots = torch.arange(len(rows)).masked_fill(rows.isnan().all(-1), -1)
    reference.cache_write(*rows.split([row.latent, row.rope], -1), packed, slots)
    return packed


def make_decode(
    geometry: MLAGeometry,
    seq_lens: list[int],
    *,
    query_lens: int | list[int] = 1,
    page_size: int = 16,
    page_gap: int = 0,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    cache_scale: float | None = None,
    needles: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> PagedCase:
    """Paged decode inputs that punish mistakes; see the top of this file.

    query_lens: the same number for every request, or one number each (ragged).
    cache_dtype: that of the queries unless it is given; torch.uint8 for tile-scaled rows.
    cache_scale: what an fp8 cache is multiplied with.
    """
    g = _generator(seed)
    scale = geometry.softmax_scale
    ragged = not isinstance(query_lens, int)
    lens = query_lens if ragged else [query_lens] * len(seq_lens)
    rows = [torch.randn(s, geometry.latent_dim, generator=g) for s in seq_lens]
    q = torch.randn(sum(lens), geometry.num_heads, geometry.latent_dim, generator=g) * 0.3
    first = 0
    for row, seq_len, query_len in zip(rows, seq_lens, lens, strict=True):
        if needles:
            keys = row[:, None].expand(-1, geometry.num_heads, -1)
            visible = torch.arange(query_len) + seq_len - query_len + 1
            _plant(q[first : first + query_len], keys, visible, page_size, scale)
        first += query_len
    cache, table = make_pool(rows, geometry.latent_dim, page_size=page_size, generator=g, page_gap=page_gap)
    q_latent, q_rope = q.split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1)
    options = {"scale": scale, "query_len": max([1, *lens])}
    if cache_scale is not None:
        cache /= cache_scale
        options["cache_scale"] = torch.tensor([cache_scale], device=device)
    if ragged:
        starts = torch.tensor([0, *lens]).cumsum(0)
        options["query_start_B1"] = starts.to(device=device, dtype=torch.int32)
    if cache_dtype == torch.uint8:
        cache = pack_cache(cache, geometry)
    arrays = (
        q_latent.to(device=device, dtype=dtype),
        q_rope.to(device=device, dtype=dtype),
        _to(cache, cache_dtype or dtype, device),
        table.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
    )
    return PagedCase(geometry=geometry, arrays=arrays, options=options)


@dataclass(frozen=True, kw_only=True)
class RaggedCase:
    """Inputs of prefill: positional in `arrays`, by keyword in `options`."""

    geometry: MLAGeometry
    arrays: tuple[torch.Tensor, ...]  # q_TNQ, k_nope_SNP, k_rope_SNR, v_SNV, query_start_B1, key_start_B1
    options: dict

    def reference(self, so_far=None):
        """Expected (out_TNV, lse_TN) in float64; accumulated in the pair `so_far` if there is one."""
        *values, query_start, key_start = self.arrays
        names = ("out_TNV", "lse_TN") if so_far else ()
        into = {name: x.double() for name, x in zip(names, so_far or (), strict=True)}
        options = {**self.options, "accumulate": so_far is not None, **into}
        return reference.prefill(*(x.double() for x in values), query_start, key_start, **options)

    def magnitude(self):
        """Sum of |weight * value| behind each element of the output, [T, N, V], in float64."""
        *values, query_start, key_start = self.arrays
        *others, v = (x.double() for x in values)
        return reference.prefill(*others, v.abs(), query_start, key_start, **self.options)[0]


def make_so_far(case: RaggedCase, *, seed: int = 0):
    """(out_TNV, lse_TN) over other keys, to accumulate a case in: LSE a few e-folds or hopelessly far from the case's,
    and rows that have seen nothing, with NaN for values."""
    g, (q, *_, v, _, _) = _generator(seed + 1), case.arrays
    lse = case.reference()[1].float().cpu().nan_to_num(neginf=0.0)
    lse += torch.randn(lse.shape, generator=g) * 10.0 ** torch.randint(0, 4, lse.shape, generator=g)
    out = torch.randn(*lse.shape, v.shape[-1], generator=g)
    nothing = torch.rand(lse.shape, generator=g) < 0.2
    lse[nothing], out[nothing] = -torch.inf, torch.nan
    return out.to(q), lse.to(q.device)


def check_prefill(run, case: RaggedCase, *, accumulate: bool = False, magnitude=None) -> None:
    """Call a kernel's `run` on a case, with outputs that are views of memory full of NaN, and compare. Raises
    AssertionError, also for what was written beside the outputs.

    accumulate: in what `make_so_far` gives.   magnitude: as in `assert_matches`, of out.
    """
    q, (*_, v, _, _) = case.arrays[0], case.arrays
    tokens, heads = q.shape[:2]
    wide = q.new_full((tokens, heads + 1, v.shape[-1] + 16), torch.nan)
    out = wide[:, :heads, : v.shape[-1]]
    lse = q.new_full((heads, tokens + 1), torch.nan, dtype=torch.float32).T[:tokens]  # heads first, as vLLM passes it
    so_far = make_so_far(case) if accumulate else None
    if accumulate:
        out.copy_(so_far[0])
        lse.copy_(so_far[1])
    run(*case.arrays, **case.options, accumulate=accumulate, out_TNV=out, lse_TN=lse)
    expected, expected_lse = case.reference(so_far)
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[q.dtype], magnitude)
    assert int(wide.isnan().sum()) == wide.numel() - out.numel(), "wrote beside the output"


def make_prefill(
    geometry: MLAGeometry,
    query_lens: list[int],
    key_lens: list[int] | None = None,
    *,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    needles: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> RaggedCase:
    """Ragged prefill inputs: k_nope and v are strided views of one [S, N, P + V] tensor (as an up-projection gives
    them), k_rope is one row for all heads, and NaN rows stand behind the last key.

    key_lens: keys of each request; None means as many as queries.
    """
    g = _generator(seed)
    key_lens = query_lens if key_lens is None else key_lens
    heads, nope, scale = geometry.num_heads, geometry.qk_nope_head_dim, geometry.softmax_scale
    kv = torch.randn(sum(key_lens) + 3, heads, nope + geometry.v_head_dim, generator=g)
    k_rope = torch.randn(sum(key_lens) + 3, 1, geometry.qk_rope_head_dim, generator=g)
    q = torch.randn(sum(query_lens), heads, geometry.qk_head_dim, generator=g) * 0.3
    first = first_key = 0
    for query_len, key_len in zip(query_lens, key_lens, strict=True):
        if needles:
            mine = slice(first_key, first_key + key_len)
            keys = torch.cat([kv[mine, :, :nope], k_rope[mine].expand(-1, heads, -1)], -1)
            offset = torch.arange(query_len) - query_len + 1 if causal else torch.zeros(query_len, dtype=torch.long)
            _plant(q[first : first + query_len], keys, offset + key_len, EDGES[0], scale)
        first, first_key = first + query_len, first_key + key_len
    kv[first_key:], k_rope[first_key:] = torch.nan, torch.nan
    kv = kv.to(device=device, dtype=dtype)
    k_nope, v = kv.split([nope, geometry.v_head_dim], -1)

    def starts(lens):
        return torch.tensor([0, *lens]).cumsum(0).to(device=device, dtype=torch.int32)

    arrays = (
        q.to(device=device, dtype=dtype),
        k_nope,
        k_rope.to(device=device, dtype=dtype).expand(-1, heads, -1),
        v,
        starts(query_lens),
        starts(key_lens),
    )
    options = {"max_query_len": max([1, *query_lens]), "scale": scale, "causal": causal}
    return RaggedCase(geometry=geometry, arrays=arrays, options=options)
