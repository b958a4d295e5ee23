"""Reading the data files of benchmarks, plain or packed."""

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a file, unpacked if it ends in .gz or .xz.

    Raises:
        ValueError: a damaged archive, or other bytes than the encoding's.
        OSError: it can't be read.
    """
    data = Path(path).read_bytes()
    try:
        if Path(path).suffix == ".gz":
            data = gzip.decompress(data)
        elif Path(path).suffix == ".xz":
            data = lzma.decompress(data)
        return data.decode(encoding)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is a damaged archive ({error}); get it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding} at byte {error.start}; convert it") from None


def read_json(path: str | Path) -> Any:
    """A JSON file, or the list of the records of a .jsonl file."""
    text = read_text(path)
    try:
        if ".jsonl" in Path(path).name:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); get it again") from None


def read_csv(path: str | Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file with a header."""
    return csv.DictReader(io.StringIO(read_text(path)))


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
