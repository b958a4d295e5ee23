"""A library on disk: safetensors and a manifest, changed whole or not at all, verified when read.

The folder has

- ``manifest.json``: what reads the documents; of each document its name, the SHA-256 of its text, its sizes, the file
  that holds it and digests of its parts; of each file its size and SHA-256; and a digest of itself;
- ``….safetensors``: the tensors of one document, or of several after `compact`, under drawn names;
- ``.lock``: held by whoever writes.

A change writes its files, syncs them, and counts once the new manifest has taken the place of the old one. What a
writer left that was killed is removed by the next. Names, texts and sizes are in the manifest and the document's own
tensors alone, so that nothing is left of one that was removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mosaics.models.digest import digest_of

FORMAT = "mosaics-library-2"  # 1 had no sketches
MANIFEST, LOCK = "manifest.json", ".lock"
PARTS = ("text", "pairs", "summary", "sketch")  # what is read, and verified, apart
FILE_BYTES = 1 << 30
_NEW = ".new-"
_NAME = re.compile(r"[^/\\,\x00-\x1f\x7f]{1,200}")

Parts = Mapping[str, Mapping[str, Tensor]]  # the tensors of a document, by part and name


@dataclass(frozen=True)
class Entry:
    """What the manifest says of a document.

    Attributes:
        sha256: of the text in UTF-8.
        text_bytes: its length.
        tokens: without the end-of-text.
        bytes: of the document's tensors.
        file: that holds them.
        key: what their names there begin with.
        digests: of each of `PARTS`.
    """

    sha256: str
    text_bytes: int
    tokens: int
    bytes: int
    file: str
    key: str
    digests: dict[str, str]


@dataclass(frozen=True)
class Written:
    """A file that was written under a name for the time being.

    Attributes:
        path: where it lies.
        bytes: its size.
        sha256: of it.
        entries: of its documents, in their order.
    """

    path: Path
    bytes: int
    sha256: str
    entries: list[Entry]


def check_name(name: str) -> None:
    """Raises `ValueError` if a document can't have this name."""
    if name in (".", "..") or not _NAME.fullmatch(name) or name != name.strip() or not name.isprintable():
        raise ValueError(
            f"{name!r} is no name for a document; give 1 to 200 printable characters without / \\ and commas"
        )


def write_documents(folder: Path, documents: Sequence[tuple[Mapping[str, Any], Parts]]) -> Written:
    """Write a file of documents, synced, under a name that no manifest has; any process may do so.

    Args:
        folder: of the library.
        documents: of each the fields of its `Entry` that are known before, and its tensors.

    Raises:
        OSError: it can't be written; nothing of it is left.
    """
    file = f"{uuid.uuid4().hex}.safetensors"
    path, tensors, entries = folder / f"{_NEW}{file}", {}, []
    for number, (known, parts) in enumerate(documents):
        own = {f"{number}/{part}/{name}": x for part in PARTS for name, x in parts[part].items()}
        tensors |= {name: x.detach().cpu().contiguous() for name, x in own.items()}
        digests = {part: _digest(parts[part]) for part in PARTS}
        size = sum(x.nbytes for x in own.values())
        entries.append(Entry(**known, bytes=size, file=file, key=str(number), digests=digests))
    try:
        save_file(tensors, path, {"format": FORMAT})
        _sync(path)
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return Written(path, path.stat().st_size, sha256, entries)
    except SafetensorError as error:  # it hides the system's error number
        path.unlink(missing_ok=True)
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
        raise OSError(f"{folder} can't be written ({error})") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise


