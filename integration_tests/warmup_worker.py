"""What Triton would compile for batches of every kind, after the warm-up of a layer's attention.

    python warmup_worker.py H200 '[{"heads": 5}, {}]'      what batches made it compile after the warm-up
    python warmup_worker.py H200 '[{}]' --forget           the same for each call of the warm-up, left out of it

The device is one of gpu_stand_in.py; each member of the second argument changes numbers of SPEC below, and has one JSON
line: a list, of one with every call, or of one for each call left out, of {"calls": of the warm-up, "compiled": kernels
by it, "late": kernels that batches then needed, "forgotten": operation left out, or null}.
"""

import json
import random
import sys
from dataclasses import replace
from functools import partial

import torch
from gpu_stand_in import COMPILED, DEVICES, pretend, start_anew

SPEC = {
    "heads": 16,
    "latent": 512,
    "rope": 64,
    "page_size": 64,
    "dtype": "bfloat16",
    "cache_dtype": "bfloat16",
    "max_requests": 300,
    "uniform": [1],
    "ragged": [1],
    "joined": False,
    "tiled": [],
    "split_tokens": None,
    "ranks": 1,
}


class Server:
    """Calls attention as engines do: with slices of larger tensors, and numbers at any address. Only whole numbers are
    any: nobody looks at others, and memory that is not touched takes no time."""

    def __init__(self, device: str, spec: dict):
        from mla_backend.attention import MLAAttention
        from mla_backend.config import MLABackendConfig
        from mla_kernels import CacheLayout, MLAGeometry, Problem, format_of

        self.spec, self._rng = spec, random.Random(0)
        self.geometry = MLAGeometry(
            num_heads=spec["heads"],
            kv_lora_rank=spec["latent"],
            qk_nope_head_dim=128,
            qk_rope_head_dim=spec["rope"],
            v_head_dim=128,
        )
        self.dtype, cache_dtype = getattr(torch, spec["dtype"]), getattr(torch, spec["cache_dtype"])
        layout = CacheLayout(geometry=self.geometry, format=format_of(cache_dtype), page_size=spec["page_size"])
        problem = Problem(
            layout=layout,
            dtype=self.dtype,
            max_query_len=max(spec["uniform"] + spec["ragged"] + spec["tiled"]),
            split_tokens=spec["split_tokens"],
            max_seq_len=40 * spec["page_size"],
        )
        all_heads = replace(self.geometry, num_heads=spec["ranks"] * spec["heads"])  # of ranks that share the cache
        self.attention = MLAAttention(
            problem,
            DEVICES[device],
            MLABackendConfig(),
            scale=0.1,
            decode_problem=replace(problem, layout=replace(layout, geometry=all_heads)),
        )
        self.cache_AGK = torch.empty(layout.shape(5), dtype=cache_dtype)
        self.cache_scale = torch.ones(()) if layout.format.scaled else None
        self.scratch = [
            torch.empty(shape, dtype=dtype)
            for shape, dtype in self.attention.decode_workspace(max_requests=spec["max_requests"])
        ]

    def warm_up(self) -> list:
        """(operation, call) of each call of the warm-up."""
        from mla_backend import warmup

        traffic = warmup.Traffic(
            max_requests=self.spec["max_requests"],
            page_size=self.spec["page_size"],
            uniform=self.spec["uniform"],
            ragged=self.spec["ragged"],
            tiled=self.spec["tiled"],
            joined=self.spec["joined"],
        )
        return warmup.calls(self.attention, traffic, torch.device("cpu"), self.scratch, self.cache_scale is not None)

    def serve(self) -> None:
        for requests in range(1, self.spec["max_requests"] + 1):
            for query_len in self.spec["uniform"]:
                self._decode(requests, query_len, requests * query_len)
            for query_len in self.spec["ragged"]:
                self._decode(requests, query_len, requests, ragged=True)
        for tokens_of_tile in self.spec["tiled"]:
            for tiles in (*range(1, 24), *range(24, 270, 15), 270):
                self._decode_tiles(tiles, tokens_of_tile)
        for new, old in (([1], [0]), ([1, 1], [1, 0]), ([16], [16]), ([15, 3], [40, 0]), ([100, 17, 1], [5, 33, 64])):
            self._prefill(new, old)
        for new, old in (([16], [3000]), ([2048], [0]), ([7, 2100], [2100, 3])):  # enough keys to cut them
            self._prefill(new, old, most_keys=4096)

    def _ints(self, *shape: int) -> torch.Tensor:
        """As engines hand them over: a slice of a longer tensor."""
        first = self._rng.randrange(4)
        return torch.zeros(first + shape[0], *shape[1:], dtype=torch.int32)[first:]

    def _decode(self, requests: int, query_len: int, tokens: int, ragged: bool = False) -> None:
        from mla_backend.steps import DecodeStep

        step = DecodeStep(
            block_table_BM=self._ints(requests, self._rng.randrange(1, 40)),
            seq_lens_B=self._ints(requests),
            query_len=query_len,
            query_start_B1=self._ints(requests + 1) if ragged else None,
        )
        self._attend_latent(tokens, step)

    def _decode_tiles(self, tiles: int, tokens_of_tile: int) -> None:
        """Two prompts, whose last tiles are seldom full."""
        from mla_backend.steps import tile_queries

        lens = [self._rng.randrange(1, 4)]
        lens.append(max(1, (tiles - 1) * tokens_of_tile - self._rng.randrange(tokens_of_tile)))
        table_BM = self._ints(2, self._rng.randrange(1, 40))
        step = tile_queries(lens, table_BM, self._ints(2), tokens_of_tile=tokens_of_tile)
        if self.spec["split_tokens"]:  # then the engine makes all queries latent, and prefill comes as decode
            self._attend_latent(sum(lens), step)
        else:
            self._extend(sum(lens), step)

    def _extend(self, tokens: int, step) -> None:
        geometry = self.geometry
        heads, nope, latent, v = (
            geometry.num_heads,
            geometry.qk_nope_head_dim,
            geometry.kv_lora_rank,
            geometry.v_head_dim,
        )
        decoded = self._rng.randrange(9)  # tokens before those of the prefill in the engine's batch
        self.attention.extend(
            torch.empty(decoded + tokens, heads, geometry.qk_head_dim, dtype=self.dtype)[decoded:],
            self.cache_AGK,
            step,
            w_k_NPL=torch.empty(heads, nope, latent, dtype=self.dtype),
            w_v_NLV=torch.empty(heads, latent, v, dtype=self.dtype),
            out_TNV=torch.empty(decoded + tokens, heads, v, dtype=self.dtype)[decoded:],
            workspace=self.scratch,
            cache_scale=self.cache_scale,
        )

    def _attend_latent(self, tokens: int, step) -> None:
        options = {"workspace": self.scratch, "cache_scale": self.cache_scale}
        self.attention.decode(*self._queries(tokens), self.cache_AGK, step, **options)

    def _queries(self, tokens: int):
        heads = self.attention.decode_problem.geometry.num_heads
        nope, latent = self.geometry.qk_nope_head_dim, self.geometry.kv_lora_rank
        if self.spec["joined"]:
            q_TNK = torch.empty(tokens, heads, self.geometry.latent_dim, dtype=self.dtype)
            return q_TNK[..., :latent], q_TNK[..., latent:]
        absorbed_NTL = torch.empty(heads, tokens, latent, dtype=self.dtype)  # a product per head
        q_TNQ = torch.empty(tokens, heads, self.geometry.qk_head_dim, dtype=self.dtype)
        return absorbed_NTL.transpose(0, 1), q_TNQ[..., nope:]

    def _prefill(self, new: list[int], old: list[int], most_keys: int = 32) -> None:
        from mla_backend.steps import PrefillStep, plan_context

        geometry, tokens = self.geometry, sum(new)
        empty = partial(torch.empty, dtype=self.dtype)
        decoded = self._rng.randrange(9)  # tokens before those of the prefill in the engine's batch
        row_TK = empty(decoded + tokens, 1536 + geometry.latent_dim)[decoded:, 1536:]  # one product with the queries'
        latent_TL, rope_TR = row_TK.split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1)
        step = PrefillStep(
            query_start_B1=self._ints(len(new) + 1),
            max_query_len=max(new),
            block_table_BM=self._ints(len(new), self._rng.randrange(1, 40)),
            chunks=plan_context(new, old, most_keys=most_keys, device=torch.device("cpu")),
            gather_buffer_SK=empty(most_keys, geometry.latent_dim),
        )
        slots = torch.zeros(decoded + tokens, dtype=torch.int64)[decoded:]
        for scale in {self.cache_scale, None}:
            self.attention.write(latent_TL.contiguous(), rope_TR, self.cache_AGK, slots, cache_scale=scale)
        self.attention.prefill(
            empty(decoded + tokens, geometry.num_heads, geometry.qk_head_dim)[decoded:],
            latent_TL,
            rope_TR,
            self.cache_AGK,
            step,
            up_project=lambda x: empty(len(x), geometry.num_heads, geometry.qk_nope_head_dim + geometry.v_head_dim),
            out_TNV=empty(decoded + tokens, geometry.num_heads, geometry.v_head_dim)[decoded:],
            cache_scale=self.cache_scale,
        )


def try_without(server: Server, forgotten: int | None) -> dict:
    """Warm up without one call, or with all, then serve."""
    start_anew()
    calls = server.warm_up()
    for i, (_, call) in enumerate(calls):
        if i != forgotten:
            call()
    compiled = len(COMPILED)
    server.serve()
    name = None if forgotten is None else calls[forgotten][0]
    return {"calls": len(calls), "compiled": compiled, "late": COMPILED[compiled:], "forgotten": name}


def main(device: str, changes: str, forget: str | None = None) -> None:
    pretend(DEVICES[device], numbers=False)
    for changed in json.loads(changes):
        server = Server(device, SPEC | changed)
        left_out = range(len(server.warm_up())) if forget else (None,)
        print(json.dumps([try_without(server, forgotten) for forgotten in left_out]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
