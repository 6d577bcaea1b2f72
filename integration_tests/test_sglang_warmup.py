"""SGLang's real engine needs no kernel that was not compiled before it was ready, on a GPU that is not here."""

import pytest
from harness import prompts, run_sglang
from serving_watch import FORGET, STAND_IN

pytest.importorskip("sglang")


def varied_rounds() -> list:
    """One request, many, uneven lengths; long and short tails behind cached prefixes."""
    shared = prompts((300,))[0]
    return [
        prompts((5,)),
        prompts((1, 300, 17, 64)),
        [shared, *prompts((40,) * 3, seed=2)],
        [shared + tail for tail in prompts((1, 8, 33, 60), seed=3)],
        [shared + tail for tail in prompts((250,), seed=6)],
        prompts(tuple(range(2, 10)), seed=4),
    ]


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("H200", {}),
        ("H200", {"page_size": 64}),
        ("A100", {"page_size": 16, "kv_cache_dtype": "fp8_e4m3"}),
    ],
    ids=["hopper", "hopper-pages", "ampere-fp8"],
)
def test_nothing_is_compiled_while_serving(tmp_path, checkpoints, device, options):
    options |= {"dtype": "bfloat16", "chunked_prefill_size": 256}
    run = run_sglang(tmp_path, checkpoints(), varied_rounds(), env={STAND_IN: device}, **options)
    assert run.watch["early"] > 0
    assert run.watch["late"] == []
    assert {name.split(":")[0] for name in run.calls} >= {"decode", "prefill", "cache_write"}
    assert "calls took every form of the kernels" in run.log


def test_what_the_warm_up_leaves_out_is_compiled_while_serving(tmp_path, checkpoints):
    """So the test above can fail."""
    env = {STAND_IN: "H200", FORGET: "decode"}
    run = run_sglang(tmp_path, checkpoints(), varied_rounds()[:2], env=env, dtype="bfloat16")
    assert "_decode_kernel" in [name for name, _ in run.watch["late"]]
