"""Texts and a task that show what a cache format costs a model that has learnt something.

Text is the source of Python's standard library, which is on every machine. Whether a file is for training or held out
depends on its name alone, so a model trained with one Python can be measured with another.

Notes are the copy-from-far-back task: `<note> key value`, in random tokens, stands somewhere in a text; its end repeats
`<note> key`, and the value is to follow. Other notes stand between, so it does not help to know where a note is.
"""

import hashlib
import pathlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MARKER = "<note>"  # a special token of models that know the task
KEY, VALUE = 2, 4  # tokens
NOTE = 1 + KEY + VALUE
HELD_OUT = 16  # one file in so many


def texts(*, held_out: bool) -> Iterator[str]:
    """Files of the standard library, those held out or the others, in the order of their names."""
    for path in sorted(_folder().rglob("*.py")):
        name = path.relative_to(_folder())
        if name.parts[0] not in ("site-packages", "dist-packages") and _is_held_out(name) == held_out:
            yield text_of(name)


def text_of(name: str | pathlib.PurePath) -> str:
    """One file of the standard library."""
    return (_folder() / name).read_text(encoding="utf-8", errors="ignore")


def _folder() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _is_held_out(name: pathlib.PurePath) -> bool:
    return hashlib.sha256(name.as_posix().encode()).digest()[0] % HELD_OUT == 0


def pieces(stream: list[int], length: int, count: int) -> list[list[int]]:
    """`count` parts of `length` tokens, evenly spread from the stream's begin to its end.

    They overlap where the stream is shorter than all of them. Raises ValueError where it is shorter than one.
    """
    if len(stream) < length:
        raise ValueError(f"texts of {length} tokens need so many of the standard library, got {len(stream)}")
    apart = (len(stream) - length) // max(1, count - 1)
    return [stream[i * apart : i * apart + length] for i in range(count)]


@dataclass(frozen=True)
class Recall:
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Notes:
    """The task in a model's tokens.

    marker: the token of MARKER.   words: tokens that keys and values are drawn from.
    """

    marker: int
    words: Sequence[int]

    def _draw(self, rng: random.Random) -> list[int]:
        return [self.marker, *rng.choices(self.words, k=KEY + VALUE)]

    def recall(self, text: list[int], distance: int, rng: random.Random, *, others: int = 4) -> Recall:
        """`text`, with notes written over some of it, that ends with the question for a note `distance` tokens before.

        others: notes beside that one.
        Raises ValueError where the text is too short.
        """
        question = len(text) - 1 - KEY
        first = question - distance
        places = [*range(first - NOTE, -1, -NOTE), *range(first + NOTE, question - NOTE + 1, NOTE)]
        if first < 0 or len(places) < others:
            raise ValueError(
                f"a note {distance} tokens back and {others} others need {distance + KEY + 1 + others * NOTE} tokens "
                f"of text, got {len(text)}"
            )
        asked, prompt = self._draw(rng), list(text)
        for place in rng.sample(places, others):
            prompt[place : place + NOTE] = self._draw(rng)
        prompt[first : first + NOTE] = asked
        prompt[question:] = asked[: 1 + KEY]
        return Recall(prompt, asked[1 + KEY :])

    def plant(self, text: list[int], count: int, rng: random.Random) -> list[int]:
        """`text` to train on: `count` notes over some of it, each in two places."""
        planted, shift = list(text), rng.randrange(NOTE)
        places = rng.sample(range(shift, len(text) - NOTE + 1, NOTE), 2 * count)
        for two in zip(places[::2], places[1::2], strict=True):
            note = self._draw(rng)
            for place in two:
                planted[place : place + NOTE] = note
        return planted
