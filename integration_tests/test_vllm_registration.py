"""Registration is in effect, cheap, repeatable, and never stops vLLM. Each check runs in a process of its own, where
nothing of ours is yet but the CPU platform."""

import os
import pathlib
import tempfile
import textwrap

import forked_runs
import pytest

pytest.importorskip("vllm")


def python(code: str, **env) -> str:
    """Output of `code` in a new process; logs come with it."""
    with tempfile.TemporaryDirectory() as folder:
        status, *output = forked_runs.python(textwrap.dedent(code), folder=pathlib.Path(folder), **env)
    assert status == 0, "".join(output)
    return "".join(output)


LOADED = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum as A
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum as P
"""


def test_both_slots_hold_our_classes():
    """vLLM logs and skips a plugin that fails, so only a look into the registry shows that it did not."""
    out = python(
        LOADED
        + """
print(A.CUSTOM.get_path(), P.CUSTOM.get_path())
print(A.CUSTOM.get_class().get_name(), A.CUSTOM.get_class().get_impl_cls().__name__, P.CUSTOM.get_class().get_name())
"""
    )
    assert "mla_backend.vllm_adapter.backend.MLABackend mla_backend.vllm_adapter.prefill.MLAPrefill" in out
    assert "CUSTOM MLAImpl CUSTOM" in out


def test_twice_is_once_and_no_gpu_is_touched():
    out = python(
        """
        import sys
        import torch
        import mla_backend
        mla_backend.register_vllm()
        mla_backend.register_vllm()
        assert not torch.cuda.is_initialized()
        heavy = ("mla_kernels.decode", "mla_backend.vllm_adapter.impl")
        print("heavy", {name for name in sys.modules if name.startswith(heavy)})
        """
    )
    assert "heavy set()" in out


def test_disabled_registers_nothing():
    out = python(LOADED + "print(A.CUSTOM.is_overridden(), P.CUSTOM.is_overridden())", MLA_BACKEND_DISABLE="1")
    assert "False False" in out


def test_an_untested_vllm_is_named_once():
    out = python(
        """
        import vllm
        vllm.__version__ = "0.99.1"
        import mla_backend
        mla_backend.register_vllm()
        mla_backend.register_vllm()
        """
    )
    assert out.count("mla_backend is made for vLLM 0.26 to 0.33 and was not tested with 0.99.1") == 1


def test_a_vllm_without_what_we_need_goes_on():
    """An old or a far newer vLLM may lack a module that registration imports."""
    out = python(
        """
        import sys
        sys.modules["vllm.v1.attention.backends.mla.prefill.registry"] = None
        import mla_backend
        mla_backend.register_vllm()
        print("still here")
        """
    )
    assert "still here" in out
    assert "mla_backend could not register with this vLLM" in out


def test_another_plugin_in_our_slot_is_named():
    out = python(
        """
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
        register_backend(AttentionBackendEnum.CUSTOM, "somebody.else.Backend")
        import mla_backend
        mla_backend.register_vllm()
        """
    )
    assert "from somebody.else.Backend" in out


def test_cpu_platform_is_ours_on_a_cpu():
    out = python("from vllm.platforms import current_platform; print(type(current_platform).__name__)")
    import torch

    assert ("MLACpuPlatform" in out) == (not torch.cuda.is_available())


def test_cpu_platform_stands_back_for_another_one(tmp_path):
    (tmp_path / "other_platform.py").write_text("def plugin():\n    return 'other_platform.Platform'\n")
    info = tmp_path / "other_platform-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nother = other_platform:plugin\n")
    out = python(
        "import mla_backend; print('platform', mla_backend.vllm_cpu_platform())",
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert "platform None" in out


def test_cpu_target_variable_is_explained():
    """VLLM_TARGET_DEVICE=cpu makes vLLM pass over platform plugins; the user must hear why the flag does nothing."""
    out = python("import mla_backend; mla_backend.register_vllm()", VLLM_TARGET_DEVICE="cpu")
    assert "VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins" in out


def test_a_layer_that_asks_for_more_is_refused():
    """vLLM's base class takes these arguments and passes over them; served so, the model would answer wrongly."""
    out = python(
        """
        from mla_backend.vllm_adapter.impl import _refuse_unknown_features
        _refuse_unknown_features(attn_type="decoder", sliding_window=None, num_heads=4)
        try:
            _refuse_unknown_features(attn_type="encoder", sliding_window=128, logits_soft_cap=30.0)
        except NotImplementedError as error:
            print(error)
        """
    )
    for part in ("no sliding_window, got 128", "no logits_soft_cap, got 30.0", "attn_type decoder, got encoder"):
        assert part in out
