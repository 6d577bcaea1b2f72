"""Fixed splits: a query row has the same bits whatever else is in the call, and the right value.

The portable kernel in Triton's interpreter, the Hopper kernel in the emulator, the torch kernel as it is. The same
statements on a GPU: test_gpu_invariance.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from invariance_cases import Decoder, alone, differences
from test_gluon_emulated import build

from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, device_of, format_of, split_for, splits
from mla_kernels.decode import gluon_sm90, torch_decode, triton_splitkv
from mla_kernels.splits import reserved_rows, turns_of
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_decode

pytestmark = pytest.mark.skipif(not device_of("cpu").runs_triton, reason="needs TRITON_INTERPRET=1")
SPLIT, TOKENS = 64, 150
EDGES = [0, 63, 64, 149]


def geometry(heads, latent, rope):
    return MLAGeometry(num_heads=heads, kv_lora_rank=latent, qk_nope_head_dim=64, qk_rope_head_dim=rope, v_head_dim=64)


@pytest.fixture(scope="module")
def decoders():
    small = {"geometry": geometry(5, 128, 32), "dtype": torch.float32, "device": "cpu", "split_tokens": SPLIT}
    columns = build(few_rows=32).run
    large = {"geometry": geometry(2, 512, 64), "dtype": torch.float16, "device": "cpu", "split_tokens": SPLIT}
    return {
        "torch_decode": Decoder(run=torch_decode.run, **small),
        "triton_splitkv": Decoder(run=triton_splitkv.run, **small),
        "triton_splitkv tile-scaled": Decoder(run=triton_splitkv.run, **small, packed=True),
        "torch_decode tile-scaled": Decoder(run=torch_decode.run, **small, packed=True),
        "gluon_sm90": Decoder(run=build().run, **large),
        "gluon_sm90 gathers": Decoder(run=build().run, **large, page_size=48),
        "gluon_sm90 transposed": Decoder(run=columns, **large),
        "gluon_sm90 transposed, 20 heads": Decoder(run=columns, **large | {"geometry": geometry(20, 512, 0)}),
        "gluon_sm90 transposed, gathers": Decoder(run=columns, **large, page_size=48),
    }


@pytest.fixture(autouse=True)
def rows_alike(monkeypatch):
    """Let the interpreter multiply row by row, as matrix instructions do: BLAS gives a row other bits at another place
    in a matrix."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data[:, None], b.data, dtype=d.data.dtype)[:, 0]
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


KERNELS = (
    *("torch_decode", "triton_splitkv", "gluon_sm90", "gluon_sm90 gathers"),
    *("gluon_sm90 transposed", "gluon_sm90 transposed, 20 heads", "gluon_sm90 transposed, gathers"),
    *("triton_splitkv tile-scaled", "torch_decode tile-scaled"),
)


@pytest.fixture(params=KERNELS)
def decode(request, decoders):
    return decoders[request.param]


def test_same_bits_in_every_way(decode, monkeypatch):
    monkeypatch.setattr(splits, "_FEW_TASKS", 0)  # whole rows are merged at once, which takes the interpreter a quarter
    fast = decode.dtype == torch.float32 and not decode.packed  # the emulator takes its time, and one layout does
    tokens = TOKENS if fast else 70
    assert differences(decode, tokens, [p for p in EDGES if p < tokens]) == []


@pytest.mark.parametrize("kernel", ["torch_decode", "triton_splitkv", "gluon_sm90", "gluon_sm90 transposed"])
def test_without_fixed_splits_bits_differ(decoders, kernel):
    """So the test above can fail."""
    assert differences(replace(decoders[kernel], split_tokens=None), TOKENS, [128])


def test_values_are_right(decode):
    subject, other = decode.sequence(TOKENS, 0), decode.sequence(200, 1)
    members = [(other, 199, 200), (subject, 60, 70), (subject, 128, 150), (other, 0, 5), (subject, 0, 1)]
    for member, answer in zip(members, decode(*members), strict=True):
        decode.check(*member, answer)


@pytest.mark.parametrize(
    "fp8", [{"cache_dtype": torch.float8_e4m3fn, "cache_scale": 0.3}, {"cache_dtype": torch.uint8}]
)
@pytest.mark.parametrize("kernel", [torch_decode, triton_splitkv], ids=lambda k: k.__name__.rpartition(".")[2])
def test_values_of_an_fp8_cache(kernel, fp8):
    """Its scale counts once for scores and once for outputs, in partial answers too; those of tiles for each value."""
    options = {"query_lens": 2, "dtype": torch.float32, **fp8}
    case = make_decode(geometry(5, 128, 32), [150, 40, 2], **options)
    out, lse = kernel.run(*case.arrays, **case.options, split_tokens=SPLIT)
    expected, expected_lse = case.reference()
    assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", out, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kernel", ["triton_splitkv", "gluon_sm90", "gluon_sm90 transposed"])
