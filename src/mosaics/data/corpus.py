"""Corpora: documents in a fixed order, read one at a time, as often as wanted."""

import glob
import gzip
import json
import lzma
import os
import re
import shutil
import stat
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mosaics.data.document import Corpus, Document
from mosaics.data.worlds.documents import WORLD, open_world

STANDARD_LIBRARY = "python-stdlib"
REFERENCE = "python-reference"
STANDARD_INPUT = {"-": "stdin.txt", "-.jsonl": "stdin.jsonl"}
# Tests, tables and build settings: no text that one would read, and twice the size of all the rest.
_NOT_LIBRARY_TEXT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
}
_RECORDS = {".jsonl", ".ndjson"}
_TEXT = {".txt", ".md"} | _RECORDS
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
MAX_DOCUMENT_BYTES = 1 << 30


def join_corpora(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus after the other; a document's name begins with that of its corpus.

    Raises:
        ValueError: two have the same name.
    """
    if len(corpora) == 1:
        return corpora[0]
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the corpus {twice!r} is given twice; give it once")

    def documents() -> Iterator[Document]:
        for corpus in corpora:
            for document in corpus:
                yield Document(f"{corpus.name}/{document.id}", document.text)

    return Corpus(", ".join(names), documents)


def open_corpus(
    spec: str | os.PathLike = STANDARD_LIBRARY,
    *,
    field: str = "text",
    encoding: str = "utf-8",
    split: str = "train",
) -> Corpus:
    """Opens a corpus by name.

    Args:
        spec: one of

            - `python-stdlib`: the Python sources of the running interpreter's standard library, a file a
              document, without tests, codec tables and build settings;
            - `python-reference`: what Python's `help()` says of the language, a topic a document: English prose, every
              paragraph a line;
            - a file, a folder (its `.txt`, `.md` and `.jsonl` files) or a glob pattern (`**` for any depth):
              a text file is one document, a line of a `.jsonl` file is one document; `.gz` and `.xz` are
              unpacked while reading; the order is that of the sorted names;
            - a Hugging Face dataset, `owner/name` or `owner/name:configuration`; `hf:` in front forces this
              reading, for names without an owner and for local dataset folders;
            - `world:NAME`, episodes of a synthetic world: see `mosaics.data.worlds.open_world`;
            - `-`: standard input, one document; `-.jsonl`: a record a line. It is copied to a temporary file.
        field: the field of a `.jsonl` record or the column of a dataset that holds the text.
        encoding: how the bytes of files are read; a byte-order mark at the start is dropped.
        split: the split of a Hugging Face dataset.

    Returns:
        The corpus. Reading it raises `ValueError` for undecodable bytes (with file and offset), damaged
        archives, records without the field, files that change meanwhile, documents beyond 1 GiB.

    Raises:
        FileNotFoundError: no such file, or no file matches.
        ValueError: an unknown encoding, a dataset that can't be loaded, a column that it does not have.
    """
    spec = os.fspath(spec)
    try:
        "".encode(encoding)
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; use a name that Python knows, such as utf-8") from None
    if spec == STANDARD_LIBRARY:
        library = _standard_library()
        return Corpus(spec, lambda: _read_files(library, field, "utf-8"))
    if spec == REFERENCE:
        return Corpus(spec, _reference)
    if spec.startswith(WORLD):
        return open_world(spec)
    if spec.startswith("hf:"):
        return _open_dataset(spec, spec[3:], field, split)
    if spec in STANDARD_INPUT:
        return _open_standard_input(spec, field, encoding)
    path = Path(spec).expanduser()
    if not spec.strip():
        raise ValueError(f"the corpus has an empty name; give a file, a folder, a pattern or {STANDARD_LIBRARY!r}")
    if path.is_dir():
        files = _named(path, (file for file in path.rglob("*") if _kind(file) in _TEXT))
        wanted = "no .txt, .md or .jsonl file (.gz, .xz)"
    elif path.exists():
        if not path.is_file():
            raise ValueError(f"{spec} is not a regular file; copy its text to a file first")
        files = _named(path.parent, [path])
    elif glob.has_magic(spec):
        files = _named(_fixed_part(path), (Path(name) for name in glob.iglob(str(path), recursive=True)))
        wanted = "no file"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", spec) and _kind(path) not in _TEXT | set(_OPENERS):
        return _open_dataset(spec, spec, field, split)
    else:
        raise FileNotFoundError(
            f"no file, folder or pattern {spec!r}; give one that exists, {STANDARD_LIBRARY!r} or hf:DATASET"
        )
    if not files:
        raise FileNotFoundError(f"{wanted} in {spec!r}; give another folder or pattern")
    return Corpus(spec, lambda: _read_files(files, field, encoding))


def _reference() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        text = re.sub(r"^[*=~^-]{3,}\n", "\n", text, flags=re.M)  # lines under headings
        yield Document(name, re.sub(r"(?<=\S)\n(?=[^\s*-])", " ", text))


def _open_standard_input(spec: str, field: str, encoding: str) -> Corpus:
    """It can be read once, a corpus again and again."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError(f"the corpus {spec} is standard input, and nothing is piped into it; name a file")
    folder = tempfile.TemporaryDirectory(prefix="mosaics-")
    path = Path(folder.name, STANDARD_INPUT[spec])
    with path.open("wb") as stream:
        shutil.copyfileobj(sys.stdin.buffer, stream)

    def documents() -> Iterator[Document]:
        assert folder  # it goes when the corpus goes
        return _read_files([(path.name, path)], field, encoding)

    return Corpus(spec, documents)


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _NOT_LIBRARY_TEXT]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    if not found:
        raise FileNotFoundError(f"this Python has no library sources in {root}; name a corpus of your own")
    return _named(root, found)


