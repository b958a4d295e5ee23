"""`mosaics export`: a checkpoint of a run as a transformers model."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

EXAMPLE = "mosaics export runs/first --output models/first"


def export(
    run: Annotated[Path, Argument(metavar="RUN", help="The run's folder.")],
    output: Annotated[Path, Option(metavar="FOLDER", help="The folder to make.")],
    step: Annotated[int | None, Option(help="Whose checkpoint; the newest if not given.")] = None,
    self_contained: Annotated[
        bool, Option("--self-contained", help="With all code it needs, for machines without mosaics.")
    ] = False,
) -> None:
    """Export a run: weights, config, tokenizer and model card, as `from_pretrained` reads them."""
    from mosaics.training import export_run

    print(f"exported to {export_run(run, output, step=step, self_contained=self_contained)}")
