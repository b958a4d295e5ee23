"""`mosaics inspect`: a page that shows what a model remembered of a text, and where it found it."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

EXAMPLE = 'mosaics inspect runs/first --prompt "import os, sys" --output page.html'
LONGEST = 16384  # tokens of a prompt


def inspect(
    model: Annotated[str, Argument(metavar="MODEL", help="A model, or a run's folder; demo comes with the package.")],
    prompt: Annotated[str | None, Option(help="The text to look into; - reads it from standard input.")] = None,
    prompt_file: Annotated[Path | None, Option(metavar="FILE", help="A file with the text, UTF-8.")] = None,
    memory: Annotated[
        Path | None, Option(metavar="FILE", help="A memory kept by generate --save-memory, from before the text.")
    ] = None,
    output: Annotated[Path, Option(metavar="FILE", help="The page, one file for a browser.")] = Path("inspect.html"),
    data: Annotated[Path | None, Option(metavar="FILE", help="Also write what was found as .json or .parquet.")] = None,
    top: Annotated[int, Option(help="Pairs kept of each head and token in --data; the page has four at most.")] = 4,
    state_dtype: Annotated[
        str | None,
        Option(help="How the pairs of the context are kept: bfloat16 or int8; else as they are computed."),
    ] = None,
) -> None:
    """Show what each memory and head retrieved for every word of a text, and what it was worth; or how a run went.

    Without a text, a run's folder is shown as a page: loss, speed, what its memories do, samples.
    The page says for every word which earlier places were read, with weight, distance and effect, and how much less
    likely the word is without a memory. --data writes the same numbers as tables. docs/inspect.md explains them.
    """
    if prompt is None and prompt_file is None:
        _inspect_run(Path(model), output)
        return
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt-file both give the text; leave one out")
    if top < 1:
        raise ValueError(f"--top is {top}; it must be at least 1")
    if memory is not None and state_dtype is not None:
        raise ValueError(
            "--memory has the dtype that it was saved with; leave out --state-dtype, or keep the memory again"
        )
    from mosaics.inspection.data import check_data

    if data is not None:
        check_data(data)
    for file in (output, data):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {file.absolute().parent}; make it first")
        if file is not None and file.is_dir():
            raise ValueError(f"{file} is a folder; name a file")
    from mosaics.evaluation.files import read_text

    if prompt_file is not None:
        text = read_text(prompt_file)
    else:
        text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ValueError("the text is empty; give one with a word at least")
    from mosaics.inspection.files import write
    from mosaics.models import MosaicForCausalLM
    from mosaics.models.memory_file import load_memory
    from mosaics.training.sources import open_source

    loaded, tokenizer = open_source(model, state_dtype)
    if not isinstance(loaded, MosaicForCausalLM):
        kind = loaded.config.model_type
        raise ValueError(f"{model} is a {kind}, and only a mosaic has memories; mosaics convert makes one of a Llama")
    cache = context = None
    if memory is not None:
        cache, context = load_memory(memory, loaded)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=cache is None, verbose=False).input_ids[0]
    if not 1 <= len(ids) <= LONGEST:
        raise ValueError(f"the text has {len(ids):,} tokens; give from 1 to {LONGEST:,}")
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("")

        def told(what: str) -> None:
            progress.update(bar, description=what)

        found = loaded.inspect(ids.to(loaded.device), cache, context, top, told)
        told("writing")
        said = write(found, tokenizer, Path(model).name or model, output, data)
    print(said)
    for file in filter(None, (output, data)):
        print(f"{file}: {file.stat().st_size:,} bytes", file=sys.stderr)


def _inspect_run(run: Path, output: Path) -> None:
    """The page of a run."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"there is no text to look into, and {run} is no run; give a --prompt or a --prompt-file")
    from mosaics.training.run_page import write_run_page

    print(f"page: {write_run_page(run, output)}")
