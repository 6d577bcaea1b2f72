"""Many requests of mixed lengths on one engine, some with a prefix that others had, some going away: what is left of
memory and pages at the end, and whether answers are those of the same requests alone."""

import random
from dataclasses import dataclass

import torch


@dataclass
class Request:
    """prompt: token ids.  max_tokens: of the answer.  leaves_at: new tokens after which its client goes away, or
    None."""

    prompt: list[int]
    max_tokens: int
    leaves_at: int | None


def make_requests(count: int, *, longest: int, answer: int, seed: int = 0) -> list[Request]:
    """Half of them begin as others do, by some length of one of eight texts; each tenth goes away amid its answer.

    longest: tokens of a prompt.  answer: of an answer.
    """
    rng = random.Random(seed)

    def text(length: int) -> list[int]:
        return [rng.randrange(3, 500) for _ in range(length)]

    def request(number: int) -> Request:
        # Many short ones and few long ones, as in a real queue.
        length = max(1, int(longest * rng.random() ** 3))
        shared = rng.choice(texts)[: rng.randrange(length)] if rng.random() < 0.5 else []
        tokens = rng.randint(2, answer)
        leaves_at = rng.randrange(1, tokens) if number % 10 == 9 else None
        return Request(shared + text(length - len(shared)), tokens, leaves_at)

    texts = [text(longest) for _ in range(8)]
    return [request(number) for number in range(count)]


def soak(engine, count: int, longest: int, answer: int, at_once: int, alone: int) -> dict:
    """Keep `at_once` requests in the engine until `count` have been there; then ask `alone` of them again, one by one.

    Returns answers and those that the same requests had alone, by number; pages that did not come back; for a GPU the
    bytes that PyTorch held after a fifth of the requests and at the end, both with nothing in the engine.
    """
    requests = make_requests(count, longest=longest, answer=answer)
    free, scratch = engine.free_pages(), engine.scratch_addresses()
    warm_up = count // 5
    answers = _serve(engine, dict(enumerate(requests[:warm_up])), at_once)
    held = [_held()]
    answers |= _serve(engine, dict(enumerate(requests[warm_up:], warm_up)), at_once)
    held.append(_held())
    engine.llm.reset_prefix_cache()
    leaked = free - engine.free_pages()
    again = sorted(answers)[:: max(1, len(answers) // alone)]
    by_itself = {number: _serve(engine, {number: requests[number]}, 1)[number] for number in again}
    return {
        "left": count - len(answers),
        "answers": {number: answers[number] for number in again},
        "alone": by_itself,
        "leaked": leaked,
        "held": held,
        "moved": engine.scratch_addresses() != scratch,
    }


def _serve(engine, requests: dict[int, Request], at_once: int) -> dict[int, dict]:
    """Answers to those that did not go away."""
    waiting, running, answers = list(requests), set(), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number = waiting.pop(0)
            engine.add(str(number), requests[number].prompt, requests[number].max_tokens)
            running.add(number)
        for name, answer in engine.step().items():
            number, wanted = int(name), requests[int(name)]
            tokens = len(answer["tokens"])
            if number in running and wanted.leaves_at is not None and tokens >= wanted.leaves_at:
                engine.abort([name])
                running.discard(number)
            elif number in running and tokens == wanted.max_tokens:
                answers[number] = answer
                running.discard(number)
    return answers


def _held() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
