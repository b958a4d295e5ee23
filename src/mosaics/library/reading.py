"""Reading a document into what a library keeps of it."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mosaics.library.choosing import sketch_of_store
from mosaics.memories.contract import Store
from mosaics.models import MosaicForCausalLM
from mosaics.models.united import read_stores

GROUP = 8  # pairs that a summary has as one
SPREAD = 0.5  # of the distance of keys from their centre, what counts for them
LONGEST_PASSAGE = 64  # tokens
_BORDER = re.compile(r"(?<=[.!?])(?=\s)|(?<=\n)")


def sha256_of(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_document(
    model: MosaicForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    told: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read a text once, closed by the end-of-text.

    Args:
        model: at evaluation.
        tokenizer: a fast one, which knows where its tokens lie.
        text: with one token at least.
        told: called with the number of tokens of each chunk when it has been read.

    Returns:
        What is known of the document (`sha256`, `text_bytes`, `tokens`), and its tensors by part: `text` (the text's
        bytes, `input_ids`, the `offsets` `(tokens, 2)` of each token in characters, and `passages`, the tokens with
        which passages begin), `pairs` (of every memory, by its place), `summary` (the same of groups of pairs),
        `sketch` (of the keys, as a `BoundedStore` has it).

    Raises:
        ValueError: the text has no token, or characters that are no text; the tokenizer has no end-of-text or knows no
            offsets; or the model's memories can't be united.
    """
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError("a library needs a fast tokenizer with an end-of-text token; use a model that has one")
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    kept = [i for i, (begin, end) in enumerate(encoded.offset_mapping) if end > begin]
    if not kept:
        raise ValueError("the text has no token; give one that says something")
    ids = torch.tensor([[*encoded.input_ids, tokenizer.eos_token_id]])
    stores = read_stores(model, ids.to(model.device), told=told)
    offsets = torch.tensor(encoded.offset_mapping, dtype=torch.int32)
    found = {
        "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
        "input_ids": ids[0, :-1].to(torch.int32),
        "offsets": offsets,
        "passages": torch.tensor(_passages(text, offsets[:, 0].tolist()), dtype=torch.int32),
    }
    pairs, summary, sketch = {}, {}, {}
    for place, store in stores.items():
        sketched = sketch_of_store(store, model.dtype)
        for part, of in ((pairs, vars(store)), (summary, vars(_summary(store, model.dtype))), (sketch, sketched)):
            part |= {f"{place}.{name}": x for name, x in of.items() if x is not None}
    known = {"sha256": sha256_of(text), "text_bytes": len(text.encode()), "tokens": ids.shape[1] - 1}
    return known, {"text": found, "pairs": pairs, "summary": summary, "sketch": sketch}


def by_place(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The tensors of each memory, by its place, that `read_document` gave as a part."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        place, _, field = name.rpartition(".")
        found.setdefault(place, {})[field] = x.to(device)
    return found


def _passages(text: str, begins: Sequence[int]) -> list[int]:
    """The tokens with which sentences and lines begin, and further ones where these are long; `begins` says with which
    character each token does."""
    borders, found = deque(match.start() for match in _BORDER.finditer(text)), [0]
    for token, begin in enumerate(begins):
        crossed = False
        while borders and borders[0] <= begin:
            crossed = borders.popleft() > 0 or crossed
        if token and (crossed or token - found[-1] >= LONGEST_PASSAGE):
            found.append(token)
    return found


def _summary(store: Store, dtype: torch.dtype) -> Store:
    """Groups of `GROUP` pairs, which follow each other, as one pair each: the centres of their keys and values, and as
    an offset, since the weights of keys around a centre are more than its own, a part of their distance from it."""
    keys, values = (x if isinstance(x, Tensor) else x.widened() for x in store.pairs(dtype))
    slots = keys.shape[2]
    sizes = torch.full((-(-slots // GROUP),), GROUP, device=keys.device)
    sizes[-1] -= -slots % GROUP

    def mean(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -slots % GROUP)).unflatten(2, (-1, GROUP)).sum(3) / sizes[:, None]

    centres = mean(keys)
    squared = (keys - centres.repeat_interleave(sizes, dim=2)).square().sum(-1, keepdim=True)
    offsets = SPREAD * mean(squared).sqrt()
    return Store(centres.to(dtype), mean(values).to(dtype), sizes=sizes, offsets=offsets.to(dtype))
