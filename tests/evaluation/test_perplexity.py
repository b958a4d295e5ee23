"""Perplexity by position: the same tokens at every multiple, and losses that are known."""

import math

import pytest
import torch

from mosaics.data import open_corpus, prepare
from mosaics.evaluation import Perplexity, evaluate

from .conftest import stdlib_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    for name in ("heapq", "textwrap", "bisect"):
        (folder / f"{name}.txt").write_text(stdlib_text(name))
    return folder


def by_length(result):
    return {row["times"]: row for row in result["summary"]["tables"]["loss by context"]}


def test_perplexity_of_a_constant_model_is_the_same_at_every_length(known, text):
    result = evaluate(Perplexity(data=str(text), samples=2), known(lambda ids: 2.0))
    rows = by_length(result)
    assert list(rows) == [1, 2, 4, 8] and [row["context"] for row in rows.values()] == [32, 64, 128, 256]
    for row in rows.values():
        assert row["nats per token"] == pytest.approx(2) and row["perplexity"] == pytest.approx(math.e**2)
    # Bits per byte by hand: 256 tokens of 2 nats for each of two stretches, over their bytes.
    total_bytes = sum(e["meta"]["text_bytes"] for e in result["examples"] if e["meta"]["multiple"] == 8)
    assert rows[8]["bits per byte"] == pytest.approx(2 * 256 * 2 / math.log(2) / total_bytes)


def test_perplexity_of_a_model_that_learns_from_its_context_falls_with_the_length(known, text):
    # The loss at position t is 1/t: the mean over a window of n is the harmonic number H(n) / n.
    result = evaluate(Perplexity(data=str(text), samples=2), known(lambda ids: 1 / len(ids)))
    for times, row in by_length(result).items():
        n = 32 * times
        assert row["nats per token"] == pytest.approx(sum(1 / t for t in range(1, n + 1)) / n, abs=1e-5)
    curve = result["summary"]["plot"]["curves"][-1]["y"]
    assert curve == sorted(curve, reverse=True) and len(curve) == 5


def test_perplexity_asks_for_every_token_of_the_stretch_at_every_multiple(known, text):
    model = known(lambda ids: 0.0)
    seen = []
    model.token_nats = lambda rows, old=model.token_nats: seen.append([t for r in rows for t in r[1:]]) or old(rows)
    evaluate(Perplexity(data=str(text), samples=1), model)
    assert len(seen) == 4 and all(one == seen[0] for one in seen) and len(seen[0]) == 256


def test_perplexity_equals_the_model_on_plain_rows(scorer, text):
    suite = Perplexity(data=str(text), samples=1, multiples=(1, 2))
    [one, two] = suite.examples(scorer)
    records = suite.answer(scorer, [one, two])
    row = torch.tensor([[scorer.start_id, *two.prompt]])
    loss = scorer.model(row, labels=row).loss.item()
    assert records[1].score == pytest.approx(loss, abs=1e-5)


def test_perplexity_takes_further_stretches_when_documents_are_few(known, text):
    examples = Perplexity(data=str(text), samples=5, multiples=(8,)).examples(known(lambda ids: 0.0))
    assert len({tuple(example.prompt) for example in examples}) == 5
    assert len({example.meta["document"] for example in examples}) == 3


def test_perplexity_of_a_prepared_folder_equals_that_of_its_text(scorer, tokenizer, text, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepare(open_corpus(str(text)), tmp_path / "data", tokenizer=str(tmp_path / "tokenizer"), validation=0.0)
    suites = [Perplexity(data=str(data), samples=3, split="train") for data in (text, tmp_path / "data")]
    texts, prepared = ({tuple(e.prompt) for e in suite.examples(scorer)} for suite in suites)
    assert texts == prepared


def test_perplexity_refuses_documents_that_are_too_short(known, text):
    with pytest.raises(ValueError, match="no document of .* has 80000 tokens .the longest has"):
        evaluate(Perplexity(data=str(text), training_length=10000), known(lambda ids: 0.0))
    with pytest.raises(ValueError, match="does not divide"):
        evaluate(Perplexity(data=str(text), multiples=(2, 3)), known(lambda ids: 0.0))
    with pytest.raises(ValueError, match="give --training-length"):
        evaluate(Perplexity(data=str(text)), known(lambda ids: 0.0, training_length=None))
