"""The command line: one module per verb, and one place that turns errors into sentences.

A verb's module defines a function of the verb's name (a typer command), optionally ``EXAMPLE`` (a runnable
command line, shown at the end of ``--help``) and ``CONTEXT`` (click's context settings). Verb modules import
nothing heavy at the top, so that ``mosaics --help`` answers at once.
"""

import errno
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated

import typer

from mosaics._version import __version__

VERBS = (
    "quickstart",
    "prepare",
    "train",
    "export",
    "convert",
    "generate",
    "chat",
    "serve",
    "library",
    "ask",
    "inspect",
    "evaluate",
    "compare",
    "reproduce",
    "report",
    "bench",
    "info",
)

app = typer.Typer(
    name="mosaics",
    help="Language models made of associative memories: prepare text, train, export, generate.",
    epilog="MOSAICS_TRACEBACK=1 shows the traceback of an error.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for _verb in VERBS:
    _module = import_module(f"mosaics.cli.{_verb}")
    _example = getattr(_module, "EXAMPLE", None)
    _function = getattr(_module, _verb)
    app.command(
        _verb,
        short_help=" ".join(_function.__doc__.split("\n\n")[0].split()),  # else click cuts it to a line
        epilog=f"\b\nExample:\n  {_example}" if _example else None,
        context_settings=getattr(_module, "CONTEXT", None),
    )(_function)


_LONGEST = 1200  # characters of an error: a value from outside that is repeated in it may be of any length
_REMEDIES = {
    errno.ENOSPC: "; make room and run the same command again",
    errno.EDQUOT: "; make room and run the same command again",
    errno.EROFS: "; choose a folder that can be written",
    errno.EACCES: "; choose a folder that you may use",
}


def sentence(error: BaseException) -> str:
    """One line that says what went wrong, for an error that the user can do something about."""
    if hasattr(error, "format_message"):  # what click (or typer's copy of it) raises
        text = error.format_message()
        text = text[:1].lower() + text[1:]
        option = getattr(error, "option_name", None)
        if option and getattr(error, "ctx", None):
            names = [name for parameter in error.ctx.command.params for name in parameter.opts]
            nearest = get_close_matches(option, names, n=1, cutoff=0.4)
            text = f"unknown option {option} ({f'did you mean {nearest[0]}?' if nearest else '--help lists them'})"
    elif isinstance(error, OSError) and error.strerror:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        text = f"{names}: {error.strerror}" if names else error.strerror
        if error.strerror == os.strerror(error.errno):  # the system's words alone
            text += _REMEDIES.get(error.errno, "")
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} [...] {text[-300:]}"


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 2 an error that the user can mend, 130
    interrupted.

    Args:
        arguments: words after ``mosaics``; None takes them from ``sys.argv``.

    Returns:
        The exit code. Every user error is one sentence on stderr that starts with ``error: ``; with the
        environment variable ``MOSAICS_TRACEBACK=1`` it is raised instead.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Threads that wait by spinning take the cores from each other when anything else runs: a step of the quickstart
    # recipe then took three times the processor time. It is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        result = app(words, prog_name="mosaics", standalone_mode=False)
        sys.stdout.flush()
        if result == 130:  # newer typers turn Ctrl-C into this
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 0
        if type(error).__name__ == "Abort":
            print("error: interrupted", file=sys.stderr)
            return 130
        expected = isinstance(error, (ValueError, OSError)) or hasattr(error, "format_message")
        if os.environ.get("MOSAICS_TRACEBACK") == "1" or not (expected or _is_out_of_memory(error)):
            raise
        if _is_out_of_memory(error):
            error = ValueError("out of memory; lower training.micro_batch_size or training.context_length")
        # Under torchrun, what all processes of a machine meet alike is said once.
        rank = getattr(error, "rank", None if os.environ.get("LOCAL_RANK", "0") == "0" else "")
        if rank != "":
            print(f"error: {f'process {rank}: ' if rank else ''}{sentence(error)}", file=sys.stderr)
        return 2
