"""The Hopper prefill kernel against the float64 reference: every edge, every geometry it takes, streams, graphs."""

import pytest
import torch
from hopper_devices import NEEDS_HOPPER

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, device_of, format_of
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, RaggedCase, assert_matches, make_prefill, make_so_far

pytestmark = NEEDS_HOPPER

BF16, FP16 = torch.bfloat16, torch.float16
KERNEL = next(k for k in OPERATIONS["prefill"] if k.name == "gluon_sm90_ragged")
GEOMETRIES = [
    (nope, rope, v)
    for nope in (64, 128, 192, 256)
    for rope in (0, 64, 128, 192)
    for v in (64, 128, 256)
    if nope + rope <= 256
]


def geometry(heads=2, nope=128, rope=64, v=128):
    return MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v)


def make(shape, *lens, dtype=BF16, **options):
    return make_prefill(shape, *lens, dtype=dtype, device="cuda", **options)


def run(case, shift=0, so_far=None, pieces=None):
    """(out, lse) of the case, in memory where whatever is written beside them shows; added to the pair `so_far`."""
    q, width = case.arrays[0], case.geometry.v_head_dim
    tokens, heads = q.shape[:2]
    wide = torch.full((tokens, heads + 1, width + 16), torch.nan, dtype=q.dtype, device="cuda")
    out = wide[:, :heads, shift : width + shift]
    lse = torch.full((heads, tokens + 1), torch.nan, device="cuda").T[:tokens]  # heads first, as vLLM passes it
    if so_far:
        out.copy_(so_far[0])
        lse.copy_(so_far[1])
    options = {**case.options, "accumulate": so_far is not None, "pieces": pieces}
    KERNEL.run(*case.arrays, **options, out_TNV=out, lse_TN=lse)
    assert int(wide.isnan().sum()) == wide.numel() - out.numel(), "wrote beside the output, or NaN"
    return out, lse


def matches(case, out, lse):
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[out.dtype], case.magnitude())


def check(case, shift=0, pieces=None):
    """As the reference says, and the same bits whoever takes which tile, or which piece of one."""
    out, lse = run(case, shift, pieces=pieces)
    matches(case, out, lse)
    again, again_lse = run(case, shift, pieces=pieces)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)


def check_accumulated(case, pieces=None):
    """As `check`, added to an answer so far."""
    so_far = make_so_far(case)
    (out, lse), (again, again_lse) = (run(case, so_far=so_far, pieces=pieces) for _ in range(2))
    expected, expected_lse = case.reference(so_far)
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    # Weighted sums of the case's values and of values of about unit size.
    assert_matches("out", out, expected, TOLERANCE[out.dtype], case.magnitude() + 1)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("lens", [[1, 0, 16, 63], [64, 65], [17, 129], [127, 128, 300, 1, 255, 256, 257]], ids=str)
def test_causal_lengths_around_every_edge(lens, dtype, needles):
    check(make(geometry(), lens, dtype=dtype, needles=needles))


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("key_lens", [[200, 64, 1], [63, 0, 65], [128, 999, 129]], ids=str)
def test_every_query_sees_every_key(key_lens, dtype, needles):
    check(make(geometry(), [20, 3, 365], key_lens, causal=False, dtype=dtype, needles=needles))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("nope", "rope", "v"), [(128, 64, 128), (192, 64, 256), (64, 64, 64)])
@pytest.mark.parametrize("key_lens", [[200, 64, 1], [63, 0, 65], [128, 999, 129], [0, 0, 0]], ids=str)
def test_accumulates(key_lens, nope, rope, v, dtype):
    check_accumulated(make(geometry(3, nope, rope, v), [20, 3, 365], key_lens, causal=False, dtype=dtype))


@pytest.mark.parametrize(
    ("query_lens", "key_lens"),
    [([1, 1, 1], [64, 65, 128]), ([5, 170], [67, 271]), ([65, 2], [128, 0]), ([170, 3, 66], [5, 1, 65])],
    ids=str,
)
def test_causal_queries_are_the_last_of_their_keys(query_lens, key_lens):
    check(make(geometry(3), query_lens, key_lens))


@pytest.mark.parametrize(("nope", "rope", "v"), GEOMETRIES)
def test_every_geometry_that_it_takes(nope, rope, v):
    shape = geometry(3, nope, rope, v)
    turn = GEOMETRIES.index((nope, rope, v))
    dtype, causal = (BF16, FP16)[turn % 2], turn % 3 > 0
    problem = Problem(layout=CacheLayout(geometry=shape, format=format_of(dtype), page_size=64), dtype=dtype)
    assert KERNEL.unsupported(problem, device_of("cuda")) == []
    case = make(shape, [9, 300, 1], [70, 300, 200], dtype=dtype, causal=causal)
    check(case)
    check(case, pieces=2)


