"""One answer: its text comes in pieces that are the whole, it ends where it should."""

import pytest
import torch

from mosaics.serving.answer import Answer, Sampling

TEXT = "naïve “quotes” – 世界 🙂🙂 ends here. And then some more words, so that it is long enough to be cut.\n" * 3


def write(tokenizer, ids, end=frozenset(), **sampling):
    """The pieces of an answer whose tokens are these."""
    answer = Answer(tokenizer, end, Sampling(**{"max_tokens": len(ids), "temperature": 0.0} | sampling))
    pieces = []
    for token in ids:
        piece = answer.take(torch.nn.functional.one_hot(torch.tensor(token), len(tokenizer)).double().log())
        pieces += [piece] if piece is not None else []
        if answer.finished:
            break
    return answer, pieces


def test_answer_pieces_are_the_text_of_all_tokens(loaded):
    tokenizer = loaded[1]
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    answer, pieces = write(tokenizer, ids)
    assert "".join(piece.text for piece in pieces) == TEXT and answer.tokens == ids
    assert sum(piece.tokens for piece in pieces) == len(ids)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all("\ufffd" not in piece.text for piece in pieces) and len(pieces) > 50


def test_answer_pieces_of_any_tokens_are_their_text(loaded):
    tokenizer = loaded[1]
    for seed in range(20):  # bytes that are mostly no characters
        ids = torch.randint(3, len(tokenizer), (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert "".join(p.text for p in write(tokenizer, ids)[1]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_answer_ends_at_a_token_that_ends_answers(loaded):
    tokenizer = loaded[1]
    ids = tokenizer("some text", add_special_tokens=False).input_ids
    answer, pieces = write(tokenizer, [*ids, 7, 3], end=frozenset({5, 7}), max_tokens=99)
    assert "".join(piece.text for piece in pieces) == "some text"
    assert (pieces[-1].finish_reason, len(answer.tokens)) == ("stop", len(ids) + 1)


@pytest.mark.parametrize("stop", [("ends here",), ("🙂 e", "never"), ("re. And th", "here"), ("世",), ("n",)])
def test_answer_ends_before_a_stop_and_gives_nothing_of_it(loaded, stop):
    tokenizer = loaded[1]
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    answer, pieces = write(tokenizer, ids, stop=stop)
    expected = TEXT[: min(TEXT.find(s) for s in stop if s in TEXT)]
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish_reason == "stop" and len(answer.tokens) < len(ids)


def test_answer_gives_what_only_looked_like_a_stop(loaded):
    ids = loaded[1](TEXT, add_special_tokens=False).input_ids
    pieces = write(loaded[1], ids, stop=("ends here!", "cut.\n?"))[1]
    assert "".join(piece.text for piece in pieces) == TEXT and pieces[-1].finish_reason == "length"


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_answer_draws_as_generate_does(loaded, top_p):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer("import ").input_ids])
    torch.manual_seed(5)
    options = dict(do_sample=True, temperature=0.9, top_p=top_p, top_k=0, max_new_tokens=30)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    answer = Answer(tokenizer, frozenset(), Sampling(30, 0.9, top_p, seed=5))
    with torch.no_grad():
        while not answer.finished:
            answer.take(model(torch.cat([ids, torch.tensor([answer.tokens]).long()], dim=1)).logits[0, -1])
    assert answer.tokens == expected


def test_answer_tells_log_probabilities_before_temperature(loaded):
    tokenizer = loaded[1]
    logits = torch.randn(4, len(tokenizer), dtype=torch.float64)
    answer = Answer(tokenizer, frozenset(), Sampling(4, 0.3, 0.5, logprobs=3))
    pieces = [answer.take(row) for row in logits]
    found = [one for piece in pieces if piece for one in piece.logprobs]
    expected = logits.log_softmax(-1)
    assert [one.logprob for one in found] == pytest.approx(expected[range(4), answer.tokens].tolist(), abs=1e-5)
    for one, row in zip(found, expected, strict=True):
        assert [logprob for _, logprob in one.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)
        assert [token for token, _ in one.top] == [tokenizer.decode([i]) for i in row.topk(3).indices.tolist()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_answer_refuses_logits_that_are_not_finite(loaded, temperature, value):
    logits = torch.zeros(len(loaded[1]))
    logits[5] = value
    with pytest.raises(ValueError, match="not finite"):
        Answer(loaded[1], frozenset(), Sampling(4, temperature)).take(logits)
