"""The texts of the comparisons, in three files by people, packages or stories that are apart: train, tuning and test.

    python benchmarks/texts.py novels SOURCE texts/novels
    python benchmarks/texts.py stories SOURCE texts/stories
    python benchmarks/texts.py python texts/python

SOURCE of the novels is a clone of github.com/computationalstylistics/100_english_novels (commit 143e601; its folder
`corpus` has a file for each novel, named author_title_year), or a .jsonl (.xz) of records with `file` and `text`. Those
of after 1929 are left out. SOURCE of the stories is `tinystories.txt` (.gz) of github.com/Arnoochka/
Transformer-Parallelism (commit 911b9e7): TinyStories in lower case, a line break between stories, an empty line between
paragraphs. Ten stories in a row are a document, since one is shorter than 512 tokens. The Python source is that of the
standard library of the Python that runs this.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

LAST_YEAR = 1929
STORIES = 10  # to a document
SHARES = {"tuning": 0.08, "test": 0.2}  # of the groups


def novels(source: Path) -> Iterator[dict[str, str]]:
    """Records of the novels in order of their file names; the year is the end of a file's name."""
    if source.is_dir():
        for path in sorted((source / "corpus").glob("*.txt")):
            if int(path.stem.split("_")[-1]) > LAST_YEAR:
                continue
            text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
            yield {"file": path.name, "text": text}
        return
    opened = lzma.open(source, "rt", encoding="utf-8") if source.suffix == ".xz" else source.open(encoding="utf-8")
    with opened as lines:
        yield from map(json.loads, lines)


def stories(source: Path) -> Iterator[dict[str, str]]:
    """Records of stories in a row; only paragraphs have an empty line between them."""
    opened = gzip.open(source, "rt", encoding="utf-8") if source.suffix == ".gz" else source.open(encoding="utf-8")
    with opened as file:
        found = [story.strip() for story in re.split(r"(?<!\n)\n(?!\n)", file.read())]
    for i in range(0, len(found), STORIES):
        yield {"file": f"{i // STORIES:04d}", "text": "\n".join(found[i : i + STORIES])}


def python_source() -> Iterator[dict[str, str]]:
    """Records of the modules of the standard library."""
    from mosaics.data import open_corpus

    for document in open_corpus("python-stdlib"):
        yield {"file": document.id, "text": document.text}


def group_of(name: str, kind: str) -> str:
    """The author of a novel, stories in a row, or the top-level package or module of a source file."""
    return name.replace("\\", "/").split("/")[0].removesuffix(".py") if kind == "python" else name.split("_")[0]


def split(records: Iterable[dict[str, str]], kind: str) -> dict[str, list[dict[str, str]]]:
    """Records by part: whole groups, in the order of the SHA-256 of their names: tuning, then test, then train."""
    found = list(records)
    groups = sorted(
        {group_of(record["file"], kind) for record in found}, key=lambda g: hashlib.sha256(g.encode()).hexdigest()
    )
    tuning = round(SHARES["tuning"] * len(groups))
    test = tuning + round(SHARES["test"] * len(groups))
    part = {g: "tuning" if i < tuning else "test" if i < test else "train" for i, g in enumerate(groups)}
    parts: dict[str, list[dict[str, str]]] = {"train": [], "tuning": [], "test": []}
    for record in found:
        parts[part[group_of(record["file"], kind)]].append(record)
    return parts


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["novels", "stories", "python"])
    parser.add_argument("source", type=Path, nargs="?", help="of novels or stories")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    if given.kind != "python" and (given.source is None or not given.source.exists()):
        parser.error(f"there are no {given.kind} at {given.source}; the head of this file says where they come from")
    read = {"novels": novels, "stories": stories}
    records = python_source() if given.kind == "python" else read[given.kind](given.source)
    given.output.mkdir(parents=True, exist_ok=True)
    for name, members in split(records, given.kind).items():
        path = given.output / f"{name}.jsonl"
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in members)
        path.write_text(text, encoding="utf-8")
        groups = sorted({group_of(r["file"], given.kind) for r in members})
        digest = hashlib.sha256(text.encode()).hexdigest()
        size = sum(len(r["text"]) for r in members)
        print(f"{path}: {len(members)} documents, {size:,} characters, SHA-256 {digest}, of {', '.join(groups)[:300]}")


if __name__ == "__main__":
    main()