@pytest.mark.parametrize("heads", [1, 3, 16, 20, 128])
def test_heads(heads):
    check(make(geometry(heads), [129, 40, 300]))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "every key"])
def test_needles_in_long_prompts(causal, dtype):
    """17 000 keys: blocks, rings and their parities go round many times."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("the reference needs 40 GB")
    check(make(geometry(1), [16500, 3], [17000, 20], causal=causal, dtype=dtype))


PIECES = [2, 3, 7]  # the last are often more than there are blocks: some see nothing


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
    ("query_lens", "key_lens"),
    [
        ([1, 0, 16, 63], None),
        ([127, 128, 300, 1, 255, 256, 257], None),
        ([5, 170], [67, 600]),
        ([65, 2], [128, 0]),
        ([170, 3, 66], [5, 1, 65]),
        ([3, 129], [1023, 1025]),
    ],
    ids=str,
)
def test_causal_pieces(query_lens, key_lens, pieces, dtype, needles):
    check(make(geometry(3), query_lens, key_lens, dtype=dtype, needles=needles), pieces=pieces)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("key_lens", [[200, 64, 1], [63, 0, 65], [128, 999, 129], [256, 257, 255], [0, 0, 0]], ids=str)
def test_pieces_that_every_query_sees(key_lens, pieces, dtype):
    case = make(geometry(3), [20, 3, 365], key_lens, causal=False, dtype=dtype)
    check(case, pieces=pieces)
    check_accumulated(case, pieces=pieces)


@pytest.mark.parametrize(("nope", "rope", "v"), [(192, 64, 256), (256, 0, 256), (64, 64, 64)])
def test_pieces_are_accumulated_in_every_width(nope, rope, v):
    check_accumulated(make(geometry(3, nope, rope, v), [20, 3, 365], [200, 64, 1], causal=False), pieces=3)
    check_accumulated(make(geometry(3, nope, rope, v), [20, 3, 365], [200, 3, 700]), pieces=2)


@pytest.fixture
def cuts(monkeypatch):
    """The pieces of each call that cuts keys."""
    noted, module = [], KERNEL.load()
    merge = module.merge_pieces
    monkeypatch.setattr(module, "merge_pieces", lambda *args, **o: noted.append(o["pieces"]) or merge(*args, **o))
    return noted


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "every key"])
def test_needles_in_long_contexts_are_cut(cuts, causal, dtype):
    """As many pieces as there are multiprocessors for: here 16 of at least 1024 keys, and needles at every edge."""
    case = make(geometry(1), [300, 3], [17000, 20], causal=causal, dtype=dtype)
    check(case)
    check_accumulated(case)
    assert cuts == [16] * 4


def test_what_engines_cut(cuts):
    """512 new tokens over a chunk of context, 16 heads: 64 tiles. And a prompt of 4 heads; not one of 128 tiles."""
    check_accumulated(make(geometry(16), [512], [4096], causal=False))
    check(make(geometry(4), [2048]))
    check(make(geometry(16), [1024]))
    assert cuts == [2] * 4 * (device_of("cuda").num_sms >= 128)


def test_more_pieces_than_multiprocessors():
    check(make(geometry(5), [(37 * i) % 170 if i % 3 else 0 for i in range(300)]), pieces=3)


@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "accumulated"])
def test_rows_of_nobody_keep_what_they_held(accumulate):
    """Also where keys are cut, and nobody wrote the rows of scratch."""
    case = make(geometry(3), [40, 150], [300, 150], causal=False)
    q, *keys, query_start, key_start = case.arrays
    owned = slice(3, 3 + len(q))
    wide = q.new_full((len(q) + 8, *q.shape[1:]), torch.nan)
    wide[owned] = q
    for pieces in (1, 2):
        out = q.new_full((len(wide), q.shape[1], 128), 7.0)
        lse = torch.full(out.shape[:2], 5.0, device="cuda")
        options = case.options | {"accumulate": accumulate, "pieces": pieces}
        KERNEL.run(wide, *keys, query_start + 3, key_start, **options, out_TNV=out, lse_TN=lse)
        so_far = (torch.full_like(out[owned], 7.0), torch.full_like(lse[owned], 5.0)) if accumulate else None
        expected, expected_lse = case.reference(so_far)
        assert_matches("lse", lse[owned], expected_lse, LSE_TOLERANCE)
        assert_matches("out", out[owned], expected, TOLERANCE[BF16], case.magnitude() + 7)
        for rows in (slice(0, 3), slice(owned.stop, None)):
            assert (out[rows] == 7).all()
            assert (lse[rows] == 5).all()


def test_cut_calls_after_one_another():
    """Merging begins while the kernel before drains, and the next call finds the same scratch."""
    cases = [
        make(geometry(8), lens, keys, needles=False, causal=False)
        for lens, keys in (([512], [2048]), ([70, 9], [900, 3000]))
    ]
    wanted = [KERNEL.run(*case.arrays, **case.options, pieces=4) for case in cases]
    for case, answer in zip(cases, wanted, strict=True):
        matches(case, *answer)
    made = [KERNEL.run(*cases[i % 2].arrays, **cases[i % 2].options, pieces=4) for i in range(100)]
    for i, (out, lse) in enumerate(made):
        assert torch.equal(out, wanted[i % 2][0])
        assert torch.equal(lse, wanted[i % 2][1])


def test_many_requests():
    check(make(geometry(16), [37 * (i % 9) for i in range(70)]))
    check(make(geometry(5), [(37 * i) % 170 if i % 3 else 0 for i in range(300)]))


def test_heads_in_groups(monkeypatch):
    """As if L2 held the keys of two heads only, or of none."""
    for keys in (2 * 700, 1):
        monkeypatch.setattr(KERNEL.load(), "_L2_BYTES", keys * 512)
        check(make(geometry(5), [700, 129]))


def views(case, shift):
    q, k_nope, k_rope, v, *starts = case.arrays
    k = torch.cat([k_nope, k_rope], -1)
    wide = torch.full((len(q), q.shape[1] + 1, q.shape[2] + 32), torch.nan, dtype=q.dtype, device="cuda")
    view = wide[:, 1:, shift : q.shape[2] + shift].copy_(q)
    by_head = torch.empty_like(v.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1).copy_(v)
    arrays = (view, k[..., : k_nope.shape[-1]], k[..., k_nope.shape[-1] :], by_head, *(s.long() for s in starts))
    return RaggedCase(geometry=case.geometry, arrays=arrays, options=case.options)


@pytest.mark.parametrize("shift", [8, 3], ids=["aligned", "misaligned"])
def test_strided_and_concatenated(shift):
    """vLLM hands over one tensor of whole keys, and queries may be a slice of a projection's output."""
    check(views(make(geometry(3), [70, 9], [100, 9]), shift))


