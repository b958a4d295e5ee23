"""`mosaics library`: documents that a model reads once, kept in a folder to be asked with `mosaics ask`."""

import glob
import sys
import time
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mosaics.cli.tables import size

EXAMPLE = "mosaics library add library 'books/*.txt' --model runs/first"


class Action(StrEnum):
    """What is to be done."""

    ADD = "add"
    LIST = "list"
    SHOW = "show"
    REMOVE = "remove"
    VERIFY = "verify"
    COMPACT = "compact"


def library(
    action: Annotated[Action, Argument(help="What to do.", metavar="add|list|show|remove|verify|compact")],
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The library's; add makes a new one.")],
    words: Annotated[
        list[str] | None,
        Argument(metavar="[FILE...|NAME...]", help="Text files to add (or quoted patterns), or names of documents."),
    ] = None,
    model: Annotated[
        str | None, Option(help="add: an exported model, a run's folder, or a hub id; by default the library's.")
    ] = None,
    state_dtype: Annotated[
        str | None, Option(help="add, to a new library: keep pairs in bfloat16 or int8; else as they are computed.")
    ] = None,
    processes: Annotated[int, Option(help="add: processes that read at once.")] = 1,
) -> None:
    """Read documents once, and keep what a model remembers of each, for `mosaics ask`.

    add reads files (UTF-8, .gz and .xz unpacked), skips those that are there and replaces those that have changed; each
    counts from the line that says so, and the same command goes on after a stop. list and show tell what is there,
    remove forgets documents without a trace, verify looks at every bit, compact puts documents together into few files.
    docs/library.md says more.
    """
    words = words or []
    if action != Action.ADD and (model is not None or state_dtype is not None or processes != 1):
        raise ValueError(f"--model, --state-dtype and --processes are for add; leave them out of {action}")
    needs = action in (Action.ADD, Action.SHOW, Action.REMOVE)
    if needs != bool(words):
        what = "files" if action == Action.ADD else "names of documents"
        raise ValueError(f"library {action} {f'needs {what}; give some' if needs else 'takes a FOLDER alone'}")
    if action == Action.ADD:
        _add(folder, _files(words), model, state_dtype, processes)
        return
    from mosaics.library import Library

    opened = Library(folder)
    if action == Action.LIST:
        _list(opened)
    elif action == Action.SHOW:
        _show(opened, words)
    elif action == Action.REMOVE:
        opened.remove(*words)
        print(f"removed {', '.join(words)}; {len(opened.documents)} documents are left")
    elif action == Action.COMPACT:
        opened.compact()
        print(f"{len(opened.documents)} documents are in {len(opened.folder.files)} files")
    elif wrong := opened.verify():
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{next(iter(wrong.values()))}{more}")
    else:
        print(f"{len(opened.documents)} documents are as they were written")


def _files(words: list[str]) -> dict[str, Path]:
    """The files by the names of their documents."""
    files: dict[str, Path] = {}
    for word in words:
        found = [word] if Path(word).exists() else sorted(glob.glob(word))
        if not found:
            raise ValueError(f"there is no file {word}")
        for path in map(Path, found):
            if path.is_dir():
                raise ValueError(f"{path} is a folder; name its files, as in '{path}/*.txt'")
            if path.name in files and not path.samefile(files[path.name]):
                raise ValueError(
                    f"{files[path.name]} and {path} have the same name, by which a library knows documents; rename one"
                )
            files[path.name] = path
    return files


def _add(folder: Path, files: dict[str, Path], model: str | None, state_dtype: str | None, processes: int) -> None:
    from rich.progress import Progress

    from mosaics.cli.generate import check_mosaic
    from mosaics.evaluation.files import read_text
    from mosaics.library import Library
    from mosaics.library.folder import LibraryFolder, check_name
    from mosaics.training.sources import open_source

    if processes < 1:
        raise ValueError(f"--processes is {processes}; it must be at least 1")
    for name in files:
        check_name(name)
    if (folder / "manifest.json").is_file():
        about = LibraryFolder(folder).about
        if state_dtype is not None and state_dtype != about["state_dtype"]:
            how = about["state_dtype"] or "as they are computed"
            raise ValueError(f"{folder} keeps its pairs {how}; leave out --state-dtype, or add to a new library")
        model, state_dtype = model or about["source"], about["state_dtype"]
    if model is None:
        raise ValueError(f"{folder} is a new library; say with --model what reads the documents")
    texts = {name: read_text(path) for name, path in files.items()}
    if empty := [str(files[name]) for name, text in texts.items() if not text]:
        raise ValueError(f"{empty[0]} is empty; give files with text")
    loaded, tokenizer = open_source(model, state_dtype)
    check_mosaic(loaded)
    source = str(Path(model).absolute()) if Path(model).exists() else model
    opened = Library.at(folder, loaded, tokenizer, source)
    begin = time.monotonic()
    there = tokens = 0
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("reading", total=len(texts))
        reader = partial(open_source, source, state_dtype)
        for added in opened.add(texts, processes, reader):
            progress.advance(bar)
            entry = added.entry
            if added.how == "there":
                there += 1
                continue
            tokens += entry.tokens
            print(f"{added.how} {added.name}: {entry.tokens:,} tokens, {size(entry.bytes)}", flush=True)
    took = time.monotonic() - begin
    print(
        f"{len(texts) - there} documents read, {tokens:,} tokens in {took:.1f} s; {there} were there; "
        f"{len(opened.documents)} in {folder}",
        file=sys.stderr,
    )


def _list(opened) -> None:
    rows = [("document", "tokens", "text", "kept", "SHA-256")]
    for name, entry in sorted(opened.documents.items()):
        rows.append((name, f"{entry.tokens:,}", size(entry.text_bytes), size(entry.bytes), entry.sha256[:12]))
    total = [
        sum(values)
        for values in zip(*((e.tokens, e.text_bytes, e.bytes) for e in opened.documents.values()), strict=True)
    ]
    if total:
        rows.append((f"{len(rows) - 1} documents", f"{total[0]:,}", size(total[1]), size(total[2]), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *rest in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        print(f"{name:<{widths[0]}}  {'  '.join(cells)}".rstrip())


def _show(opened, names: list[str]) -> None:
    for name in names:
        opened.folder.names([name])
        entry = opened.folder.entries[name]
        print(f"{name}: {entry.tokens:,} tokens, {size(entry.bytes)}, SHA-256 {entry.sha256}")
        for passage in opened.passages(name):
            first, end = passage.tokens
            print(f"  tokens {first}-{end - 1}, characters {passage.begin}-{passage.end}: {passage.text.strip()!r}")
