"""`bench quality`: its tasks, its numbers with a real engine beside transformers', and its command."""

import random
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from mla_backend.bench import quality, quality_tasks
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.quality import Experiment, Tasks
from mla_backend.bench.quality_tasks import KEY, NOTE, Notes, Recall
from mla_backend.cli import application

MARKER = 3
NOTES = Notes(MARKER, range(4, 100))
EXPERIMENT = Experiment(lengths=(96, 300), texts=2, recalls=3, new_tokens=6, dtype="float32")


def places_of(tokens: list[int], wanted: list[int]) -> list[int]:
    return [i for i in range(len(tokens)) if tokens[i : i + len(wanted)] == wanted]


@pytest.mark.parametrize("distance", [40, 64, 490])
def test_a_note_stands_where_it_is_said_to(distance):
    text = [200 + i for i in range(500)]
    recall = NOTES.recall(text, distance, random.Random(1))
    question = recall.prompt[-1 - KEY :]
    assert places_of(recall.prompt, question) == [497 - distance, 497]
    assert recall.prompt[500 - distance : 500 - distance + len(recall.answer)] == recall.answer
    assert recall.prompt.count(MARKER) == 1 + 4 + 1, "four other notes"
    untouched = sum(a == b for a, b in zip(text, recall.prompt, strict=True))
    assert untouched == 500 - 5 * NOTE - (1 + KEY)


def test_a_text_that_is_too_short_for_a_note():
    with pytest.raises(ValueError, match="a note 64 tokens back and 4 others need 95 tokens of text, got 60"):
        NOTES.recall([0] * 60, 64, random.Random(0))
    with pytest.raises(ValueError, match="texts of 10 tokens need so many of the standard library, got 9"):
        quality_tasks.pieces([0] * 9, 10, 3)


@pytest.mark.parametrize(
    ("tokens", "starts"), [(10, [0, 0, 0]), (20, [0, 5, 10]), (29, [0, 9, 18]), (30, [0, 10, 20]), (51, [0, 20, 40])]
)
def test_texts_overlap_only_where_there_is_too_little(tokens, starts):
    assert quality_tasks.pieces(list(range(tokens)), 10, 3) == [list(range(i, i + 10)) for i in starts]
    assert quality_tasks.pieces(list(range(tokens)), 10, 1) == [list(range(10))]


def test_notes_to_train_on_come_twice():
    planted = NOTES.plant([200] * 300, 5, random.Random(0))
    found = [planted[i : i + NOTE] for i in range(300) if planted[i] == MARKER]
    assert len(found) == 10
    assert all(found.count(note) == 2 for note in found)


def test_no_file_is_in_both_parts():
    seen, held_out = (list(quality_tasks.texts(held_out=held)) for held in (False, True))
    assert len(seen) > 8 * len(held_out) > 0
    assert not {text for text in held_out if len(text) > 2000} & set(seen)


class Finder:
    """Plays an engine that finds notes, and writes tokens of one kind elsewhere."""

    def generate(self, prompts, sampling, use_tqdm):
        return [self._answer(one["prompt_token_ids"], sampling) for one in prompts]

    def _answer(self, prompt, sampling):
        first = places_of(prompt, prompt[-1 - KEY :])[0]
        tokens = (prompt[first + 1 + KEY :] if prompt[-1 - KEY] == MARKER else [7] * 9)[: sampling.max_tokens]
        scores = [None, *({token: SimpleNamespace(logprob=-0.5)} for token in prompt[1:])]
        outputs = [SimpleNamespace(token_ids=tokens)]
        return SimpleNamespace(outputs=outputs, prompt_logprobs=scores, prompt_token_ids=prompt)


def test_shares_of_found_notes():
    pytest.importorskip("vllm")
    recalls = [NOTES.recall([200] * 200, 100, random.Random(i)) for i in range(3)]
    wrong = Recall(recalls[0].prompt, [0, *recalls[0].answer[1:]])
    tasks = Tasks([[200] * 30], [*recalls, wrong])
    outcome = quality._outcome(Finder(), tasks, EXPERIMENT)
    assert outcome.needle == 0.75
    assert outcome.continuations == [[7] * 6]
    assert outcome.perplexity == pytest.approx(1.64872, abs=1e-4)
    assert quality._outcome(Finder(), Tasks([[200] * 30], []), EXPERIMENT).needle is None


def test_agreement_ends_at_the_first_other_token():
    assert quality.agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 0.75


@torch.inference_mode()
def perplexity_by_transformers(folder, texts: list[list[int]]) -> float:
    from transformers_oracle import load

    model = load(folder, torch.float32)
    tokens = torch.tensor(texts)
    logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


def test_a_real_engine(checkpoints, monkeypatch):
    """Perplexity is transformers', and a cache that rounds changes it."""
    pytest.importorskip("vllm")
    from transformers import AutoTokenizer

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    folder = checkpoints()
    tasks = quality.make_tasks(AutoTokenizer.from_pretrained(folder), EXPERIMENT)
    rows = quality.run(str(folder), ["bf16", "fp8"], EXPERIMENT)
    assert [(row["format"], row["tokens"]) for row in rows] == [(f, n) for f in ("bf16", "fp8") for n in (96, 300)]
    for row in rows[:2]:
        expected = perplexity_by_transformers(folder, tasks[row["tokens"]].texts)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-3)
        assert (row["agreement"], row["needle"]) == (1, None)
    assert rows[2]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-3), "one chunk reads no cache"
    assert abs(rows[3]["perplexity"] / rows[1]["perplexity"] - 1) > 1e-3
    assert rows[3]["agreement"] < 1


def test_an_engine_that_does_not_start(tmp_path):
    pytest.importorskip("vllm")
    with pytest.raises(BenchmarkError, match="bf16: "):
        quality.run(str(tmp_path / "nothing"), ["bf16"], EXPERIMENT)


def run(*arguments: str, fails=False) -> str:
    done = CliRunner().invoke(application(), arguments, env={"COLUMNS": "200"})
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def test_command(monkeypatch, tmp_path):
    rows = [
        {"format": "bf16", "tokens": 512, "perplexity": 5.1234, "agreement": 1.0, "needle": 0.9375},
        {"format": "fp8", "tokens": 512, "perplexity": 5.2, "agreement": 0.875, "needle": None},
    ]
    asked = []
    monkeypatch.setattr(quality, "run", lambda *what: asked.append(what) or rows)
    csv = tmp_path / "quality.csv"
    shown = run("bench", "quality", "m", "--lengths", "512", "--csv", str(csv))
    assert asked == [("m", ["bf16", "fp8"], Experiment(lengths=(512,)))]
    assert all(cell in shown for cell in ("5.1234", "93.8%", "87.5%", "-"))
    assert csv.read_text() == (
        "format,tokens,perplexity,agreement,needle\nbf16,512,5.1234,1.0,0.9375\nfp8,512,5.2,0.875,\n"
    )
    assert "unknown format e5m2; choose from bf16, fp8, fp8_ds_mla" in run(
        "bench", "quality", "m", "--formats", "bf16,e5m2", fails=True
    )