@pytest.mark.parametrize("slots", [5, 6, 10])
def test_turns_change_no_bit(decoders, kernel, slots):
    """With scratch for the longest request alone, and little more: a batch takes several turns."""
    decode = decoders[kernel]
    width, rows = decode.geometry.kv_lora_rank, 2 * decode.geometry.num_heads
    values, lse = torch.full((slots * rows * width,), torch.nan), torch.full((slots * rows,), torch.nan)
    sequences = [decode.sequence(n, seed) for seed, n in enumerate((150, 40, 256, 64, 65, 3, 200))]
    members = [(one, len(one.row_SK) - 2, len(one.row_SK)) for one in sequences]
    wanted, got = decode(*members), replace(decode, workspace=(values, lse))(*members)
    for mine, theirs, member in zip(wanted, got, members, strict=True):
        assert all(map(torch.equal, mine, theirs))
        decode.check(*member, theirs)


@pytest.mark.parametrize("kernel", ["triton_splitkv", "gluon_sm90"])
def test_scratch_that_is_too_small_is_refused(decoders, kernel):
    decode = decoders[kernel]
    rows = decode.geometry.num_heads
    workspace = torch.empty(2 * rows * decode.geometry.kv_lora_rank), torch.empty(2 * rows)
    with pytest.raises(
        ValueError, match=f"leaves {3 * rows} rows of partial answers in splits of 64, got scratch for {2 * rows}"
    ):
        alone(replace(decode, workspace=workspace), TOKENS, [149])


def test_tokens_before_the_sequence_see_nothing(decode):
    """Padded rows of a captured graph: an empty sequence, and one that is shorter than its query."""
    subject = decode.sequence(TOKENS, 0)

    def padded(q_latent, q_rope, cache, table, _, **options):
        """The second request gets two more queries, in front, and the first loses its keys."""
        lens = torch.tensor([0, 2, 150], dtype=torch.int32)
        q_latent, q_rope = (torch.cat([x[:4], x[:2], x[4:]]) for x in (q_latent, q_rope))
        del options["query_start_B1"]
        out, lse = decode.run(q_latent, q_rope, cache, table, lens, **options)
        assert (out[:6] == 0).all()
        assert (lse[:6] == -torch.inf).all()
        return out[2:], lse[2:]

    members = (subject, 0, 4), (subject, 0, 2), (subject, 146, 150)
    _, *answers = replace(decode, run=padded)(*members)
    for member, answer in zip(members[1:], answers, strict=True):
        decode.check(*member, answer)


def problem(split_tokens, max_seq_len, heads=16, max_query_len=1):
    layout = CacheLayout(geometry=geometry(heads, 512, 64), format=format_of(torch.bfloat16), page_size=64)
    return Problem(
        layout=layout, dtype=torch.bfloat16, max_query_len=max_query_len, split_tokens=split_tokens,
        max_seq_len=max_seq_len,
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "tokens"), [(1, 256), (5, 256), (16, 384), (20, 384), (64, 768), (128, 1024)])
def test_split_of_a_model(heads, tokens):
    assert split_for(geometry(heads, 512, 64)) == tokens


@pytest.mark.parametrize("kernel", [triton_splitkv, gluon_sm90], ids=lambda k: k.__name__.rpartition(".")[2])
@pytest.mark.parametrize("requests", [1, 64, 1024])
@pytest.mark.parametrize("max_seq_len", [200, 32768, 163840])
@pytest.mark.parametrize(("heads", "query_len"), [(16, 1), (128, 4)])
def test_reserved_scratch_suffices(kernel, requests, max_seq_len, heads, query_len):
    """For every batch, number of query tokens and block table that a server has: the window is never empty."""
    split = split_for(geometry(heads, 512, 64))
    h200 = Device("cuda", 90, "H200", 132)
    shapes = kernel.workspace(problem(split, max_seq_len, heads, query_len), h200, max_requests=requests)
    (values,), (lse,) = (shape for shape, _ in shapes)
    assert values == 512 * lse
    most = -(-(max_seq_len + 64) // split)  # block tables may be somewhat wider
    assert lse <= max(128 << 10, 2 * (most + 1) * heads * query_len)
    for tokens in range(1, query_len + 1):
        turns = turns_of(lse, tokens * heads, requests, max_seq_len + 64, split)
        assert turns.window >= 1
        assert (turns.window + most - 1) * tokens * heads <= lse or most == 1


def test_usual_batches_take_one_turn():
    for requests, seq_len in ((1, 131072), (4, 8192), (64, 32768), (128, 4096)):
        rows = reserved_rows(16, requests, seq_len, 384)
        assert turns_of(rows, 16, requests, seq_len, 384).count == 1
        assert rows * (512 + 1) * 4 < 257 * 2**20


@pytest.mark.parametrize(
    ("split", "longest", "reason"),
    [
        (100, 1000, "split_tokens must be a positive multiple of 64, got 100"),
        (0, 1000, "split_tokens must be a positive multiple of 64, got 0"),
        (64, None, "split_tokens needs a positive max_seq_len beside it, got None"),
    ],
)
def test_impossible_splits_are_refused(split, longest, reason):
    with pytest.raises(ValueError, match=reason):
        problem(split, longest)
