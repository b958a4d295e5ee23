"""What a corpus is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name that it has in its corpus (unique there, the same on every machine)."""

    id: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order. Each iteration reads them again; one is in memory at a time.

    Attributes:
        name: what the user called it.
        documents: starts one pass over the documents.
    """

    name: str
    documents: Callable[[], Iterator[Document]] = field(repr=False)

    def __iter__(self) -> Iterator[Document]:
        return self.documents()
