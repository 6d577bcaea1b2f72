"""What happens to an engine while it lives: run one scenario on vLLM's own engine, and write what it answered.

    python life_runner.py SPEC.json RESULT.json

SPEC: as for engine_runner.py, and "scenario": name of one of SCENARIOS, and "arguments" of that. RESULT: what it
returns, and how often each of our kernels was called.
"""

import json
import pathlib
import sys
import time
from functools import partial

import engine_runner
import offload_stand_in
import torch
from soak import soak


class Engine:
    """vLLM's engine in this process."""

    def __init__(self, max_tokens: int, **options):
        from vllm import LLM, SamplingParams

        self.llm, self._max_tokens = LLM(**engine_runner.OPTIONS | options), max_tokens
        self._sampling = partial(SamplingParams, temperature=0, ignore_eos=True, logprobs=1)

    def answer(self, prompts, **options) -> list[dict]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(asked, self._sampling(max_tokens=self._max_tokens), use_tqdm=False, **options)
        return [engine_runner.answered(answer) for answer in answers]

    def add(self, name: str, prompt, max_tokens: int | None = None) -> None:
        sampling = self._sampling(max_tokens=max_tokens or self._max_tokens)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)

    def step(self) -> dict[str, dict]:
        """One step of the engine: answers of the requests that it ended, and how far the others are."""
        return {out.request_id: engine_runner.answered(out) for out in self.llm.llm_engine.step()}

    def abort(self, names) -> None:
        self.llm.llm_engine.abort_request(list(names))

    def free_pages(self) -> int:
        return self._core().scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def absorbed_addresses(self) -> list[int]:
        """Where the matrices lie that decode's queries and outputs are multiplied with."""

        def look(model):
            layers = [module for module in model.modules() if hasattr(module, "W_UK_T")]
            return [getattr(layer, name).data_ptr() for layer in layers for name in ("W_UK_T", "W_UV")]

        return self.llm.apply_model(look)[0]

    def scratch_addresses(self) -> list[int]:
        """Where our layers' scratch for decode lies."""

        def look(model):
            impls = [module.impl for module in model.modules() if hasattr(module, "W_UK_T")]
            return [tensor.data_ptr() for impl in impls for tensor in impl._scratch()]

        return self.llm.apply_model(look)[0]

    def _core(self):
        return self.llm.llm_engine.engine_core.engine_core


def reload(engine: Engine, prompts, other: str) -> dict:
    """Answer, load the weights of another checkpoint in place, answer again, and go back."""
    own = engine.llm.llm_engine.vllm_config.model_config.model
    answers, addresses = [], []
    for weights in (None, other, own):
        if weights is not None:
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": weights})
            engine.llm.reset_prefix_cache()
        answers.append(engine.answer(prompts))
        addresses.append(engine.absorbed_addresses())
    return {"answers": answers, "addresses": addresses}


def adapters(engine: Engine, prompts, folder: str, wrong: str) -> dict:
    """One batch in which every second request has an adapter; then one with an adapter that cannot be right."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("small", 1, folder)
    mixed = engine.answer(prompts, lora_request=[adapter if i % 2 else None for i in range(len(prompts))])
    try:
        engine.llm.llm_engine.add_lora(LoRARequest("wrong", 2, wrong))
    except Exception as error:
        return {"answers": mixed, "refusal": str(error)}
    return {"answers": mixed, "refusal": ""}


def sleep(engine: Engine, prompts, level: int) -> dict:
    """Answer, sleep, wake, load the weights again if they were given up, answer again: one request after another."""

    def alone():
        return [engine.answer([prompt])[0] for prompt in prompts]

    answers, addresses = [alone()], [engine.absorbed_addresses()]
    free = torch.cuda.mem_get_info()[0]
    engine.llm.sleep(level=level)
    freed = torch.cuda.mem_get_info()[0] - free
    engine.llm.wake_up()
    if level == 2:
        engine.llm.collective_rpc("reload_weights")
    engine.llm.reset_prefix_cache()
    answers.append(alone())
    addresses.append(engine.absorbed_addresses())
    return {"answers": answers, "addresses": addresses, "freed": freed}


def offload(engine: Engine, prompts) -> dict:
    """Answer twice, with nothing left in the engine's own cache in between."""
    first = engine.answer(prompts)
    for _ in range(4):  # a GPU's copies go on beside steps, and a step hears which are done
        time.sleep(0.25)
        engine.answer([[7, 8, 9]])
    engine.llm.reset_prefix_cache()
    return {"answers": [first, engine.answer(prompts)]}


SCENARIOS = {run.__name__: run for run in (reload, adapters, sleep, offload, soak)}


def main(spec_path: str, result_path: str) -> None:
    spec = json.loads(pathlib.Path(spec_path).read_text())
    if spec.get("invariant_attention"):
        engine_runner.tell_our_adapter_alone()
    if not torch.cuda.is_available():
        offload_stand_in.stand_in()
    engine = Engine(spec["max_tokens"], **spec["llm"])
    result = SCENARIOS[spec["scenario"]](engine, **spec["arguments"])
    result |= {"calls": engine_runner.calls(), "metrics": engine_runner.counters(engine.llm)}
    pathlib.Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
