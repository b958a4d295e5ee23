"""A library of documents that a model read once: any of them are one memory for a question."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from mosaics.library.choosing import BoundedStore
from mosaics.library.folder import Entry, LibraryFolder, Written, check_name, write_documents
from mosaics.library.reading import by_place, read_document, sha256_of
from mosaics.memories import Context, Read
from mosaics.memories.contract import Store
from mosaics.models import MosaicForCausalLM
from mosaics.models.memory_file import fingerprint
from mosaics.models.united import check_united, united_cache
from mosaics.pools import end_with_parent

Reader = tuple[MosaicForCausalLM, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Passage:
    """Of a document: its number there, the tokens and the characters from `begin` to before `end`, and the text."""

    number: int
    tokens: tuple[int, int]
    begin: int
    end: int
    text: str


@dataclass(frozen=True)
class Added:
    """What became of a document: `"read"`, `"changed"` (read again) or `"there"` (with the same text)."""

    name: str
    how: str
    entry: Entry


class Library:
    """Documents that a model read once, in a folder.

    Args:
        folder: of a library, see `Library.at`.
        model: that read them, at evaluation; None: to look and to remove alone.
        tokenizer: the model's.

    Raises:
        ValueError: it is no library, is damaged, or another model's.
        OSError: it can't be read.
    """

    def __init__(
        self,
        folder: str | Path,
        model: MosaicForCausalLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.folder, self._model, self._tokenizer = LibraryFolder(folder), model, tokenizer
        self._stores: dict[tuple[str, str], dict[str, Any]] = {}  # by the digests of their tensors, and parts
        if model is not None:
            check_united(model)
            about = _about(model, tokenizer)
            for what in ("model", "tokenizer"):
                if about[what] != self.folder.about.get(what):
                    raise ValueError(
                        f"{folder} was read by another {what}; use that one, or add the documents to a new library"
                    )

    @classmethod
    def at(
        cls,
        folder: str | Path,
        model: MosaicForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        source: str | None = None,
    ) -> Library:
        """The library of a folder, made if there is none; pairs are kept in the dtype of `config.state_dtype`.

        Args:
            folder: missing, empty, or a library's.
            model: at evaluation.
            tokenizer: the model's.
            source: where the model can be found again, kept in a new library.

        Raises:
            ValueError: as the class, or the model's memories can't be united.
        """
        check_united(model)
        if not (Path(folder) / "manifest.json").is_file():
            about = _about(model, tokenizer) | {"source": source, "state_dtype": model.config.state_dtype}
            LibraryFolder.create(folder, about)
        return cls(folder, model, tokenizer)

    @property
    def model(self) -> MosaicForCausalLM:
        """The model that read the documents.

        Raises:
            ValueError: the library was opened without.
        """
        if self._model is None:
            raise ValueError("the library was opened without a model; open it with the one that read it")
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise ValueError("the library was opened without a tokenizer; open it with that of the model")
        return self._tokenizer

    @property
    def documents(self) -> dict[str, Entry]:
        """What is known of each document, by name, in the order in which they are read."""
        return {name: self.folder.entries[name] for name in self.folder.names()}

    def add(
        self,
        texts: Mapping[str, str],
        processes: int = 1,
        open_reader: Callable[[], Reader] | None = None,
        told: Callable[[str, int], None] | None = None,
    ) -> Iterator[Added]:
        """Read documents, and keep each as soon as it was read: what was given back stays, whatever happens.

        Those that are there with the same text are not read again, and those with another text are replaced.

        Args:
            texts: by the documents' names.
            processes: that read at once.
            open_reader: gives the model and the tokenizer in another process; needed for several.
            told: called with a document's name and the number of tokens that were read of it, by one process.

        Raises:
            ValueError: a name or a text can't be a document's, another process writes, or the library keeps its pairs
                in another dtype than the model.
            OSError: something can't be written; what was given back stays.
        """
        for name, text in texts.items():
            check_name(name)
            _check_text(name, text)
        kept = self.folder.about.get("state_dtype")
        if self.model.config.state_dtype != kept:
            how = f"in {kept}" if kept else "as they are computed"
            raise ValueError(f"{self.folder.path} keeps its pairs {how}; open the model with the state_dtype {kept}")
        with self.folder.writing():
            there = {
                name: entry
                for name, entry in self.folder.entries.items()
                if name in texts and entry.sha256 == sha256_of(texts[name])
            }
            yield from (Added(name, "there", entry) for name, entry in there.items())
            wanted = {name: text for name, text in texts.items() if name not in there}
            for name, written in self._written(wanted, processes, open_reader, told):
                how = "changed" if name in self.folder.entries else "read"
                self.folder.put({name: written})
                yield Added(name, how, self.folder.entries[name])

    def remove(self, *names: str) -> None:
        """Remove documents: nothing of them is left in the folder, and what is read then is as if they never were.

        Raises:
            ValueError: one is not there, or another process writes.
            OSError: the folder can't be written.
        """
        with self.folder.writing():
            self.folder.remove(names)
        self._stores.clear()

    def compact(self) -> None:
        """Put all documents into few files; raises as `remove`."""
        with self.folder.writing():
            self.folder.compact()

    def verify(self) -> dict[str, str]:
        """What is wrong with which document or file; empty: every bit is as it was written."""
        wrong = self.folder.verify()
        for name in self.documents.keys() - wrong.keys():
            if sha256_of(self.text(name)) != self.folder.entries[name].sha256:
                wrong[name] = f"the text of {name!r} is not the one that was read"
        return wrong

    def text(self, name: str) -> str:
        """The text of a document; raises `ValueError` if it is not there or damaged."""
        return _text(self.folder.read(name, "text"))

    def passages(self, name: str) -> list[Passage]:
        """The passages of a document, sentences and lines; raises as `text`."""
        return _passages(self.folder.read(name, "text"))

    def pairs(self, name: str) -> int:
        """How many pairs of a document each memory keeps: one a token."""
        self.folder.names([name])
        return self.folder.entries[name].tokens

    def memory(
        self,
        names: Iterable[str] | None = None,
        cache: Cache | None = None,
        within: float | None = None,
        fetched: Callable[[str], None] | None = None,
    ) -> Cache:
        """Documents as one memory, from which a question goes on.

        All their pairs can be read at once by every token; nothing depends on the order of the names.

        Args:
            names: of the documents; None: all.
            cache: an empty one to fill, dynamic or static; None: a new dynamic one.
            within: how far what a memory reads at a position may be off, as a share of the length of its longest value:
                each read takes those documents alone that sketches of their keys can't rule out, and only these are
                fetched from the folder, when they are first wanted. All count in the bandwidth. None, 0: not at all.
            fetched: called with the name of a document whenever it is read by a memory that could have left it out.

        Returns:
            A cache that has seen no token: give it to `model.generate` with the question alone.

        Raises:
            ValueError: a document is not there, or damaged; `within` is no number from 0 to below 1.
        """
        if not within:
            return self._united(names, "pairs", cache)
        if not 0 < within < 1:
            raise ValueError(f"within is {within}; give a number from 0 to below 1")
        documents = [self._bounded(name, within, fetched) for name in self.folder.names(names)]
        return united_cache(self.model, documents, cache)

    def choose(self, input_ids: Tensor, top: int, names: Iterable[str] | None = None) -> list[str]:
        """The documents that a question reads most, as far as their summaries tell: groups of pairs as one pair each,
        the centre of their keys and values, with the weight of all.

        Args:
            input_ids: `(1, time)`, the question.
            top: how many.
            names: of which documents; None: of all.

        Returns:
            Their names, those with the largest share of the weights first.

        Raises:
            ValueError: `top` is below 1, a document is not there, or damaged.
        """
        if top < 1:
            raise ValueError(f"top is {top}; choose 1 document at least")
        ordered = self.folder.names(names)
        if len(ordered) <= top:
            return ordered
        shares = Shares([len(next(iter(self._of(name, "summary").values())).sizes) for name in ordered])
        with torch.inference_mode():
            context = Context(reads=shares)
            self.model(input_ids, past_key_values=self._united(ordered, "summary"), use_cache=True, context=context)
        mean = shares.mean().mean(0)
        return [ordered[i] for i in mean.argsort(descending=True, stable=True)[:top].tolist()]

    def _united(self, names: Iterable[str] | None, part: str, cache: Cache | None = None) -> Cache:
        return united_cache(self.model, [self._of(name, part) for name in self.folder.names(names)], cache)

    def _bounded(self, name: str, within: float, fetched: Callable[[str], None] | None) -> dict[str, BoundedStore]:
        def fetch(place: str) -> Store:
            if fetched is not None:
                fetched(name)
            return self._of(name, "pairs")[place]

        sketches = self._of(name, "sketch")
        return {place: BoundedStore.of(sketch, within, partial(fetch, place)) for place, sketch in sketches.items()}

    def _of(self, name: str, part: str) -> dict[str, Any]:
        """What was kept of a document, by place: the stores of its pairs, or of groups of them, or its sketches."""
        self.folder.names([name])
        key = (self.folder.entries[name].digests[part], part)
        if key not in self._stores:
            found = self.folder.read(name, part)
            with _sound(name):
                places = by_place(found, self.model.device)
                for tensors in places.values():
                    slots = len(tensors["sizes"]) if "sizes" in tensors else self.folder.entries[name].tokens
                    own = {n: 1 if n == "radius" else slots for n in tensors.keys() - {"sizes"}}
                    if part == "sketch" and tensors.keys() != {"data", "scale", "radius"}:
                        raise ValueError("sketch")
                    if any(tensors[n].dim() != 4 or tensors[n].shape[2] != count for n, count in own.items()):
                        raise ValueError("slots")
                stores = places if part == "sketch" else {at: Store(**tensors) for at, tensors in places.items()}
                self._stores[key] = stores
        return self._stores[key]

    def _written(
        self,
        texts: Mapping[str, str],
        processes: int,
        open_reader: Callable[[], Reader] | None,
        told: Callable[[str, int], None] | None,
    ) -> Iterator[tuple[str, Written]]:
        """Each document read, in a file."""
        if processes < 1:
            raise ValueError(f"processes is {processes}; it must be at least 1")
        if processes == 1 or len(texts) < 2:
            for name, text in texts.items():
                tell = None if told is None else lambda count, name=name: told(name, count)
                yield name, _read_and_write(self.model, self.tokenizer, self.folder.path, name, text, tell)
            return
        if open_reader is None:
            raise ValueError("several processes need to open the model themselves; give open_reader")
        threads = max(1, torch.get_num_threads() // processes)
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, spawned, _begin, (open_reader, self.folder.path, threads)) as pool:
            try:
                yield from zip(texts, pool.map(_read_here, texts.keys(), texts.values()), strict=True)
            except BrokenProcessPool:
                raise OSError("a process that was reading ended; run the same command again to go on") from None
            finally:
                pool.shutdown(cancel_futures=True)


class Shares(list):
    """A sink for what memories read of stores: shares of the weight by groups of slots, averaged over memories and
    heads.

    Args:
        sizes: the slots of each group, in their order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self._group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        self._count, self._passes = len(sizes), []
        self._memories: set[tuple[int, str]] = set()

    def append(self, read: Read) -> None:
        """Count a read of a store `(1, heads, time, slots)`; others are left out."""
        if not read.from_store:
            return
        place = (read.layer_index, read.memory)
        weights = read.weights[0].mean(0).cpu().double()
        found = weights.new_zeros(weights.shape[0], self._count).index_add_(1, self._group, weights)
        if not self._memories or place == self._first:
            self._first = place
            self._passes.append(torch.zeros_like(found))
        self._memories.add(place)
        self._passes[-1] += found

    def mean(self) -> Tensor:
        """`(time, groups)`, of all passes one after the other; what a row lacks of 1 is the share of the context."""
        if not self._passes:
            return torch.zeros(0, self._count, dtype=torch.float64)
        return torch.cat(self._passes) / len(self._memories)


