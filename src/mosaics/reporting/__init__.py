"""Pages for a reader who has a minute: one HTML file that needs nothing else, tables that can be taken along. Knows no
model."""

from mosaics.reporting.figures import COLOURS, draw, embedded
from mosaics.reporting.page import Example, Lead, Section, write_page
from mosaics.reporting.tables import Number, Table, markdown, plain, shown

__all__ = [
    "COLOURS",
    "Example",
    "Lead",
    "Number",
    "Section",
    "Table",
    "draw",
    "embedded",
    "markdown",
    "plain",
    "shown",
    "write_page",
]
