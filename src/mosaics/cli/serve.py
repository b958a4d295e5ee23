"""`mosaics serve`: OpenAI's endpoints for a model, with memories that are read once and asked many times."""

import re
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mosaics.extras import how_to_install

EXAMPLE = "mosaics serve runs/first --memory textwrap=textwrap.memory --port 8000"


def serve(
    model: Annotated[str, Argument(metavar="MODEL", help="An exported model, a run's folder, a hub id, or demo.")],
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, Option(help="What clients call the model; if not given, MODEL's last part.")] = None,
    memory: Annotated[
        list[str] | None,
        Option(metavar="NAME=FILE", help="A memory kept by generate --save-memory, under a name (repeatable)."),
    ] = None,
    library: Annotated[
        list[str] | None,
        Option(metavar="NAME=FOLDER", help="A library of the model, as a memory under a name (repeatable)."),
    ] = None,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps ...; auto takes a GPU if there is one.")] = "auto",
    state_dtype: Annotated[
        str | None,
        Option(help="How the pairs of the context are kept: bfloat16 or int8; else as they are computed."),
    ] = None,
    parallel: Annotated[int, Option(help="Answers that are written at once.")] = 16,
    queue: Annotated[int, Option(help="Answers that wait beyond those; more are refused (429).")] = 256,
    max_context: Annotated[int, Option(help="Tokens of memory, prompt and answer together.")] = 131072,
    max_tokens: Annotated[int, Option(help="Tokens of an answer.")] = 4096,
    max_body: Annotated[int, Option(help="Bytes of a request.")] = 8 << 20,
    timeout: Annotated[float, Option(help="Seconds for a request, waiting included.")] = 600.0,
    memories: Annotated[int, Option(help="Memories that are kept; the longest unused goes for a new one.")] = 16,
    memory_bytes: Annotated[int, Option(help="Bytes of all memories together.")] = 2 << 30,
    grace: Annotated[float, Option(help="Seconds for open requests to end after Ctrl-C or SIGTERM.")] = 10.0,
) -> None:
    """Answer over HTTP as OpenAI does, many clients at once, and read documents once for all of them.

    /v1/completions, /v1/chat/completions (if the tokenizer has a chat template), /v1/models, /v1/memories and /health.
    The environment variable MOSAICS_API_KEY sets a key that clients have to send. docs/serving.md says more.
    """
    counts = {"--parallel": parallel, "--max-context": max_context, "--max-tokens": max_tokens, "--max-body": max_body}
    for option, value in counts.items():
        if value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    none = {"--queue": queue, "--memories": memories, "--memory-bytes": memory_bytes, "--timeout": timeout}
    for option, value in (none | {"--grace": grace}).items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{option} is {value}; it must be a number from 0 up")
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; it must be from 0 to 65535")
    files, libraries = _files("--memory", memory or []), _files("--library", library or [])
    if both := files.keys() & libraries.keys():
        raise ValueError(f"--memory and --library both name {min(both)}; choose another name")
    try:
        from mosaics.library.serving import take_up_libraries
        from mosaics.serving.server import bound, run, take_up
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}, which is not installed: {how_to_install('serve')}") from None
    from mosaics.models import MosaicForCausalLM
    from mosaics.models.placing import place
    from mosaics.serving.desk import Desk, Limits
    from mosaics.training.sources import open_source

    with bound(host, port) as listening:
        loaded, tokenizer = open_source(model, state_dtype)
        if (files or libraries) and not isinstance(loaded, MosaicForCausalLM):
            kind = loaded.config.model_type
            raise ValueError(f"only a mosaic keeps a memory, and {model} is a {kind}; leave out --memory and --library")
        loaded = place(loaded, device, str(loaded.dtype).removeprefix("torch."))
        limits = Limits(parallel, queue, max_context, max_tokens, max_body, timeout, memories, memory_bytes)
        desk = Desk(name or Path(model).resolve().name, loaded, tokenizer, limits)
        take_up(desk, files)
        take_up_libraries(desk, libraries)
        address, number = listening.getsockname()[:2]
        address = f"[{address}]" if ":" in address else address
        print(f"{desk.name} answers at http://{address}:{number}/v1; Ctrl-C ends it", flush=True)
        if not tokenizer.chat_template:
            print("it has no chat template: /v1/completions only", file=sys.stderr)
        run(desk, listening, grace)


def _files(option: str, words: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    what = "NAME=FILE" if option == "--memory" else "NAME=FOLDER"
    for word in words:
        name, _, file = word.partition("=")
        if not re.fullmatch(r"[\w.-]{1,64}", name) or not file:
            raise ValueError(f"{option} {word} names no memory; write {what}, NAME of letters, digits, . _ and -")
        if name in files:
            raise ValueError(f"{option} {name} is given twice; choose another name")
        files[name] = Path(file)
    return files
