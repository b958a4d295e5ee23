"""Corpora of a strange size: one endless line, and documents with nothing in them."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np


def endless_line(folder: Path, megabytes: int) -> str | None:
    """A text of one line, half of it without a space, is prepared whole; what went wrong, if anything did."""
    from mosaics.data import PreparedCorpus, prepare

    words = "".join(f"{number} of the many " for number in range(1000)).encode()
    letters = b"abcdefghijklmnopqrstuvwxyz0123456789" * 30
    half, path = megabytes * 500_000, folder / "line.txt"
    with open(path, "wb") as stream:
        for part in (words, letters):
            for _ in range(half // len(part)):
                stream.write(part)
    report = prepare(_corpus(path), folder / "data", vocab_size=400, validation=0)
    size = path.stat().st_size
    path.unlink()
    split = PreparedCorpus(folder / "data").split("train")
    table = PreparedCorpus(folder / "data").token_bytes
    counted = sum(
        int(table[split.read(start, min(start + (1 << 20), split.offsets[-1]))].sum())
        for start in range(0, int(split.offsets[-1]), 1 << 20)
    )
    shutil.rmtree(folder / "data")
    if report.splits["train"].text_bytes != size or counted != size:
        return f"of {size} bytes in one line {counted} are in the tokens"
    return None


def empty_documents(folder: Path, count: int) -> str | None:
    """Empty documents are counted and left out, whether or not a text is among them; what went wrong, if anything."""
    from mosaics.data import prepare

    path = folder / "empty.jsonl"
    with open(path, "w") as stream:
        stream.writelines('{"text": ""}\n' for _ in range(count))
    try:
        prepare(_corpus(path), folder / "data", vocab_size=300)
        return "a corpus without text was prepared"
    except ValueError as error:
        if "holds no text" not in str(error):
            return str(error)
    with open(path, "a") as stream:
        stream.write(json.dumps({"text": "the only text " * 20}) + "\n")
    report = prepare(_corpus(path), folder / "data", vocab_size=300, validation=0)
    shutil.rmtree(folder / "data")
    path.unlink()
    if (report.empty_documents, report.splits["train"].documents) != (count, 1):
        return f"{report.empty_documents} of {count} empty documents were counted"
    return None


def _corpus(path: Path):
    from mosaics.data import open_corpus

    return open_corpus(path)


def peak_megabytes() -> int:
    """Most memory that this process has held."""
    return int(np.ceil(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