def _about(model: MosaicForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What tells the readers of libraries apart."""
    if tokenizer is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError("a library needs a fast tokenizer with an end-of-text token; use a model that has one")
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    known |= {"padding": None, "truncation": None}  # what the last call asked for
    words = json.dumps([known, tokenizer.eos_token_id], sort_keys=True)
    return {"model": fingerprint(model), "tokenizer": hashlib.sha256(words.encode()).hexdigest()}


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} has characters that are no text (lone surrogates); convert it first") from None
    if not text:
        raise ValueError(f"{name!r} is empty; give a text")


def _read_and_write(
    model: MosaicForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    text: str,
    told: Callable[[int], None] | None = None,
) -> Written:
    try:
        document = read_document(model, tokenizer, text, told)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return write_documents(folder, [document])


_here: dict[str, Any] = {}  # of a process that reads


def _begin(open_reader: Callable[[], Reader], folder: Path, threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    _here.update(reader=open_reader(), folder=folder)


def _read_here(name: str, text: str) -> Written:
    return _read_and_write(*_here["reader"], _here["folder"], name, text)


def _text(tensors: Mapping[str, Tensor]) -> str:
    with _sound():
        return tensors["text"].numpy().tobytes().decode()


def _passages(tensors: Mapping[str, Tensor]) -> list[Passage]:
    with _sound():
        text, offsets = _text(tensors), tensors["offsets"].tolist()
        borders = [*tensors["passages"].tolist(), len(offsets)]
        if borders[0] != 0 or any(a >= b for a, b in zip(borders, borders[1:], strict=False)):
            raise ValueError("passages")
        found = []
        for number, (first, end) in enumerate(zip(borders, borders[1:], strict=False)):
            characters = offsets[first][0], max(last for _, last in offsets[first:end])
            found.append(Passage(number, (first, end), *characters, text[slice(*characters)]))
        return found


@contextmanager
def _sound(name: str | None = None) -> Iterator[None]:
    """Turns what tensors that were made up would raise into one sentence."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = "a document" if name is None else repr(name)
        raise ValueError(f"{what} of the library is no such thing ({type(error).__name__}); add it again") from None