def test_what_was_compiled_for_others_is_not_taken():
    """One call after the other: each differs in something that compiled code depends on."""
    case = make(geometry(), [70, 200])
    for _ in range(2):
        check(case)
        check(case, shift=1)
        check(case, shift=8)
        check(case, pieces=2)
        check(case, shift=1, pieces=2)
        check_accumulated(case, pieces=2)
        check(views(case, 8))
        check(make(geometry(), [70, 200], dtype=FP16))
        check(make(geometry(), [70, 200], causal=False))
        check(make(geometry(1), [70, 200]))
        check(make(geometry(1), [70, 200]), pieces=2)
        check(make(geometry(), [70, 200], dtype=FP16), pieces=2)
        matches(case, *KERNEL.run(*case.arrays, **case.options))


def test_nothing_to_do():
    for query_lens, key_lens in (([], []), ([0, 0], [3, 0]), ([3, 2], [0, 0])):
        check(make(geometry(), query_lens, key_lens))
        check(make(geometry(), query_lens, key_lens), pieces=2)


@pytest.mark.parametrize("pieces", [1, 3])
def test_graph_replays_with_other_lengths(pieces):
    """Starts are read on the device: a graph serves any batch of as many requests and no more tokens."""
    first, second = (make(geometry(4), lens, needles=False) for lens in ([300, 40, 1], [1, 0, 250]))
    arrays = [x.clone() for x in first.arrays]
    out, lse = KERNEL.run(*arrays, **first.options, pieces=pieces)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            for _ in range(3):
                KERNEL.run(*arrays, **first.options, pieces=pieces, out_TNV=out, lse_TN=lse)
    for case in (second, first, second):
        for old, new in zip(arrays, case.arrays, strict=True):
            old[: len(new)].copy_(new)
        tokens = len(case.arrays[0])
        for graph in graphs:
            out.fill_(torch.nan)
            lse.fill_(torch.nan)
            graph.replay()
            matches(case, out[:tokens], lse[:tokens])


@pytest.mark.parametrize("pieces", [1, 2])
def test_two_streams_and_a_graph_at_once(pieces):
    """Each has a counter and scratch of its own: tiles that one claims, another does not miss."""
    cases = [make(geometry(16), lens, needles=False, seed=seed) for seed, lens in enumerate(([900, 70], [500] * 3))]
    wanted = [KERNEL.run(*case.arrays, **case.options, pieces=pieces) for case in cases]
    made = [[torch.empty_like(x) for x in pair] for pair in (*wanted, wanted[0])]
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(3)]

    def call(case, pair):
        KERNEL.run(*case.arrays, **case.options, pieces=pieces, out_TNV=pair[0], lse_TN=pair[1])

    with torch.cuda.graph(graph):
        call(cases[0], made[2])
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, case, pair in zip(streams, cases, made, strict=False):
            with torch.cuda.stream(stream):
                call(case, pair)
        with torch.cuda.stream(streams[2]):
            graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(made, (*wanted, wanted[0]), strict=True):
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
