"""Asking a library: the answer is that of `generate`, and what is cited is what was read."""

import pytest
import torch

from helpers import relative_error
from mosaics.library import ask
from mosaics.memories import Context
from mosaics.serving.answer import Sampling

from .conftest import TEXTS

QUESTION = "What is a heap, and who swims?"
A, B, C = TEXTS


def forecast(library, names, ids, said):
    """Log-probabilities of an answer, and the weights of every read of a store where its tokens were forecast."""
    context = Context(reads=[])
    with torch.no_grad():
        logits = library.model(
            torch.cat([ids, said[:, :-1]], dim=1), past_key_values=library.memory(names), context=context
        ).logits[0, ids.shape[1] - 1 :]
    first = ids.shape[1] - 1
    reads = [read.weights[0, :, first:] for read in context.reads if read.from_store]
    return logits.log_softmax(-1).gather(1, said.T)[:, 0], reads


@pytest.mark.parametrize("names", [None, [C], [C, A]])
def test_ask_answers_and_cites_what_was_read(made, names):
    library = made()
    found = ask(library, QUESTION, names, sampling=Sampling(40, temperature=0.0), passages=4, without=2)
    ids = library.tokenizer(QUESTION, return_tensors="pt").input_ids
    written = library.model.generate(ids, past_key_values=library.memory(names), max_new_tokens=40, do_sample=False)[
        :, ids.shape[1] :
    ]
    said = written[:, : len(found.tokens)]
    assert found.text == library.tokenizer.decode(written[0], skip_special_tokens=True)
    assert len(found.tokens) in (written.shape[1], written.shape[1] - 1)  # all but the end
    assert len(found.tokens) > (33 if names is None else 9)  # several pieces

    logs, reads = forecast(library, names, ids, said)
    own = torch.tensor([token.log_probability for token in found.tokens], dtype=torch.float64)
    assert relative_error(own, logs) < 1e-9
    ordered = library.folder.names(names)
    assert found.read == ordered
    per_slot = torch.stack([read.mean(0) for read in reads]).mean(0)  # (tokens, slots)
    begin, exact, passages = 0, {}, {}
    for name in ordered:
        own = per_slot[:, begin : begin + library.pairs(name)]
        exact[name], begin = own.sum(1), begin + library.pairs(name)
        for passage in library.passages(name):
            passages[name, passage.begin] = own[:, slice(*passage.tokens)].sum(1)
    for document in found.documents:
        assert document.share == pytest.approx(exact[document.document].mean().item(), rel=1e-9)
    for i, token in enumerate(found.tokens):
        assert token.documents == pytest.approx({name: exact[name][i].item() for name in ordered}, rel=1e-9)
    best = sorted(passages, key=lambda place: -passages[place].mean().item())[:4]
    assert [(p.document, p.begin) for p in found.passages] == best
    for passage in found.passages:
        assert passage.text == TEXTS[passage.document][passage.begin : passage.end]
        assert passage.share == pytest.approx(passages[passage.document, passage.begin].mean().item(), rel=1e-9)
    for i, token in enumerate(found.tokens):
        top = max(passages, key=lambda place: passages[place][i].item())
        assert token.passage == (best.index(top) if top in best else None)

    losses = {document.document: document.loss for document in found.documents}
    asked = [name for name in losses if losses[name] is not None]
    assert asked == [document.document for document in found.documents][: min(2, len(ordered))]
    for name in asked:
        without, _ = forecast(library, [other for other in ordered if other != name], ids, said)
        assert losses[name] == pytest.approx((logs.sum() - without.sum()).item(), rel=1e-7, abs=1e-9)


def test_ask_reads_only_the_chosen_documents(made):
    library = made()
    ids = library.tokenizer(QUESTION, return_tensors="pt").input_ids
    found = ask(library, QUESTION, top=2, sampling=Sampling(3, temperature=0.0))
    assert set(found.read) == set(library.choose(ids, 2)) and len(found.read) == 2
    assert found.tokens == ask(library, QUESTION, found.read, sampling=Sampling(3, temperature=0.0)).tokens


def test_ask_within_a_tolerance_cites_what_was_read(made, monkeypatch):
    library, how = made(), Sampling(3, temperature=0.0)
    first, out, last = library.documents
    assert ask(library, QUESTION, within=0.0, sampling=how) == ask(library, QUESTION, sampling=how)
    monkeypatch.setattr("mosaics.library.choosing.needed", lambda shares, _: [0, shares.shape[1] - 1])
    found = ask(library, QUESTION, within=0.1, sampling=how, without=3, passages=99)
    assert found.read == [first, last] and found.documents[-1].document == out
    assert found.documents[-1].share == 0 < found.documents[-2].share
    assert len(found.passages) == sum(len(library.passages(name)) for name in TEXTS)
    assert all((p.share > 0) == (p.document != out) for p in found.passages)


def test_ask_draws_by_its_seed_and_tells_pieces(made):
    library, pieces = made(), []
    found = [
        ask(library, QUESTION, sampling=Sampling(12, temperature=2.0, seed=seed), cite=False, told=pieces.append).text
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2] and "".join(pieces) == "".join(found)
    assert ask(library, QUESTION, sampling=Sampling(2), cite=False).documents == []


def test_ask_refuses(made, reader):
    library = made()
    for words, said in (
        (dict(question=" "), "question is empty"),
        (dict(question=QUESTION, longest=3), "may have 3"),
        (dict(question=QUESTION, documents=["x"]), "there is no document"),
        (dict(question=QUESTION, documents=[]), "no documents"),
        (dict(question=QUESTION, top=0), "top is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            ask(library, **words)
