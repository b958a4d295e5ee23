"""`mosaics chat`: a conversation in a terminal."""

import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mosaics.cli.generate import check_mosaic, check_sampling

EXAMPLE = "mosaics chat runs/first --memory textwrap.memory"
HELP = "/reset begins again, /save FILE keeps what was said as a memory, /quit ends; Ctrl-C stops an answer"


def chat(
    model: Annotated[str, Argument(metavar="MODEL", help="An exported model, a run's folder, a hub id, or demo.")],
    max_new_tokens: Annotated[int, Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, Option(help="0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens with this much probability.")] = 0.95,
    seed: Annotated[int, Option(help="Seed of the draws; the n-th answer takes the n-th from here.")] = 0,
    memory: Annotated[
        Path | None, Option(metavar="FILE", help="What comes first: a memory kept by /save or generate --save-memory.")
    ] = None,
    library: Annotated[
        Path | None, Option(metavar="FOLDER", help="A library of the model: all is asked of its documents.")
    ] = None,
    state_dtype: Annotated[
        str | None,
        Option(help="How the pairs of the context are kept: bfloat16 or int8; else as they are computed."),
    ] = None,
) -> None:
    """Talk with a model, line by line; what was said stays in its memory and is not read again.

    In a conversation: /reset begins again, /save FILE keeps what was said as a memory for --memory, /quit ends. Ctrl-C
    stops an answer. The tokenizer's chat template is used if there is one. Lines may come through a pipe.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    if memory is not None and library is not None:
        raise ValueError("--memory and --library both give what comes before the conversation; leave one out")
    from mosaics.serving.answer import Sampling
    from mosaics.serving.conversation import Conversation
    from mosaics.training.sources import open_source

    loaded, tokenizer = open_source(model, state_dtype)
    begin = None
    if memory is not None or library is not None:
        check_mosaic(loaded)
    if library is not None:
        from mosaics.library import Library

        begin = Library(library, loaded, tokenizer).memory
    conversation, terminal = Conversation(loaded, tokenizer, memory, begin), _Terminal()
    if not tokenizer.chat_template:
        _say("the model has no chat template: what you write is text that it goes on from")
    if sys.stdin.isatty():
        _say(HELP)
    with terminal:
        for line in terminal.lines():
            command, _, rest = line.strip().partition(" ")
            if command == "/quit":
                break
            elif command == "/reset":
                conversation.reset()
                _say("begun again")
            elif command == "/save":
                _save(conversation, rest.strip())
            elif command.startswith("/") and command[1:].isalpha():
                _say(f"there is no {command}; {HELP}")
            elif command:
                how = Sampling(max_new_tokens, temperature, top_p, seed)
                seed = (seed + 1) % 2**63
                try:
                    terminal.show(conversation.ask(line, how))
                except ValueError as error:  # the chat template refuses it; what was said before stays
                    _say(f"error: {error}")


def _save(conversation, file: str) -> None:
    """Save, or say why not."""
    try:
        if not file:
            raise ValueError("/save needs the name of a file")
        _say(f"kept in {file}, {conversation.save(Path(file)):,} bytes; take it up with --memory {file}")
    except (ValueError, OSError) as error:
        _say(f"error: {error}")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


class _Terminal:
    """Lines in, answers out; Ctrl-C interrupts either, but never the model in the middle of a token."""

    def __enter__(self) -> None:
        self._waiting = self._stopped = False
        self._before = signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        self._stopped = True
        if self._waiting:
            raise KeyboardInterrupt

    def lines(self) -> Iterator[str]:
        """What is typed, or comes through a pipe, until it ends."""
        while True:
            try:
                self._waiting = True
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                _say("\n/quit ends")
                continue
            finally:
                self._waiting = False
            yield line

    def show(self, pieces: Generator[str]) -> None:
        """Print an answer as it comes."""
        self._stopped = False
        for piece in pieces:
            if self._stopped:
                pieces.close()
                break
            print(piece, end="", flush=True)
        print(flush=True)
