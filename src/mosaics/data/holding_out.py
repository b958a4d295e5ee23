"""Which documents of a corpus are held out, and which text a tokenizer is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.progress import Progress

from mosaics.data.corpus import Corpus, Document
from mosaics.data.tokenizer import split_text

TRAIN, VALIDATION = "train", "validation"
_SAMPLE_CHARACTERS = 1 << 16


@dataclass
class Plan:
    """Which document goes where. The survey is the first of the passes over the corpus."""

    corpus: Corpus
    validation: Corpus | None
    share: float
    seed: int
    documents: int = 0
    empty: int = 0
    text_bytes: int = 0
    digest: str = ""
    _last_held_out: int = -1

    def survey(self, progress: Progress) -> None:
        """Read all once: count, hash, and find out which documents are held out.

        Raises:
            ValueError: there is no text.
        """
        task = progress.add_task("reading", total=None)
        places = []
        digest = _Digest()
        for document in self._all(digest):
            self.text_bytes += digest.text_bytes
            progress.update(task, advance=digest.text_bytes)
            if not document.text:
                self.empty += 1
            elif not digest.held_out:
                places.append(self._place("split", document))
        self.documents = len(places)
        self.digest = digest.hexdigest()
        progress.update(task, total=self.text_bytes)
        if not places:
            raise ValueError(f"the corpus {self.corpus.name!r} holds no text; name one that does")
        if self.share and self.documents > 1:
            count = max(1, round(self.share * self.documents))  # at most half, so that some are left
            self._last_held_out = int(np.partition(np.asarray(places, dtype=np.uint64), count - 1)[count - 1])

    def _all(self, digest: _Digest) -> Iterator[Document]:
        for corpus, held_out in ((self.corpus, False), (self.validation or (), True)):
            for document in corpus:
                digest.add(document, held_out)
                yield document

    def _place(self, use: str, document: Document) -> int:
        """A number below 2^64 that depends on the seed and the document's name alone."""
        name = f"{self.seed}:{use}:{document.id}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")

    def assigned(self) -> Iterator[tuple[str, Document]]:
        """(split, document) for all documents that hold text, in the corpus's order."""
        digest = _Digest()
        for document in self._all(digest):
            if not document.text:
                continue
            if digest.held_out:
                yield VALIDATION, document
            elif self.share and self.documents == 1:
                yield from self._cut(document)
            else:
                held_out = self._place("split", document) <= self._last_held_out
                yield VALIDATION if held_out else TRAIN, document
        if digest.hexdigest() != self.digest:
            raise ValueError(f"the corpus {self.corpus.name!r} changed while it was read; run again")

    def _cut(self, document: Document) -> Iterator[tuple[str, Document]]:
        text = document.text
        middle = min(max(1, round(len(text) * (1 - self.share))), len(text) - 1)
        cut = text.rfind("\n", max(0, middle - 4096), middle) + 1 or middle
        if cut < 1:
            raise ValueError(f"the corpus {self.corpus.name!r} is too short to hold out a part; use validation 0")
        yield TRAIN, Document(document.id, text[:cut])
        yield VALIDATION, Document(f"{document.id} (end)", text[cut:])

    def sample(self, limit: int, progress: Progress) -> Iterator[str]:
        """The training texts, or parts of them drawn from all over the corpus, of `limit` characters at most."""
        task = progress.add_task("training the tokenizer", total=self.text_bytes)
        below = 2**64 * min(1.0, limit / self.text_bytes)
        left = limit
        for split, document in self.assigned():
            progress.update(task, advance=len(document.text.encode()))
            if split != TRAIN:
                continue
            for index, part in enumerate(split_text(document.text, _SAMPLE_CHARACTERS)):
                first = left == limit  # never nothing at all
                if left and (first or self._place(f"tokenizer {index}", document) < below):
                    yield part[:left]
                    left -= len(part[:left])
        progress.update(task, description="merging pairs")


class _Digest:
    """SHA-256 of all names and texts."""

    def __init__(self):
        self._hash = hashlib.sha256()
        self.text_bytes, self.held_out = 0, False

    def add(self, document: Document, held_out: bool) -> None:
        name, text = document.id.encode("utf-8", "surrogateescape"), document.text.encode()
        self._hash.update(f"{held_out:d} {len(name)} {len(text)} ".encode())
        self._hash.update(name)
        self._hash.update(text)
        self.text_bytes, self.held_out = len(text), held_out

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
