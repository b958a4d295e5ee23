"""Prepared corpora for the tests: one made by `prepare`, and folders written by hand with chosen documents."""

import numpy as np
import pytest

from mosaics.data import Corpus, Document, prepare
from mosaics.data.shards import SplitWriter, write_manifest

# ruff: noqa: RUF001
TEXTS = {
    "plain.txt": "The mosaic of memories stores keys and values, keys and values, and answers a key.\n" * 40,
    "code.py": "def read(key):\n    return memory[key]\n\n\nfor key in memory:\n    print(read(key))\n" * 30,
    "many-bytes.txt": "naïve café, 世界の記憶, שלום עולם, 🧩🧩 and 👩‍👩‍👧 — Привет.\n" * 20,
    "zero.txt": "before\0after\0" * 10,
    "short.txt": "a",
    "empty.txt": "",
    "marks.txt": "not a border: <|end_of_text|> nor <|begin_of_text|>, nor <|pad|>",
    "spaces.txt": " \t\n\r\n   \u00a0 \u3000" * 20,
} | {f"more/{number:02d}.txt": f"Document number {number} of this corpus. " * number for number in range(1, 24)}


def memory_corpus(texts: dict[str, str], name: str = "texts") -> Corpus:
    return Corpus(name, lambda: (Document(key, text) for key, text in texts.items()))


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepare(memory_corpus(TEXTS), folder, vocab_size=400, validation=0.3, seed=1)
    return folder


@pytest.fixture
def write_prepared(tmp_path_factory):
    """Writes documents of the given token counts (begin- and end-of-text included). Every token of a split has a
    number of its own, counted from 3, so that each can be followed; its bytes are its number modulo 7."""

    def write(train, validation=(), shard_tokens=50, exact=True, begin=True):
        folder = tmp_path_factory.mktemp("prepared")
        splits, total = {}, 3 + max(sum(train), sum(validation))
        for split, lengths in (("train", train), ("validation", validation)):
            writer = SplitWriter(folder / split, np.dtype("<u4"), shard_tokens)
            start = 3
            for number, length in enumerate(lengths):
                ids = np.arange(start, start + length)
                start += length
                writer.write(ids[:1])
                writer.write(ids[1:])
                writer.end_document(f"document {number}", int((ids[begin:-1] % 7).sum()))
            splits[split] = writer.close()
        if exact:
            np.save(folder / "token_bytes.npy", np.arange(total, dtype=np.int32) % 7)
        tokenizer = {"vocab_size": total, "bos_token_id": 0 if begin else None, "eos_token_id": 1, "pad_token_id": 2}
        content = {
            "settings": {},
            "tokenizer": tokenizer,
            "dtype": "uint32",
            "shard_tokens": shard_tokens,
            "text_bytes": "token" if exact else "document",
            "splits": splits,
            "report": {},
        }
        write_manifest(folder, content)
        return folder

    return write