class LibraryFolder:
    """The documents of a library's folder, as its manifest said when it was last looked at.

    Args:
        path: of a library.

    Raises:
        ValueError: it is no library, or its manifest is damaged.
        OSError: it can't be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.about: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.refresh()

    @classmethod
    def create(cls, path: str | Path, about: Mapping[str, Any]) -> LibraryFolder:
        """A new library without documents; what `about` says of the model stays with it.

        Raises:
            ValueError: there is something else already, or another process is making it.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if any(not found.name.startswith(".") for found in path.iterdir()):
                raise ValueError(f"{path} is no library and not empty; choose another folder")
            _write_manifest(path, {"format": FORMAT, "about": dict(about), "documents": {}, "files": {}})
        _sync(path.absolute().parent)
        return cls(path)

    def refresh(self) -> None:
        """Look at the manifest again; raises as the class."""
        path = self.path / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"there is no library {self.path}; mosaics library add makes one")
        try:
            manifest = json.loads(path.read_bytes())
            found = manifest.pop("digest")
            if not str(manifest["format"]).startswith("mosaics-library-"):
                raise ValueError("format")
            if manifest["format"] != FORMAT:
                raise _Foreign
            if found != _digest_of_manifest(manifest):
                raise ValueError("digest")
            entries = {name: Entry(**entry) for name, entry in manifest["documents"].items()}
            files = {str(name): {"bytes": f["bytes"], "sha256": f["sha256"]} for name, f in manifest["files"].items()}
            for name, entry in entries.items():
                check_name(name)
                if entry.file not in files or Path(entry.file).name != entry.file or entry.digests.keys() != set(PARTS):
                    raise ValueError("files")
                if not all(type(x) is int and x >= 0 for x in (entry.text_bytes, entry.tokens, entry.bytes)):
                    raise TypeError("sizes")
            about = dict(manifest["about"])
        except _Foreign:
            raise ValueError(
                f"{self.path} is of the format {manifest['format']} of another version, and this one knows {FORMAT}; "
                "add its documents to a new library"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}); add the documents to a new library"
            ) from None
        self.about, self.entries, self.files = about, entries, files

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the writer; what another left behind is removed first.

        Raises:
            ValueError: another process writes.
        """
        with _locked(self.path):
            self.refresh()
            self._clear()
            try:
                yield
            finally:
                self._clear()

    def names(self, chosen: Iterable[str] | None = None) -> list[str]:
        """The documents in the order in which they are read, that of the SHA-256 of their texts; only those chosen.

        Raises:
            ValueError: one is not there.
        """
        names = set(self.entries if chosen is None else chosen)
        for name in sorted(names - self.entries.keys()):
            raise ValueError(f"there is no document {name!r} in {self.path}; mosaics library list shows what there is")
        return sorted(names, key=lambda name: (self.entries[name].sha256, name))

    def put(self, named: Mapping[str, Written]) -> None:
        """Take up files of one document each, by its name, in the place of what had the name before; `writing`."""
        entries, files = dict(self.entries), dict(self.files)
        for name, written in named.items():
            check_name(name)
            (entries[name],) = written.entries
            self._place(written, files)
        self._commit(entries, files)

    def remove(self, names: Iterable[str]) -> None:
        """Remove documents; nothing of them is left in any file. `writing`.

        Raises:
            ValueError: one is not there, or another that lies in the same file is damaged.
        """
        gone = set(self.names(names))
        entries = {name: entry for name, entry in self.entries.items() if name not in gone}
        files = dict(self.files)
        for file in {self.entries[name].file for name in gone}:
            if left := [name for name in self.names(entries) if entries[name].file == file]:
                self._rewrite(left, entries, files)
        self._commit(entries, files)

    def compact(self, file_bytes: int = FILE_BYTES) -> None:
        """Put documents together into files of about so many bytes at most; `writing`.

        Raises:
            ValueError: a document is damaged.
        """
        groups: list[list[str]] = []
        total = 0
        for name in self.names():
            size = self.entries[name].bytes
            if not groups or total + size > file_bytes:
                groups.append([])
                total = 0
            groups[-1].append(name)
            total += size
        entries, files = dict(self.entries), dict(self.files)
        for group in groups:
            if [name for name in self.names() if self.entries[name].file == self.entries[group[0]].file] != group:
                self._rewrite(group, entries, files)
        self._commit(entries, files)

    def read(self, name: str, part: str) -> dict[str, Tensor]:
        """The tensors of a part of a document, verified.

        Raises:
            ValueError: the file is missing or damaged, or there is no such document.
        """
        for last in (False, True):
            self.names([name])
            entry = self.entries[name]
            try:
                return self._read(name, entry, part)
            except ValueError:
                if last:
                    raise
                self.refresh()  # a writer may have moved it meanwhile
                if self.entries.get(name) == entry:
                    raise
        raise AssertionError

    def verify(self) -> dict[str, str]:
        """What is wrong with which document, or file: empty if every bit is as it was written."""
        wrong: dict[str, str] = {}
        for file, known in self.files.items():
            path = self.path / file
            if not path.is_file():
                continue  # its documents say so
            with path.open("rb") as stream:
                if path.stat().st_size != known["bytes"] or known["sha256"] != (
                    hashlib.file_digest(stream, "sha256").hexdigest()
                ):
                    held = ", ".join(name for name in self.names() if self.entries[name].file == file)
                    wrong[file] = (
                        f"{path} has changed since it was written (its SHA-256 differs); remove what it holds, and add "
                        f"it again: {held}"
                    )
        for name in self.names():
            try:
                for part in PARTS:
                    self._read(name, self.entries[name], part)
            except ValueError as error:
                wrong[name] = str(error)
        return wrong

    def _read(self, name: str, entry: Entry, part: str) -> dict[str, Tensor]:
        path, begin = self.path / entry.file, f"{entry.key}/{part}/"
        again = f"mosaics library remove {self.path} {name!r}, then add it again"
        if not path.is_file():
            raise ValueError(f"{path}, which holds {name!r}, is missing; {again}")
        try:
            with safe_open(path, "pt") as file:
                found = {key.removeprefix(begin): file.get_tensor(key) for key in file.keys() if key.startswith(begin)}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, which holds {name!r}, is damaged ({type(error).__name__}); {again}") from None
        if _digest(found) != entry.digests[part]:
            raise ValueError(
                f"{path}, which holds {name!r}, has changed since it was written (its SHA-256 differs); {again}"
            )
        return found

    def _rewrite(self, names: Sequence[str], entries: dict[str, Entry], files: dict[str, Any]) -> None:
        """Copy documents into a new file of their own."""
        own = {field: None for field in ("sha256", "text_bytes", "tokens")}
        documents = []
        for name in names:
            known = {field: getattr(self.entries[name], field) for field in own}
            documents.append((known, {part: self.read(name, part) for part in PARTS}))
        written = write_documents(self.path, documents)
        self._place(written, files)
        entries |= dict(zip(names, written.entries, strict=True))

    def _place(self, written: Written, files: dict[str, Any]) -> None:
        """Give a file the name that its entries have."""
        file = written.entries[0].file
        os.replace(written.path, self.path / file)
        files[file] = {"bytes": written.bytes, "sha256": written.sha256}

    def _commit(self, entries: dict[str, Entry], files: dict[str, Any]) -> None:
        used = {entry.file for entry in entries.values()}
        files = {file: known for file, known in files.items() if file in used}
        _sync(self.path)
        documents = {name: asdict(entry) for name, entry in entries.items()}
        _write_manifest(self.path, {"format": FORMAT, "about": self.about, "documents": documents, "files": files})
        for file in self.files.keys() - files.keys():
            (self.path / file).unlink(missing_ok=True)
        _sync(self.path)
        self.entries, self.files = entries, files

    def _clear(self) -> None:
        """Remove files that no document has."""
        for path in self.path.iterdir():
            if path.name.startswith(_NEW) or (path.suffix == ".safetensors" and path.name not in self.files):
                path.unlink(missing_ok=True)


class _Foreign(Exception):
    """Another version's."""


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    new = path / f"{_NEW}{MANIFEST}"
    try:
        with new.open("w", encoding="utf-8") as stream:
            # Characters as they are: an escape could be written in two ways, and a flipped bit of one be no change.
            json.dump(manifest | {"digest": _digest_of_manifest(manifest)}, stream, indent=1, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, path / MANIFEST)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path)


def _digest_of_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest_of("", sorted(tensors.items()))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system drops it when the process ends, however it ends."""
    with (path / LOCK).open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except BlockingIOError:
            raise ValueError(f"another process writes to {path}; wait for it and run the same command again") from None
        yield


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to where they outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
