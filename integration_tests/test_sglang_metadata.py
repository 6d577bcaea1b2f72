"""What our backend makes of SGLang's batches: block tables, lengths, drafts and their branches, buffers of graphs."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.draft_utils import DraftBackendFactory
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as mla
from sglang_kit import KitTest

from mla_backend.sglang_adapter import NAME
from mla_backend.sglang_adapter.backend import SGLangMLABackend, _refuse
from mla_backend.sglang_adapter.draft import MLAMultiStepDraft
from mla_backend.sglang_adapter.metadata import PageTables
from mla_backend.sglang_adapter.problem import shares_cache
from mla_kernels import Kernel


def fixture(mode=ForwardMode.DECODE, *, page_size=16, prefix_lens=(14, 15, 16), extend_lens=()):
    case = mla.MLAAttentionCase(
        name="metadata",
        backend=NAME,
        forward_mode=mode,
        num_heads=4,
        page_size=page_size,
        prefix_lens=prefix_lens,
        extend_lens=extend_lens,
    )
    return mla.build_mla_attention_fixture(KitTest(), case, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("page_size", [1, 4])
def test_pages_of_requests(page_size):
    """Pages lie in any order; a table is as wide as asked for, and never wider than SGLang's own."""
    pages = torch.randperm(30)[:9].view(3, 3)
    slots = (pages[:, :, None] * page_size + torch.arange(page_size)).view(3, -1).to(torch.int32)
    tables = PageTables(slots, page_size)
    assert tables.make(torch.tensor([2, 0]), page_size + 1).tolist() == pages[[2, 0], :2].tolist()
    assert tables.make(torch.tensor([1]), 1000).tolist() == pages[[1]].tolist()
    assert tables.make(torch.tensor([1]), 0).shape == (1, 1)


@pytest.mark.parametrize(
    ("mode", "extend", "seq_lens", "query_len", "padded"),
    [
        (ForwardMode.DECODE, None, [20, 9], 1, False),
        (ForwardMode.DECODE, None, [20, 9], 1, True),
        (ForwardMode.TARGET_VERIFY, None, [23, 12], 3, False),
        (ForwardMode.TARGET_VERIFY, None, [23, 12], 3, True),
        (ForwardMode.DRAFT_EXTEND_V2, [3, 3], [20, 9], 3, False),
        (ForwardMode.DRAFT_EXTEND_V2, [2, 1], [21, 11], 3, False),
        (ForwardMode.DRAFT_EXTEND_V2, [3, 3], [20, 9], 3, True),
    ],
)
def test_lengths_of_uniform_steps(mode, extend, seq_lens, query_len, padded):
    backend = fixture(ForwardMode.TARGET_VERIFY, extend_lens=(3, 3, 3)).backend
    beyond = [30] if padded else []  # graphs' buffers are handed over whole
    batch = SimpleNamespace(
        forward_mode=mode,
        batch_size=2,
        seq_lens=torch.tensor([20, 9, *beyond]),
        seq_lens_cpu=torch.tensor([20, 9, *beyond]),
        req_pool_indices=torch.tensor([1, 0, *beyond]),
        spec_info=None,
    )
    if not padded:
        batch.extend_seq_lens = None if extend is None else torch.tensor(extend)
    if padded:
        backend.init_cuda_graph_state(2, 6)
        backend.init_forward_metadata_out_graph(batch)
    else:
        backend.init_forward_metadata(batch)
    step = backend.forward_metadata
    assert step.seq_lens_B.tolist() == seq_lens
    assert step.seq_lens_B.dtype == torch.int32
    assert step.query_len == query_len
    assert step.query_start_B1 is None
    assert step.block_table_BM.shape[1] * 16 >= max(seq_lens)


def test_graphs_are_refused_where_decode_plans_on_the_host(monkeypatch):
    """SGLang asks for buffers before it captures anything."""
    backend = fixture().backend
    monkeypatch.setattr(Kernel, "capturable", False)
    with pytest.raises(ValueError, match=r"MLA_BACKEND_DECODE=torch_decode, .*: set --disable-cuda-graph, or unset"):
        backend.init_cuda_graph_state(8, 8)


