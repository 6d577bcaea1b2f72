"""Mistakes of kernels that benchmarks have to see before they time anything."""

import torch

from mla_backend.attention import MLAAttention


def wrong_output(out, lse, call):
    out[7, 1, 100] += 0.01


def wrong_lse(out, lse, call):
    lse[4, 0] += 0.01


def unwritten_row(out, lse, call):
    out[9] = torch.empty_like(out[9])


def wrong_second_call(out, lse, call):
    out[0, 0, 0] += call - 1


MISTAKES = (wrong_output, wrong_lse, unwritten_row, wrong_second_call)


def make_mistake(monkeypatch, method: str, mistake) -> None:
    """Have what a method of MLAAttention returns changed by `mistake(out, lse, number of the call)`."""
    right, calls = getattr(MLAAttention, method), []

    def wrong(self, *args, **kwargs):
        out, lse = right(self, *args, **kwargs)
        calls.append(1)
        mistake(out, lse, len(calls))
        return out, lse

    monkeypatch.setattr(MLAAttention, method, wrong)
