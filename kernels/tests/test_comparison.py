"""The comparison of results fails on planted mistakes, and on needle inputs it does so for every one of them."""

import math

import pytest
import torch

from mla_kernels import MLAGeometry, reference
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, PagedCase, Tolerance, assert_matches, make_decode

REORDERED = Tolerance(absolute=1e-10, relative=1e-10, cosine=1e-14)  # float64 sums in another order
DEEPSEEK = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def one_token_pages(case: PagedCase):
    """The same cache with pages of one token, as float64: any row can then be left out or put in by page number."""
    q_latent, q_rope, cache, table, seq_lens = case.arrays
    page_size = cache.shape[1]
    rows = cache.reshape(-1, 1, cache.shape[2]).double()
    slots_BS = (table.long()[..., None] * page_size + torch.arange(page_size)).flatten(1)
    return q_latent.double(), q_rope.double(), rows, slots_BS, seq_lens.long()


def without(slots_S, position):
    return torch.cat([slots_S[:position], slots_S[position + 1 :], slots_S[-1:]])


def with_extra(slots_S, position, slot):
    return torch.cat([slots_S[:position], slot[None], slots_S[position:-1]])


def scale_off(q_latent, q_rope, rows, slots, seq_lens, options):
    return reference.decode(q_latent, q_rope, rows, slots, seq_lens, **{**options, "scale": options["scale"] * 1.01})


def first_token_dropped(q_latent, q_rope, rows, slots, seq_lens, options):
    slots = torch.stack([without(s, 0) for s in slots])
    return reference.decode(q_latent, q_rope, rows, slots, seq_lens - 1, **options)


def token_at_page_edge_dropped(q_latent, q_rope, rows, slots, seq_lens, options):
    slots = torch.stack([without(s, 15) for s in slots])
    return reference.decode(q_latent, q_rope, rows, slots, seq_lens - 1, **options)


def last_token_dropped(q_latent, q_rope, rows, slots, seq_lens, options):
    return reference.decode(q_latent, q_rope, rows, slots, seq_lens - 1, **options)


def foreign_token(q_latent, q_rope, rows, slots, seq_lens, options):
    """One row of the neighbour, seen as if it stood at the front."""
    slots = torch.stack([with_extra(s, 0, slots[b - 1, 0]) for b, s in enumerate(slots)])
    return reference.decode(q_latent, q_rope, rows, slots, seq_lens + 1, **options)


def wrong_page(q_latent, q_rope, rows, slots, seq_lens, options):
    """The second page of 16 tokens is the neighbour's."""
    slots = slots.clone()
    slots[:, 16:32] = slots[:, 16:32].roll(1, 0)
    return reference.decode(q_latent, q_rope, rows, slots, seq_lens, **options)


def one_query_sees_the_next_token(q_latent, q_rope, rows, slots, seq_lens, options):
    """Causal mask off by one: every query token but the last sees one key too many."""
    out, lse = reference.decode(q_latent, q_rope, rows, slots, seq_lens, **options)
    for i in range(options["query_len"] - 1):
        picked = slice(i, None, options["query_len"])
        seen = seq_lens - options["query_len"] + i + 2
        alone = {**options, "query_len": 1}
        out[picked], lse[picked] = reference.decode(q_latent[picked], q_rope[picked], rows, slots, seen, **alone)
    return out, lse


MISTAKES = [
    scale_off,
    first_token_dropped,
    token_at_page_edge_dropped,
    last_token_dropped,
    foreign_token,
    wrong_page,
    one_query_sees_the_next_token,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
class TestComparison:
    """What every kernel test relies on: a planted mistake fails, rounding does not."""

    @pytest.fixture
    def case(self, dtype):
        return make_decode(DEEPSEEK, [40, 129, 700, 1500], query_lens=2, page_size=16, dtype=dtype)

    def test_rounded_truth_passes(self, case, dtype):
        out, lse = case.reference()
        assert_matches("out", out.to(dtype), out, TOLERANCE[dtype])
        assert_matches("lse", lse.float(), lse, LSE_TOLERANCE)

    def test_one_token_pages_change_nothing(self, case, dtype):
        out, lse = case.reference()
        same_out, same_lse = reference.decode(*one_token_pages(case), **case.options)
        assert_matches("out", same_out, out, REORDERED)
        assert_matches("lse", same_lse, lse, REORDERED)

    @pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
    def test_mistake_fails(self, case, dtype, mistake):
        out, lse = case.reference()
        wrong_out, wrong_lse = mistake(*one_token_pages(case), case.options)
        with pytest.raises(AssertionError, match="values off"):
            assert_matches("out", wrong_out.to(dtype), out, TOLERANCE[dtype])
        with pytest.raises(AssertionError, match="values off"):
            assert_matches("lse", wrong_lse.float(), lse, LSE_TOLERANCE)

    def test_row_behind_the_end_is_seen_as_nan(self, case, dtype):
        """The makers poison rows that nobody owns, so one key too many at the end cannot hide in an average."""
        q_latent, q_rope, rows, slots, seq_lens = one_token_pages(case)
        wrong_out, _ = reference.decode(q_latent, q_rope, rows, slots, seq_lens + 1, **case.options)
        out, _ = case.reference()
        with pytest.raises(AssertionError, match="are NaN"):
            assert_matches("out", wrong_out.to(dtype), out, TOLERANCE[dtype])

    @pytest.mark.parametrize("base", [2.0, 10.0])
    def test_lse_in_another_base_fails(self, case, dtype, base):
        _, lse = case.reference()
        with pytest.raises(AssertionError, match="values off"):
            assert_matches("lse", lse / math.log(base), lse, LSE_TOLERANCE)

    def test_single_nan_fails(self, case, dtype):
        out, _ = case.reference()
        wrong = out.clone()
        wrong[-1, -1, -1] = torch.nan
        with pytest.raises(AssertionError, match=f"1 of {out.numel()} values are NaN"):
            assert_matches("out", wrong, out, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "wrong", [[0.0, 1.0, -torch.inf], [-torch.inf, -torch.inf, 1.0], [torch.inf, 1.0, 1.0]], ids=str
)
def test_infinities_elsewhere_fail(wrong):
    expected = torch.tensor([-torch.inf, 1.0, 1.0])
    assert_matches("lse", expected.clone(), expected, LSE_TOLERANCE)
    with pytest.raises(AssertionError, match="infinities"):
        assert_matches("lse", torch.tensor(wrong), expected, LSE_TOLERANCE)


def test_one_wrong_value_among_many_fails():
    """The cosine of the whole hardly moves; the rule for each element sees it."""
    expected = torch.ones(1000, 1000)
    wrong = expected.clone()
    wrong[7, 7] = 1.1
    with pytest.raises(AssertionError, match="1 of 1000000 values off"):
        assert_matches("out", wrong, expected, TOLERANCE[torch.bfloat16])


def test_wrong_values_that_are_all_small_fail():
    """Each is within the absolute bound; the cosine of the whole sees it."""
    expected = torch.full((100,), 1e-3)
    with pytest.raises(AssertionError, match="0 of 100 values off"):
        assert_matches("out", -expected, expected, TOLERANCE[torch.bfloat16])


def test_other_shape_fails():
    with pytest.raises(AssertionError, match=r"\(2, 3\), wanted \(3, 2\)"):
        assert_matches("out", torch.zeros(2, 3), torch.zeros(3, 2), LSE_TOLERANCE)