@pytest.mark.parametrize("page_size", [1, 16])
def test_buffers_of_graphs_hold_each_step(page_size):
    """What a graph would read gives what a step without one gives, at addresses that stay, for one batch after
    another."""
    made = fixture(page_size=page_size)
    made.backend.init_cuda_graph_state(8, 8)
    addresses = set()
    for other in (made, fixture(page_size=page_size, prefix_lens=(30, 2, 7))):
        expected = mla.run_mla_fixture_eager(other)
        buffers = other.backend._graph = made.backend._graph
        buffers._step.table.fill_(10**6)  # nobody may read beyond a request's pages
        other.backend.init_forward_metadata_out_graph(other.forward_batch)
        step = other.backend.forward_metadata
        addresses.add((step.block_table_BM.data_ptr(), step.seq_lens_B.data_ptr()))
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=other.backend)):
            torch.testing.assert_close(other.actual_module(other.input_hidden, other.forward_batch), expected)
    assert len(addresses) == 1


@pytest.mark.parametrize(("topk", "page_size"), [(1, 1), (1, 16), (2, 1), (3, 1)])
def test_each_draft_step_sees_its_branch(topk, page_size):
    """In step i: the context, then the first i + 1 tokens of the branch, as SGLang lays them out behind the context."""
    made, steps = fixture(page_size=page_size, prefix_lens=(5, 20, 1)), 4
    slots = made.runner.req_to_token_pool.req_to_token
    slots.copy_(torch.arange(slots.numel(), dtype=torch.int32).view_as(slots) + page_size)
    draft = MLAMultiStepDraft(made.runner, topk, steps)
    batch = SimpleNamespace(
        batch_size=3,
        seq_lens=torch.tensor([5, 20, 1]),
        seq_lens_cpu=torch.tensor([5, 20, 1]),
        req_pool_indices=torch.tensor([2, 0, 1]),
    )
    draft.init_forward_metadata(batch)
    assert len(draft.attn_backends) == steps - 1
    for i, backend in enumerate(draft.attn_backends):
        step = backend.forward_metadata
        for row in range(3 * topk):
            request, branch = divmod(row, topk)
            own, context = slots[batch.req_pool_indices[request]], int(batch.seq_lens[request])
            first = context + branch * steps
            wanted = torch.cat([own[:context], own[first : first + i + 1]])
            assert step.seq_lens_B[row] == len(wanted)
            assert step.block_table_BM[row, : -(-len(wanted) // page_size)].tolist() == [
                slot // page_size for slot in wanted[::page_size].tolist()
            ]


def test_trees_of_a_batch_that_is_padded_for_a_graph():
    """SGLang pads lengths, with contexts of one token, but neither mask nor slots; its trees stay what they were."""
    visible = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]], dtype=torch.bool)
    masks = [torch.cat([torch.ones(3, n, dtype=torch.bool), v], 1) for n, v in zip((4, 2), visible, strict=True)]
    backend = fixture(ForwardMode.TARGET_VERIFY, prefix_lens=(4, 2, 1, 1), extend_lens=(3,) * 4).backend
    backend.init_cuda_graph_state(4, 12)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=4,
        seq_lens=torch.tensor([4, 2, 1, 1]),
        seq_lens_cpu=None,
        req_pool_indices=torch.tensor([1, 0, 0, 0]),
        out_cache_loc=torch.tensor([40, 41, 42, 50, 51, 52]),
        spec_info=SimpleNamespace(custom_mask=torch.cat([mask.flatten() for mask in masks]), topk=2),
    )
    backend.init_forward_metadata_out_graph(batch)
    step = backend.forward_metadata
    assert step.num_queries == 12
    assert step.context.seq_lens_B.tolist() == [4, 2, 1, 1]
    seen = [row[:n] for row, n in zip(step.ancestors.block_table_BM.tolist(), step.ancestors.seq_lens_B, strict=True)]
    assert seen[:6] == [[40], [40, 41], [40, 42], [50], [50, 51], [50, 51, 52]]
    assert all(slot == 0 for row in seen[6:] for slot in row)


def test_lengths_of_the_host_that_may_be_old():
    """A backend that does without them gets an old buffer from some versions, not None."""
    made = fixture(page_size=16, prefix_lens=(30, 20, 10))
    made.forward_batch.seq_lens_cpu = torch.tensor([1, 1, 1])
    assert not made.backend.needs_cpu_seq_lens
    torch.testing.assert_close(mla.run_mla_fixture_eager(made), mla.expected_mla_fixture_output(made))


