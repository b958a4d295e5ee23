"""Reading the data files of benchmarks, plain or packed."""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 30  # of a file, unpacked


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a file, unpacked if it ends in .gz or .xz.

    Raises:
        ValueError: a damaged archive, other bytes than the encoding's, or more than 1 GiB.
        OSError: it can't be read.
    """
    with open(path, "rb") as raw:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix)
        try:
            data = (opener(raw) if opener else raw).read(MAX_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{path} is a damaged archive ({error}); get it again") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} holds more than {MAX_BYTES} bytes; cut it into several files")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding} at byte {error.start}; convert it") from None


def read_json(path: str | Path) -> Any:
    """A JSON file, or the list of the records of a .jsonl file."""
    text = read_text(path)
    try:
        if ".jsonl" in Path(path).name:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); get it again") from None


def read_csv(path: str | Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file with a header."""
    return csv.DictReader(io.StringIO(read_text(path)))


@contextmanager
def known_form(*paths: str | Path) -> Iterator[None]:
    """Turns what a reader stumbles over in files of another form into one sentence.

    Raises:
        ValueError: the files are of another form.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{' or '.join(map(str, paths))} is not of the known form ({error!r}); get the published file"
        ) from error


def texts(*values: Any) -> None:
    """Raises `TypeError` unless all are text; for use within `known_form`."""
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r:.50} where text belongs")


def fields(path: str | Path, record: Any, *names: str) -> list[Any]:
    """The values of a record's fields.

    Raises:
        ValueError: the record lacks one of them.
    """
    missing = [name for name in names if not isinstance(record, dict) or name not in record]
    if missing:
        there = ", ".join(map(str, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(
            f"{path} has a record without {missing[0]!r} (it has: {there}); give a file of the known format"
        )
    return [record[name] for name in names]
