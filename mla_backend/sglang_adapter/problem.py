"""The static facts of an SGLang model runner, and every reason why we cannot serve it."""

from dataclasses import dataclass, replace

import torch
from sglang.srt.environ import envs

from mla_backend.config import OPERATIONS, MLABackendConfig
from mla_backend.models import family_of
from mla_backend.sglang_adapter import NAME, compat
from mla_backend.steps import tile_tokens
from mla_kernels import (
    FORMATS,
    CacheLayout,
    Device,
    MLAGeometry,
    Problem,
    UnsupportedMLA,
    device_of,
    format_of,
    select,
    split_for,
)

SHORT_EXTEND = 16  # query tokens of a request that decode takes with whatever kernel it has
ANY_KERNEL = MLABackendConfig()
CACHE_OPTIONS = ("auto", "bfloat16", "fp8_e4m3")  # of --kv-cache-dtype
# SGLang writes tile-scaled rows for sparse models only, and stores other formats in bytes, too.
CACHE_DTYPES = tuple(cache_format.dtype for cache_format in FORMATS.values() if not cache_format.packed)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What decides whether and how a model is served: of a model runner, or of a server to come.

    model_config, arguments: SGLang's.  is_mla: whether SGLang serves it as MLA.
    is_draft: whether it drafts for another model.
    heads: query heads of a rank.  draft_tokens: of a request, verified at once; 1 without speculative decoding.
    """

    model_config: object
    arguments: object
    is_mla: bool
    is_draft: bool
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    page_size: int
    device: Device
    heads: int
    draft_tokens: int

    @property
    def deterministic(self) -> bool:
        """Whether an answer must have the same bits whatever else is in the batch: what the user said, or what SGLang
        makes of it (since 0.5.19 beside the arguments)."""
        on_policy = getattr(self.arguments, "rl_on_policy_target", None) is not None
        return on_policy or bool(getattr(self.arguments, "enable_deterministic_inference", False))

    @classmethod
    def of_runner(cls, runner) -> "Facts":
        return cls(
            model_config=runner.model_config,
            arguments=runner.server_args,
            is_mla=runner.use_mla_backend,
            is_draft=runner.is_draft_worker,
            dtype=runner.dtype,
            kv_cache_dtype=runner.kv_cache_dtype,
            page_size=runner.page_size,
            device=device_of(runner.device),
            heads=runner.model_config.num_attention_heads // compat.attention_ranks(),
            draft_tokens=compat.draft_tokens(runner),
        )


def make_problem(facts: Facts) -> tuple[Problem, Problem]:
    """The problem of decode, and of extends in latent space that bring more query tokens than decode does; one and the
    same in deterministic inference, where such extends come in tiles.

    Raises ValueError with every reason against serving this model.
    """
    reasons, problems = list(_refusals(facts)), None
    if facts.is_mla and facts.kv_cache_dtype in CACHE_DTYPES:
        try:
            problems = _problems(facts)
            reasons += _without_kernel(problems, facts.device)
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        raise ValueError(f"--attention-backend {NAME} cannot serve this model here: {'; '.join(reasons)}")
    return problems


def text_config(model_config):
    """The part of a model's config that describes its language model."""
    return getattr(model_config, "hf_text_config", None) or model_config.hf_config


def shares_cache(arguments) -> bool:
    """Whether another backend than ours does a part of the work, so that both read and write one cache."""
    both = getattr(arguments, "attention_backend", None)
    parts = (getattr(arguments, f"{work}_attention_backend", None) or both for work in ("prefill", "decode"))
    return any(backend not in (None, NAME) for backend in parts)


def drafts_trees(arguments) -> bool:
    """Whether drafts are trees, not chains."""
    return (getattr(arguments, "speculative_eagle_topk", None) or 1) > 1


def longer_extends(facts: Facts, shortest: int) -> list[int]:
    """Query tokens of a request, more than `shortest`, that extends in latent space can bring: one number for each
    power of two, at which kernels take other forms, and the most."""
    chunk = getattr(facts.arguments, "chunked_prefill_size", None) or -1
    most = min(chunk, facts.model_config.context_len) if chunk > 0 else facts.model_config.context_len
    return sorted({n for n in (shortest + 1, *(2**i for i in range(most.bit_length())), most) if shortest < n <= most})


def _refusals(facts: Facts):
    if not facts.is_mla:
        change = "name another --speculative-draft-attention-backend" if facts.is_draft else "leave the option out"
        yield f"it serves MLA models only, and SGLang takes this one for none; {change}"
    missing = family_of(text_config(facts.model_config)).missing
    if missing:
        yield f"the model needs {missing}, and mla_backend has none yet"
    option = getattr(facts.arguments, "kv_cache_dtype", None)  # mxfp8 has the dtype of fp8_e4m3 and other rows
    unknown_option = option not in (None, "bf16", *CACHE_OPTIONS)
    if unknown_option or facts.kv_cache_dtype not in CACHE_DTYPES:
        got = option if unknown_option else facts.kv_cache_dtype
        yield f"it needs --kv-cache-dtype {', '.join(CACHE_OPTIONS)}, got {got}"
    for option, default in (("dcp_size", 1), ("attn_cp_size", 1), ("enable_two_batch_overlap", False)):
        value = getattr(facts.arguments, option, None)
        if value not in (None, default):
            yield f"it needs --{option.replace('_', '-')} left out, got {value}"
    trees = drafts_trees(facts.arguments)
    if trees and envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get():
        yield "it plans the verification of trees of draft tokens after them; unset SGLANG_ENABLE_OVERLAP_PLAN_STREAM"
    if facts.deterministic and trees:
        yield (
            "with --enable-deterministic-inference it needs --speculative-eagle-topk 1: it attends to a tree's tokens "
            "apart from their context, with other bits than in decode"
        )
    if facts.deterministic and shares_cache(facts.arguments):
        yield (
            "with --enable-deterministic-inference it must do both prefill and decode: leave out "
            "--prefill-attention-backend and --decode-attention-backend"
        )
    if trees and facts.page_size > 1:
        yield f"it drafts trees (--speculative-eagle-topk above 1) with --page-size 1 only, got {facts.page_size}"


def _problems(facts: Facts) -> tuple[Problem, Problem]:
    config = facts.model_config
    geometry = MLAGeometry(
        num_heads=facts.heads,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
    )
    layout = CacheLayout(geometry=geometry, format=format_of(facts.kv_cache_dtype), page_size=facts.page_size)
    if facts.deterministic:
        problem = Problem(
            layout=layout,
            dtype=facts.dtype,
            max_query_len=max(facts.draft_tokens, tile_tokens(facts.heads)),  # extends come in tiles
            split_tokens=split_for(geometry),
            max_seq_len=config.context_len,
        )
        return problem, problem
    problem = Problem(layout=layout, dtype=facts.dtype, max_query_len=max(SHORT_EXTEND, facts.draft_tokens))
    return problem, replace(problem, max_query_len=max(problem.max_query_len, config.context_len))


def _without_kernel(problems: tuple[Problem, Problem], device):
    """A kernel that the user names is for decode; extends that it was not made for take the best that can."""
    named = MLABackendConfig.from_environment()
    for problem, operations, config in zip(problems, (OPERATIONS, ("decode",)), (named, ANY_KERNEL), strict=True):
        for operation in operations:
            try:
                select(operation, problem, device, kernel=config.kernel_for(operation))
            except (UnsupportedMLA, ValueError) as error:
                yield str(error)