def test_tokens_that_pad_a_batch_after_it_was_planned():
    """Data-parallel attention: as many tokens on each rank; the surplus gets zeros."""
    made = fixture(page_size=16)
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=made.backend)):
        made.backend.init_forward_metadata(made.forward_batch)
        layer = made.actual_module.attn_mqa
        q = torch.randn(3, layer.tp_q_head_num * layer.head_dim)
        alone = made.backend.forward_decode(q, None, None, layer, made.forward_batch)
        padded = made.backend.forward_decode(
            torch.cat([q, torch.randn(2, q.shape[1])]), None, None, layer, made.forward_batch
        )
    torch.testing.assert_close(padded[:3], alone)
    assert padded[3:].count_nonzero() == 0
    assert len(padded) == 5


def test_rope_of_no_width_that_comes_apart():
    made = fixture(page_size=16)
    layer, cache = made.actual_module.attn_mqa, made.runner.token_to_kv_pool.get_key_buffer(0)
    q, new = torch.randn(3, layer.tp_q_head_num, layer.head_dim), torch.randn(3, 1, layer.head_dim)
    none = {"q_rope": q.new_empty(3, layer.tp_q_head_num, 0), "k_rope": q.new_empty(3, 1, 0)}
    made.backend.init_forward_metadata(made.forward_batch)
    made.backend.forward_decode(q, new, new, layer, made.forward_batch, **none)
    assert torch.equal(cache[made.forward_batch.out_cache_loc], new)


def test_full_graphs_of_a_prefill_are_refused():
    made = fixture(ForwardMode.EXTEND, prefix_lens=(4,), extend_lens=(2,))
    made.backend.init_cuda_graph_state(1, 2)
    with pytest.raises(NotImplementedError, match="--cuda-graph-backend-prefill"):
        made.backend.init_forward_metadata_out_graph(made.forward_batch, in_capture=True)


def test_scratch_of_drafts_counts_branches():
    made = fixture(page_size=1)
    draft = MLAMultiStepDraft(made.runner, 3, 4)
    rows = made.runner.req_to_token_pool.req_to_token.shape[0]
    assert {backend._reserved for backend in draft.attn_backends} == {3 * rows}


def test_draft_steps_for_graphs():
    made = fixture(page_size=1, prefix_lens=(5, 20, 1))
    draft = MLAMultiStepDraft(made.runner, 2, 3)
    draft.init_forward_metadata(made.forward_batch)
    wanted = [backend.forward_metadata for backend in draft.attn_backends]
    draft.init_cuda_graph_state(4, 8)
    draft.init_forward_metadata_out_graph(made.forward_batch, in_capture=True)
    for backend, step in zip(draft.attn_backends, wanted, strict=True):
        held = backend.forward_metadata
        assert held.seq_lens_B.tolist() == step.seq_lens_B.tolist()
        assert held.block_table_BM[:, : step.block_table_BM.shape[1]].tolist() == step.block_table_BM.tolist()


def test_sglang_makes_our_backends_for_drafts():
    """SGLang's factory has a fixed list of names."""
    made = fixture()
    made.runner.draft_attention_backend = NAME
    factory = DraftBackendFactory(made.runner, topk=1, speculative_num_steps=3)
    steps, extend = factory.create_decode_backend(), factory.create_draft_extend_backend()
    assert isinstance(steps, MLAMultiStepDraft)
    assert isinstance(extend, SGLangMLABackend)
    for backend in (*steps.attn_backends, extend):
        assert (backend.prefill_attention_backend_str, backend.decode_attention_backend_str) == (NAME, NAME)
    made.runner.draft_attention_backend = "nobody"
    with pytest.raises(ValueError, match="nobody"):
        DraftBackendFactory(made.runner, topk=1, speculative_num_steps=3).create_decode_backend()


@pytest.mark.parametrize(
    ("backends", "shared"),
    [
        ((NAME, None, None), False),
        ((None, NAME, NAME), False),
        ((NAME, "fa3", None), True),
        ((None, NAME, "fa3"), True),
    ],
)
def test_another_backend_shares_the_cache(backends, shared):
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    assert shares_cache(SimpleNamespace(**dict(zip(names, backends, strict=True)))) is shared


@pytest.mark.parametrize("scale", [None, 1.0, 0.5])
def test_a_scale_matters_only_to_who_shares_the_cache(scale):
    """SGLang's pool writes fp8 values as they are, and so do we; some of its backends divide by a scale before."""
    layer = SimpleNamespace(layer_id=3, logit_cap=0.0, sliding_window_size=-1, k_scale_float=scale)
    _refuse(layer, {}, others_scale=False)
    if scale == 0.5:
        with pytest.raises(NotImplementedError, match=r"layer 3: it asks for an fp8 cache with the scale 0\.5 that"):
            _refuse(layer, {}, others_scale=True)
    else:
        _refuse(layer, {}, others_scale=True)
