"""A prepared corpus on disk: tokenised shards, an index of the documents, the tokenizer and a manifest.

    FOLDER/manifest.json                    settings, counts, size and SHA-256 of every other file, and its own
    FOLDER/tokenizer/                       as `save_pretrained` writes it
    FOLDER/token_bytes.npy                  UTF-8 bytes of each token id (byte-level tokenizers only)
    FOLDER/SPLIT/tokens-00000.bin, ...      token ids, uint16 or uint32, little-endian, document by document
    FOLDER/SPLIT/offsets.npy                int64, (documents + 1,): where each document starts in the tokens
    FOLDER/SPLIT/text_bytes.npy             int64, (documents,): UTF-8 bytes of each document's text
    FOLDER/SPLIT/ids.jsonl                  the documents' names in the corpus, a JSON string a line

A document is begin-of-text (if the tokenizer has one), the tokens of the text, end-of-text.
"""

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

FORMAT = "mosaics-prepared-corpus"
VERSION = 2  # 1 has no digest of the manifest itself, and is read too
MANIFEST = "manifest.json"


class SplitWriter:
    """Writes one split, piece by piece; what it keeps in memory is 16 bytes a document."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int):
        folder.mkdir()
        self.folder, self.dtype, self.shard_tokens = folder, np.dtype(dtype), shard_tokens
        self.tokens = self.shards = 0
        self._shard: BinaryIO | None = None
        self._offsets, self._text_bytes = array("q", [0]), array("q")
        self._ids = open(folder / "ids.jsonl", "w", encoding="utf-8")

    def write(self, ids: np.ndarray) -> None:
        """Appends token ids to the open document."""
        while len(ids):
            used = self.tokens % self.shard_tokens
            if used == 0 and self.tokens == self.shards * self.shard_tokens:
                self._close_shard()
                self._shard = open(self.folder / _shard_name(self.shards), "wb")
                self.shards += 1
            part, ids = ids[: self.shard_tokens - used], ids[self.shard_tokens - used :]
            self._shard.write(part.astype(self.dtype).tobytes())
            self.tokens += len(part)

    def end_document(self, name: str, text_bytes: int) -> None:
        self._ids.write(json.dumps(name) + "\n")
        self._offsets.append(self.tokens)
        self._text_bytes.append(text_bytes)

    def close(self) -> dict:
        """Writes the index; returns the counts for the manifest."""
        self._close_shard()
        self._ids.close()
        np.save(self.folder / "offsets.npy", np.asarray(self._offsets, dtype=np.int64))
        np.save(self.folder / "text_bytes.npy", np.asarray(self._text_bytes, dtype=np.int64))
        return {
            "documents": len(self._text_bytes),
            "tokens": self.tokens,
            "text_bytes": sum(self._text_bytes),
            "shards": self.shards,
        }

    def _close_shard(self) -> None:
        if self._shard:
            self._shard.close()


class PreparedSplit:
    """The documents of one split, memory-mapped.

    Attributes:
        offsets: int64, (documents + 1,): where each document starts among the tokens.
        text_bytes: int64, (documents,): UTF-8 bytes of each document's text.
    """

    def __init__(self, folder: Path, dtype: np.dtype, counts: dict, shard_tokens: int, vocab_size: int):
        self._folder, self._shard_tokens, self._vocab_size = folder, shard_tokens, vocab_size
        self.offsets = _load(folder / "offsets.npy")
        self.text_bytes = _load(folder / "text_bytes.npy")
        try:
            self._shards = [
                np.memmap(folder / _shard_name(index), dtype=dtype, mode="r") for index in range(counts["shards"])
            ]
        except (FileNotFoundError, ValueError):
            self._shards = []
        stored = sum(len(shard) for shard in self._shards)
        if not (
            len(self.offsets) == counts["documents"] + 1 == len(self.text_bytes) + 1
            and self.offsets[0] == 0
            and self.offsets[-1] == counts["tokens"] == stored
            and all(len(shard) == shard_tokens for shard in self._shards[:-1])
            and (self.offsets[1:] > self.offsets[:-1]).all()
            and (self.text_bytes >= 0).all()
        ):
            raise ValueError(f"the files of {folder} do not fit together; prepare the corpus again")

    def __len__(self) -> int:
        return len(self.text_bytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids from `start` to `stop` in the split's row of tokens: int64, (stop - start,)."""
        parts = []
        while start < stop:
            shard, first = divmod(start, self._shard_tokens)
            part = self._shards[shard][first : first + stop - start]
            parts.append(part)
            start += len(part)
        ids = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)
        if len(ids) and ids.max() >= self._vocab_size:
            raise ValueError(
                f"{self._folder} holds token {ids.max()}, and its tokenizer {self._vocab_size} tokens; "
                "prepare the corpus again"
            )
        return ids

    def names(self, documents: list[int]) -> list[str]:
        """The corpus's names of documents, given by number; reads the list up to the last of them."""
        wanted, found = set(documents), {}
        with open(self._folder / "ids.jsonl", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if number in wanted:
                    found[number] = json.loads(line)
                    if len(found) == len(wanted):
                        break
        return [found[number] for number in documents]


class PreparedCorpus:
    """Opens a folder that `prepare` wrote; checks that every file is there with its size.

    Attributes:
        folder: the folder.
        manifest: the manifest's content.
        vocab_size: entries of the tokenizer.
        bos_token_id: begin-of-text, or None.
        eos_token_id: end-of-text.
        pad_token_id: what fills up rows (end-of-text if the tokenizer has none of its own).
        token_bytes: int32, (vocab_size,): UTF-8 bytes of each token; None if that is not fixed.

    Raises:
        FileNotFoundError: no prepared corpus there.
        ValueError: a damaged or foreign folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"no prepared corpus in {self.folder}; make one with `mosaics prepare --out {self.folder}`"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged ({error}); prepare the corpus again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{self.folder / MANIFEST} is not that of a prepared corpus; choose another folder")
        if manifest.get("version") not in (1, VERSION):
            raise ValueError(
                f"{self.folder} has format version {manifest.get('version')!r} instead of {VERSION}; "
                "prepare the corpus again"
            )
        digest = manifest.pop("digest", None)
        if manifest["version"] != 1 and digest != _digest(manifest):
            raise ValueError(
                f"{self.folder / MANIFEST} has changed since it was written; remove {self.folder} and prepare the "
                "corpus again"
            )
        self.manifest = manifest
        try:
            self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
            begin = manifest["tokenizer"]["bos_token_id"]
            self.bos_token_id = None if begin is None else int(begin)
            self.eos_token_id = int(manifest["tokenizer"]["eos_token_id"])
            self.pad_token_id = int(manifest["tokenizer"]["pad_token_id"])
            for name, entry in manifest["files"].items():
                self._check(name, entry["bytes"])
            self._splits = {
                name: {key: int(counts[key]) for key in ("documents", "tokens", "text_bytes", "shards")}
                for name, counts in manifest["splits"].items()
            }
            self._shard_tokens = int(manifest["shard_tokens"])
            self._dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[manifest["dtype"]]
            exact = manifest["text_bytes"] == "token"
            self.token_bytes = _load(self.folder / "token_bytes.npy") if exact else None
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged ({error!r}); prepare the corpus again") from None
        special = {self.bos_token_id, self.eos_token_id, self.pad_token_id} - {None}
        known = not exact or (len(self.token_bytes) == self.vocab_size and self.token_bytes.min() >= 0)
        if self._shard_tokens < 1 or not known or not all(0 <= token < self.vocab_size for token in special):
            raise ValueError(f"the files of {self.folder} do not fit together; prepare the corpus again")

    def _check(self, name: str, size: int) -> Path:
        path = self.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise ValueError(f"{self.folder / MANIFEST} names a file outside the folder, {name!r}; don't use it")
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{path} {what}; remove {self.folder} and prepare the corpus again")
        return path

    def verify(self, split: str | None = None) -> None:
        """Compares the SHA-256 of all files, or of those of one split and what is common to all.

        Raises:
            ValueError: a file differs from what was written.
        """
        others = {name for name in self._splits if split and name != split}
        for name, entry in self.manifest["files"].items():
            if Path(name).parts[0] not in others and sha256(self.folder / name) != entry["sha256"]:
                raise ValueError(
                    f"{self.folder / name} is damaged (its SHA-256 differs from the manifest's); "
                    f"remove {self.folder} and prepare the corpus again"
                )

    def split(self, name: str) -> PreparedSplit:
        """Opens `train` or `validation`.

        Raises:
            ValueError: the folder has no such split, or it has no document.
        """
        if name not in self._splits or not self._splits[name]["documents"]:
            there = ", ".join(key for key, counts in self._splits.items() if counts["documents"])
            raise ValueError(f"{self.folder} has no documents in split {name!r}; it has: {there}")
        return PreparedSplit(self.folder / name, self._dtype, self._splits[name], self._shard_tokens, self.vocab_size)

    def tokenizer(self):
        """The tokenizer that the corpus was prepared with."""
        from mosaics.data.tokenizer import load_tokenizer

        return load_tokenizer(self.folder / "tokenizer")


def write_manifest(folder: Path, content: dict) -> None:
    """Writes the manifest over all files in the folder; everything is on disk when it returns."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path, sync=True)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "version": VERSION, **content, "files": files}
    with open(folder / MANIFEST, "w", encoding="utf-8") as stream:
        json.dump(manifest | {"digest": _digest(manifest)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path, sync: bool = False) -> str:
    with open(path, "rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load(path: Path) -> np.ndarray:
    """A list of whole numbers."""
    try:
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception:  # numpy reads the header as Python source, and stumbles over it in any way
        numbers = None
    if numbers is None or numbers.ndim != 1 or numbers.dtype.kind != "i" or not len(numbers):
        raise ValueError(f"{path} is damaged; remove the folder and prepare the corpus again")
    return numbers


def _shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"
