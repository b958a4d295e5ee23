"""Asking a library: the answer, and the documents and passages that its words were read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mosaics.library.library import Library, Shares
from mosaics.memories import Context
from mosaics.models.memory_file import read_context
from mosaics.serving.answer import Answer, Sampling

PIECE = 32  # positions whose weights on all pairs are held at once
LONGEST = 8192  # tokens of a question


@dataclass(frozen=True)
class CitedPassage:
    """A passage that was read.

    Attributes:
        document: its name.
        begin: its first character.
        end: the character behind its last.
        text: what it says.
        share: of the weight, averaged over the tokens of the answer, memories and heads.
    """

    document: str
    begin: int
    end: int
    text: str
    share: float


@dataclass(frozen=True)
class CitedDocument:
    """A document that was read.

    Attributes:
        document: its name.
        share: of the weight, as that of a passage.
        loss: nats by which the forecast of the whole answer gets worse when the library is asked without the document;
            None: it was not asked.
    """

    document: str
    share: float
    loss: float | None = None


@dataclass(frozen=True)
class CitedToken:
    """A token of the answer.

    Attributes:
        text: of the token alone.
        log_probability: its natural logarithm, whatever the temperature.
        documents: the share of the weight of each document, the largest first.
        passage: the number in `Answered.passages` of the one with the largest share; None where it is not listed.
    """

    text: str
    log_probability: float
    documents: dict[str, float]
    passage: int | None


@dataclass(frozen=True)
class Answered:
    """An answer and where it is from. What the shares lack of 1 is the question's and the answer's own.

    Attributes:
        question: as it was asked.
        text: the answer.
        read: the names of the documents that were read for the answer, in their order.
        documents: those with a share, the largest first.
        passages: the ones with the largest shares, the largest first.
        tokens: of the answer.
    """

    question: str
    text: str
    read: list[str]
    documents: list[CitedDocument]
    passages: list[CitedPassage]
    tokens: list[CitedToken]


def ask(
    library: Library,
    question: str,
    documents: Iterable[str] | None = None,
    top: int | None = None,
    within: float | None = None,
    sampling: Sampling | None = None,
    cite: bool = True,
    passages: int = 5,
    without: int = 3,
    longest: int = LONGEST,
    told: Callable[[str], None] | None = None,
) -> Answered:
    """Ask documents of a library, all of them at once.

    Args:
        library: opened with its model.
        question: a text that the answer goes on from.
        documents: names; None: all.
        top: only so many of them are read, those that `Library.choose` finds; None: all.
        within: how far what is read may be off, see `Library.memory`: documents that can't matter more are not read.
        sampling: how the answer is drawn; None: 128 of the likeliest tokens.
        cite: whether to say what the answer was read from, which takes another pass over it.
        passages: how many are cited at most.
        without: of how many documents, those with the largest shares, the loss is measured: a pass for each.
        longest: tokens of the question at most.
        told: called with each piece of the answer as soon as it is certain.

    Returns:
        The answer.

    Raises:
        ValueError: the question is empty or too long, or a document is not there or damaged.
    """
    model, tokenizer = library.model, library.tokenizer
    ids = torch.tensor([tokenizer(question, verbose=False).input_ids], dtype=torch.long, device=model.device)
    if not question.strip() or not ids.shape[1]:
        raise ValueError("the question is empty; ask something")
    if ids.shape[1] > longest:
        raise ValueError(f"the question has {ids.shape[1]} tokens and may have {longest}; ask a shorter one")
    names = library.folder.names(documents)
    if not names:
        raise ValueError("the library has no documents; mosaics library add puts some in")
    if top is not None:
        names = library.folder.names(library.choose(ids, top, names))
    ending = model.generation_config.eos_token_id
    end = frozenset(ending if isinstance(ending, list) else [] if ending is None else [ending])
    end |= {tokenizer.eos_token_id}
    read, memory = set(), partial(library.memory, within=within)
    answer = Answer(tokenizer, end, sampling or Sampling(128, temperature=0.0))
    text = ""
    with torch.inference_mode():
        cache, unread = memory(names, fetched=read.add), ids
        while not answer.finished:
            *before, last = unread.split(PIECE * 128, dim=1)
            for piece in before:
                read_context(model, piece, cache=cache)
            logits = model(last, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            piece = answer.take(logits.cpu())
            if piece is not None:
                text += piece.text
                if told is not None and piece.text:
                    told(piece.text)
            unread = ids.new_tensor([answer.tokens[-1:]])
        del cache
        said = ids.new_tensor([answer.tokens[:-1] if answer.tokens[-1] in end else answer.tokens])
        if not cite or not said.shape[1]:
            found = [], [], []
        else:
            found = _cited(library, memory, names, ids, said, passages, without)
    return Answered(question, text, [name for name in names if name in read] if within else names, *found)


def _cited(
    library: Library,
    memory: Callable[[list[str]], Cache],
    names: list[str],
    ids: Tensor,
    said: Tensor,
    most: int,
    without: int,
) -> tuple[list[CitedDocument], list[CitedPassage], list[CitedToken]]:
    known = {name: library.passages(name) for name in names}
    listed = [(name, passage) for name, found in known.items() for passage in found]
    shares = Shares([end - first for first, end in (passage.tokens for _, passage in listed)])
    forecast = _forecast(library, memory(names), ids, said, shares)
    by_token = shares.mean()  # (tokens of the answer, passages)
    owner = torch.tensor([names.index(name) for name, _ in listed])
    of_documents = by_token.new_zeros(len(by_token), len(names)).index_add_(1, owner, by_token)
    best = by_token.mean(0).argsort(descending=True, stable=True)[:most].tolist()
    order = of_documents.mean(0).argsort(descending=True, stable=True).tolist()
    losses = {}
    for i in order[:without]:
        left = [name for name in names if name != names[i]]
        losses[i] = (forecast.sum() - _forecast(library, memory(left), ids, said).sum()).item()
    tokens = []
    for row, (token, log) in enumerate(zip(said[0].tolist(), forecast.tolist(), strict=True)):
        top, largest = int(by_token[row].argmax()), of_documents[row].argsort(descending=True, stable=True).tolist()
        shared = {names[i]: of_documents[row, i].item() for i in largest}
        tokens.append(
            CitedToken(library.tokenizer.decode([token]), log, shared, best.index(top) if top in best else None)
        )
    mean, each = of_documents.mean(0).tolist(), by_token.mean(0).tolist()
    return (
        [CitedDocument(names[i], mean[i], losses.get(i)) for i in order],
        [CitedPassage(listed[i][0], listed[i][1].begin, listed[i][1].end, listed[i][1].text, each[i]) for i in best],
        tokens,
    )


def _forecast(library: Library, cache: Cache, ids: Tensor, said: Tensor, reads: Shares | None = None) -> Tensor:
    """Log-probabilities `(tokens,)` of an answer `said` `(1, tokens)` after a question, from a memory that was asked
    nothing yet; `reads` takes what was read where each of its tokens was forecast."""
    found = []
    if ids.shape[1] > 1:
        read_context(library.model, ids[:, :-1], cache=cache)
    before = torch.cat([ids[:, -1:], said[:, :-1]], dim=1)
    for piece, tokens in zip(before.split(PIECE, dim=1), said.split(PIECE, dim=1), strict=True):
        logits = library.model(piece, past_key_values=cache, use_cache=True, context=Context(reads=reads)).logits
        wide = logits[0].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append(wide.gather(1, tokens.T)[:, 0].cpu())
    return torch.cat(found)
