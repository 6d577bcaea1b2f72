"""Run SGLang's own engine once and write what it did.

    python sglang_runner.py SPEC.json RESULT.json

SPEC: {"engine": keyword arguments of sglang.Engine, "rounds": [[prompt token ids, ...], ...], "max_tokens": n}. Rounds
run one after another on the same engine. RESULT: as engine_runner.py writes it for vLLM.

SGLang's scheduler runs our kernels in a process of its own, which is killed in the end. A plugin of this test, beside
ours, writes down each call there and each kernel that is compiled, and can have SGLang's other operations done by
PyTorch.
"""

import json
import os
import pathlib
import sys
from collections import Counter

from serving_watch import Watch

PROBE = "kernel_calls_probe"
CALLS_FILE, COMPILED_FILE = "MLA_TEST_CALLS_FILE", "MLA_TEST_COMPILED_FILE"
PLAIN_OPERATIONS = "MLA_TEST_PLAIN_OPERATIONS"
OPS_OF_THE_MODE = "MLA_TEST_BATCH_INVARIANT_OPS"  # "0": leave out SGLang's, which need an accelerator


def register() -> None:
    """Entry point of the test's plugin: note every call of a kernel of ours in a file, and what is compiled in
    another."""
    Watch(note=_note_compiled).follow()
    if os.environ.get(PLAIN_OPERATIONS):
        _plain_operations()
    from mla_backend.attention import MLAAttention

    call, path = MLAAttention._call, os.environ[CALLS_FILE]

    def noted(self, operation, *args, **kwargs):
        with open(path, "a") as calls:
            calls.write(f"{operation}:{self.chosen[operation].kernel.name}\n")
        return call(self, operation, *args, **kwargs)

    MLAAttention._call = noted
    if os.environ.get(OPS_OF_THE_MODE) == "0":
        from sglang.srt import batch_invariant_ops

        batch_invariant_ops.enable_batch_invariant_mode = lambda: None


def _note_compiled(kernel: list) -> None:
    with open(os.environ[COMPILED_FILE], "a") as compiled:
        compiled.write(json.dumps(kernel) + "\n")


def _plain_operations() -> None:
    """Norms, activations and rotary embedding as SGLang writes them in PyTorch: its CUDA kernels for them take no
    float32, so that nothing could be compared exactly on a GPU."""
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding
    from sglang.srt.layers.utils.multi_platform import MultiPlatformOp

    dispatch = MultiPlatformOp.dispatch_forward

    def plain(self):
        return self.forward_native if isinstance(self, RMSNorm | SiluAndMul | RotaryEmbedding) else dispatch(self)

    MultiPlatformOp.dispatch_forward = plain


def install_probe(folder: pathlib.Path) -> pathlib.Path:
    """Make this file a plugin for processes that SGLang will start: a distribution's metadata is enough."""
    info = folder / "site" / f"{PROBE}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROBE}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{PROBE} = sglang_runner:register\n")
    calls = folder / "calls"
    calls.touch()
    sys.path.append(str(info.parent))  # processes that are spawned get this path, and this file's folder is on it
    os.environ[CALLS_FILE], os.environ[COMPILED_FILE] = str(calls), str(folder / "compiled")
    return calls


def main(spec_path: str, result_path: str) -> None:
    import sglang
    import torch

    spec = json.loads(pathlib.Path(spec_path).read_text())
    calls = install_probe(pathlib.Path(result_path).parent)
    options = {
        "dtype": "float32",
        "context_length": 1024,
        "max_running_requests": 8,
        "max_total_tokens": 8192,
        "mem_fraction_static": 0.3,
        "attention_backend": "mla_backend",
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "log_level": "info",
        "random_seed": 0,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    engine = sglang.Engine(**{**options, **spec["engine"]})
    early = len(_compiled())
    sampling = {"temperature": 0, "max_new_tokens": spec["max_tokens"], "ignore_eos": True}
    rounds = []
    for prompts in spec["rounds"]:
        answers = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
        rounds.append([_answer(a) for a in answers])
    result = {"rounds": rounds, "calls": Counter(calls.read_text().split()), "metrics": _numbers(engine)}
    result["watch"] = {"early": early, "late": _compiled()[early:]}
    pathlib.Path(result_path).write_text(json.dumps(result))
    engine.shutdown()


def _compiled() -> list:
    path = pathlib.Path(os.environ[COMPILED_FILE])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _answer(answer: dict) -> dict:
    about = answer["meta_info"]
    return {
        "tokens": answer["output_ids"],
        "logprobs": [logprob for logprob, *_ in about["output_token_logprobs"]],
        "cached": about["cached_tokens"],
    }


def _numbers(engine) -> dict[str, float]:
    state = engine.get_server_info()["internal_states"][0]
    return {name: value for name, value in state.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    main(*sys.argv[1:])
