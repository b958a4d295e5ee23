"""`mosaics convert`: a Llama as a mosaic, and back; the authors' Memory Mosaics v1 as a mosaic."""

import shutil
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

EXAMPLE = "mosaics convert models/llama --to mosaic --output models/llama-mosaic"


def convert(
    model: Annotated[str, Argument(metavar="MODEL", help="A model's folder, a hub id, or a v1's .safetensors.")],
    to: Annotated[Literal["mosaic", "llama"], Option(help="What it becomes.")],
    output: Annotated[Path, Option(metavar="FOLDER", help="The folder to make.")],
    key_clamp: Annotated[float | None, Option(help="Of a v1: the largest logarithm of the keys' scale.")] = None,
) -> None:
    """Write a Llama's weights as a mosaic of attention memories, or such a mosaic's as a Llama, with the tokenizer.

    A .safetensors file is taken for the weights of the authors' Memory Mosaics v1 (nano or library).
    """
    if output.exists():
        raise ValueError(f"--output {output} exists already; name a folder to make")
    if Path(model).is_file():
        from mosaics.models.convert_v1 import read_memory_mosaics_v1

        if to != "mosaic":
            raise ValueError(f"{model} is a file of weights, of which only --to mosaic can be made")
        converted, tokenizer = read_memory_mosaics_v1(Path(model), key_clamp), None
    else:
        converted, tokenizer = _llama_or_mosaic(model, to)
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


def _llama_or_mosaic(model: str, to: str):
    from mosaics.models.convert import from_llama, to_llama
    from mosaics.training.sources import find_source

    source = find_source(model)
    kind = source.config().model_type
    expected = "llama" if to == "mosaic" else "mosaic"
    if kind != expected:
        raise ValueError(f"{model} is a {kind}; --to {to} takes a {expected}")
    tokenizer = source.tokenizer()  # a damaged one is found before the weights are read
    return (from_llama if to == "mosaic" else to_llama)(source.model()), tokenizer
