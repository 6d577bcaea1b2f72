"""What the source of our adapters does not say of the engines' interfaces; record_contract.py reads the rest off it."""

_MLA, _PREFILL = "vllm.model_executor.layers.attention.mla_attention", "vllm.v1.attention.backends.mla.prefill"
_CONVERTOR = "vllm.transformers_utils.model_arch_config_convertor.ModelArchConfigConvertorBase"

# Classes of the objects that engines hand us, and where those stand in our source: names of variables, of attributes,
# or of functions that return them, if need be after the name of the file or of the function.
OBJECTS = {
    "vllm.config.VllmConfig": "vllm_config doctor.config",
    "vllm.config.ModelConfig": "model_config cpu_platform.model",
    "vllm.config.ParallelConfig": "parallel_config backend.parallel",
    "vllm.config.CacheConfig": "cache_config cpu_platform.cache doctor.cache",
    "vllm.config.SchedulerConfig": "scheduler_config cpu_platform.scheduler",
    "vllm.config.SpeculativeConfig": "speculative_config backend.speculative",
    "vllm.config.AttentionConfig": "attention_config cpu_platform.attention doctor.attention",
    "vllm.config.CompilationConfig": "compilation_config",
    "vllm.config.DeviceConfig": "device_config",
    "vllm.engine.arg_utils.EngineArgs": "from_cli_args()",
    "vllm.distributed.parallel_state.GroupCoordinator": "get_dcp_group()",
    "vllm.v1.attention.backend.AttentionBackend": "get_class()",
    "vllm.v1.attention.backend.CommonAttentionMetadata": "metadata.batch",
    "vllm.v1.attention.backends.registry.AttentionBackendEnum": "selected_backend slot",
    "vllm.v1.worker.workspace.WorkspaceManager": "current_workspace_manager()",
    f"{_PREFILL}.base.MLAPrefillBackend": "layer_geometry.layer",
    f"{_PREFILL}.registry.MLAPrefillBackendEnum": "slot",
    f"{_PREFILL}.selector.MLAPrefillSelectorConfig": "selector_config",
    f"{_MLA}.MLACommonImpl": "layer_geometry.layer",
    f"{_MLA}.MLAAttention": "_layer get_ready.layer",
    f"{_MLA}.MLACommonMetadata": "build.metadata _plan_prefill.metadata",
    f"{_MLA}.MLACommonPrefillMetadata": "metadata.prefill compat.prefill prefill.step _prefill_metadata",
    f"{_MLA}.MLACommonPrefillMetadata.ChunkedContextMetadata": "chunked_context compat.context",
    f"{_MLA}.MLACommonPrefillMetadata.ContextChunk": "compat.chunk",
    "sglang.srt.configs.model_config.ModelConfig": "model_config _problems.config",
    "sglang.srt.layers.radix_attention.RadixAttention": "backend.layer",
    "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool": "token_to_kv_pool",
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool": "req_to_token_pool",
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": "forward_batch",
    "sglang.srt.model_executor.forward_batch_info.ForwardMode": "forward_mode backend.mode",
    "sglang.srt.model_executor.model_runner.ModelRunner": "runner draft_model_runner",
    "sglang.srt.models.deepseek_v2.DeepseekV2AttentionMLA": "prepare_prefill_qkv.layer forward_method.attention"
    " _up_project.layer",  # it gives its RadixAttention the projection that we read there
    "sglang.srt.runtime_context.ParallelContext": "get_parallel()",
    "sglang.srt.server_args.ServerArgs": "server_args arguments",
    "sglang.srt.speculative.draft_utils.DraftBackendFactory": "draft.factory",
    "sglang.srt.speculative.eagle_info.EagleVerifyInput": "spec_info",
}
# Attributes that we read by names which stand in variables, or whose objects' other attributes are not the engine's.
# Any version may lack one with a question mark.
BY_NAME = {
    "vllm.logger._VllmLogger": "info_once warning_once",
    "sglang.srt.server_args": "ATTENTION_BACKEND_CHOICES DRAFT_ATTENTION_BACKEND_CHOICES?",
    "sglang.srt.server_args.ServerArgs": "attention_backend prefill_attention_backend decode_attention_backend"
    " dcp_size? attn_cp_size? enable_two_batch_overlap?",
    "sglang.srt.models.deepseek_common.attention_backend_handler": "is_in_piecewise_cuda_graph?"
    " is_in_tc_piecewise_cuda_graph? is_in_breakable_cuda_graph?",
}
# Classes that an engine assembles from fields of other classes, and the folder of those.
FIELDS_ELSEWHERE = {"sglang.srt.server_args.ServerArgs": "sglang/srt/arg_groups/fields"}
# Classes of ours that are treated as this class of the engine without being written as subclasses of it.
STAND_INS = {
    "AskedForShapes": f"{_MLA}.MLACommonBackend",
    "_Announced": _CONVERTOR,
    "_Listed": _CONVERTOR,
    "MLAMultiStepDraft": "sglang.srt.layers.attention.triton_backend.TritonMultiStepDraftBackend",
}
# Methods of ours that take less than the engine declares, or that no class of it declares: all its calls are recorded.
BY_CALLS = {"_build_decode", "run_prefill_context_chunk", "prepare_prefill_qkv", "_create_backend"}