def _named(root: Path, files) -> list[tuple[str, Path]]:
    """(name relative to the root, file), sorted; what is no regular file (a pipe would block) is left out."""
    return sorted((Path(os.path.relpath(file, root)).as_posix(), file) for file in files if file.is_file())


def _fixed_part(pattern: Path) -> Path:
    parts = list(pattern.parts)
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]) if first else Path(".")


def _kind(path: Path) -> str:
    """The suffix without that of the compression."""
    return Path(path.stem).suffix or path.suffix if path.suffix in _OPENERS else path.suffix


def _read_files(files: list[tuple[str, Path]], field: str, encoding: str) -> Iterator[Document]:
    for name, path in files:
        with _reading(path) as stream:
            if _kind(path) in _RECORDS:
                yield from _read_records(name, path, stream, field, encoding)
            else:
                data = stream.read(MAX_DOCUMENT_BYTES + 1)
                yield Document(name, _decode(data, path, 0, encoding))


def _read_records(name: str, path: Path, stream: BinaryIO, field: str, encoding: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b""), 1):
        text = _decode(line, path, offset, encoding)
        offset += len(line)
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not a JSON record ({error}); correct or remove the line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} holds a {type(record).__name__}, not a record with fields; correct the line")
        yield Document(f"{name}:{number}", _text_of(record, field, where))


def _text_of(record: dict, field: str, where: str) -> str:
    if field not in record:
        names = ", ".join(sorted(map(str, record))[:20]) or "none"
        raise ValueError(f"{where} has no field {field!r}; its fields are: {names}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} of {where} holds a {type(text).__name__}, not text; name a text field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {field!r} of {where} has half a surrogate pair at character {error.start}, which is no "
            "text; correct or remove the record"
        ) from None
    return text


def _decode(data: bytes, path: Path, offset: int, encoding: str) -> str:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{path} has a document of more than {MAX_DOCUMENT_BYTES} bytes; cut it into several")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {encoding}: byte {offset + error.start} (0x{data[error.start]:02x}) can't be "
            "decoded; convert the file or name its encoding"
        ) from None
    return text.removeprefix("\ufeff")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The unpacked bytes of a file that must stay as it is until the end."""

    def identity(status: os.stat_result) -> tuple:
        return status.st_ino, status.st_size, status.st_mtime_ns

    # Not blocking: between listing and opening, the file may have become a pipe.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as raw:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ValueError(f"{path} is not a regular file any more; run again")
        opener = _OPENERS.get(path.suffix)
        try:
            yield opener(raw) if opener else raw
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{path} is a damaged archive ({error}); get it again") from None
        if identity(os.fstat(descriptor)) != identity(before):
            raise ValueError(f"{path} changed while it was read; run again when nothing writes to it")


def _open_dataset(spec: str, source: str, field: str, split: str) -> Corpus:
    from datasets import load_dataset

    from mosaics.data.hub import no_waiting

    name, _, configuration = (source, "", "") if os.path.exists(source) else source.partition(":")
    try:
        with no_waiting():
            dataset = load_dataset(name, configuration or None, split=split)
    except Exception as error:  # whatever the hub, the network or a data file may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{spec!r} is no file here, and no Hugging Face dataset that can be loaded ({reason}); name another"
        ) from error
    if field not in dataset.column_names:
        raise ValueError(f"{spec!r} has no column {field!r}; its columns are: {', '.join(dataset.column_names)}")

    def documents() -> Iterator[Document]:
        number = 0
        for batch in dataset.select_columns([field]).iter(batch_size=256):
            for text in batch[field]:
                where = f"{spec}, row {number} of {split!r}"
                yield Document(f"{split}:{number}", _text_of({field: text}, field, where))
                number += 1

    return Corpus(spec, documents)
