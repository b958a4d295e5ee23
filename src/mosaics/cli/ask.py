"""`mosaics ask`: ask the documents of a library, and see what the answer was read from."""

import json as json_format
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

EXAMPLE = 'mosaics ask library "What is a heap?" --documents heapq.txt,bisect.txt'


def ask(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="A library that `mosaics library add` made.")],
    question: Annotated[str, Argument(metavar="QUESTION", help="The text to go on from; - reads standard input.")],
    documents: Annotated[
        str | None, Option(metavar="NAME,NAME", help="Which documents to ask; all if not given.")
    ] = None,
    top: Annotated[int | None, Option(help="Read only so many of them, those that seem to matter most.")] = None,
    within: Annotated[
        float | None,
        Option(metavar="EPSILON", help="Read no document that can be proved to change what is read by less than this."),
    ] = None,
    model: Annotated[str | None, Option(help="The model that read them, if it lies elsewhere now.")] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens with this much probability.")] = 0.95,
    seed: Annotated[int, Option(help="Seed of the draws.")] = 0,
    max_question: Annotated[int, Option(help="Tokens that a question may have.")] = 8192,
    cite: Annotated[bool, Option(help="Say which documents and passages the answer was read from.")] = True,
    passages: Annotated[int, Option(help="Passages that are cited at most.")] = 3,
    without: Annotated[int, Option(help="Ask again without each of so many documents, to see what that loses.")] = 3,
    json: Annotated[bool, Option("--json", help="Print all as JSON, with what each token was read from.")] = False,
) -> None:
    """Ask the documents of a library, all at once, and print the answer and what it was read from.

    The question reads what the model remembers of each document and continues none of them; `generate --memory` does
    that. docs/library.md puts the two beside each other.
    """
    from mosaics.cli.generate import check_mosaic, check_sampling

    check_sampling(max_new_tokens, temperature, top_p, seed)
    for option, value, least in (("--max-question", max_question, 1), ("--passages", passages, 0), ("--top", top, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option} is {value}; it must be at least {least}")
    if within is not None and not 0 <= within < 1:
        raise ValueError(f"--within is {within}; it must be from 0 to below 1")
    if top is not None and within is not None:
        raise ValueError("--top and --within both choose documents; leave one out")
    if without < 0:
        raise ValueError(f"--without is {without}; it must be 0 or more")
    from mosaics.library import Library
    from mosaics.library import ask as answered
    from mosaics.library.folder import LibraryFolder
    from mosaics.serving.answer import Sampling
    from mosaics.training.sources import open_source

    question = sys.stdin.read() if question == "-" else question
    known = LibraryFolder(folder)
    names = None if documents is None else [name.strip() for name in documents.split(",")]
    known.names(names)
    source = model or known.about.get("source")
    if source is None:
        raise ValueError(f"{folder} does not say where its model is; name it with --model")
    try:
        loaded, tokenizer = open_source(source, known.about.get("state_dtype"))
    except (ValueError, OSError) as error:
        if model is not None:
            raise
        raise ValueError(f"{error}; if the model of {folder} lies elsewhere now, name it with --model") from None
    check_mosaic(loaded)
    library = Library(folder, loaded, tokenizer)
    begin = time.monotonic()
    found = answered(
        library,
        question,
        names,
        top,
        within,
        Sampling(max_new_tokens, temperature, top_p, seed),
        cite=cite,
        passages=passages,
        without=without,
        longest=max_question,
        told=None if json else lambda piece: print(piece, end="", flush=True),
    )
    if json:
        print(json_format.dumps(asdict(found), indent=1, ensure_ascii=False))
        return
    print()
    if cite:
        _cite(found)
    asked = f"{len(found.read)} of {len(known.names(names))}" if within else len(found.read)
    print(f"asked {asked} documents in {time.monotonic() - begin:.2f} s", file=sys.stderr)


def _cite(found) -> None:
    """Print what an answer was read from."""
    print()
    for one in found.documents[:5]:
        loss = "" if one.loss is None else f"; without it the forecast of the answer loses {one.loss:.3f} nats"
        print(f"{one.share:6.1%} of the weight from {one.document}{loss}")
    for passage in found.passages:
        text = " ".join(passage.text.split())
        shown = text if len(text) <= 200 else f"{text[:200]} ..."
        print(f"  {passage.share:6.1%} {passage.document}, characters {passage.begin}-{passage.end}: {shown}")
