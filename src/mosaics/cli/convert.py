"""`mosaics convert`: a Llama as a mosaic, and back."""

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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from mosaics.models.convert import from_llama, to_llama

    kind = AutoConfig.from_pretrained(model).model_type
    expected = "llama" if to == "mosaic" else "mosaic"
    if kind != expected:
        raise ValueError(f"{model} is a {kind}; --to {to} takes a {expected}")
    source = AutoModelForCausalLM.from_pretrained(model)
    converted = from_llama(source) if to == "mosaic" else to_llama(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        tokenizer = None
    temporary = output.with_name(f".{output.name}.new")
    converted.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    temporary.rename(output)
    print(f"{model} as a {to} is in {output}{'' if tokenizer else ' (without a tokenizer: there was none)'}")
