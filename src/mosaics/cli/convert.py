"""`mosaics convert`: a Llama as a mosaic, and back."""

import shutil
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

EXAMPLE = "mosaics convert models/llama --to mosaic --output models/llama-mosaic"


def convert(
    model: Annotated[str, Argument(metavar="MODEL", help="A model's folder, or a hub id.")],
    to: Annotated[Literal["mosaic", "llama"], Option(help="What it becomes.")],
    output: Annotated[Path, Option(metavar="FOLDER", help="The folder to make.")],
) -> None:
    """Write a Llama's weights as a mosaic of attention memories, or such a mosaic's as a Llama, with the tokenizer."""
    if output.exists():
        raise ValueError(f"--output {output} exists already; name a folder to make")
    from mosaics.models.convert import from_llama, to_llama
    from mosaics.models.loading import load_config, load_model, load_tokenizer

    kind = load_config(model).model_type
    expected = "llama" if to == "mosaic" else "mosaic"
    if kind != expected:
        raise ValueError(f"{model} is a {kind}; --to {to} takes a {expected}")
    source = load_model(model)
    converted = from_llama(source) if to == "mosaic" else to_llama(source)
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError):
        tokenizer = None
    temporary = output.with_name(f".{output.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        converted.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{model} as a {to} is in {output}{'' if tokenizer else ' (without a tokenizer: there was none)'}")
