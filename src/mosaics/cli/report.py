"""`mosaics report`: a page made of kept results."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

EXAMPLE = "mosaics report results --output docs/results.md"


def report(
    results: Annotated[Path, Argument(metavar="RESULTS", help="A folder of reproduce --results.")],
    output: Annotated[
        Path, Option(metavar="FILE", help="The page, in Markdown; plots go into images beside it.")
    ] = Path("results.md"),
) -> None:
    """Make a page of kept results: claims, verdicts and the numbers that decided; a league has one of its own."""
    from mosaics.experiments.pages import write_results_page

    print(*write_results_page(results, output), sep="\n")
