"""One template for all pages: what came out in words, then figures, tables, examples, and where it comes from."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mosaics.reporting.tables import Number, Table, plain

_EXCERPT = 150  # characters before and after what matters
_LONGEST = 20_000  # characters of a context that a page shows


@dataclass(frozen=True)
class Lead:
    """A sentence that comes first.

    Attributes:
        text: the sentence.
        kind: `good`, `bad` or `open` for the reader's first look.
    """

    text: str
    kind: Literal["good", "bad", "open"] = "open"


@dataclass(frozen=True)
class Example:
    """A question, what was shown with it, and what came back.

    Attributes:
        about: where it comes from, in a few words.
        saw: all that stood before the question.
        question: what was asked, or how the text began that was to be gone on with.
        expected: the answers that count as right.
        said: what each model answered, and whether that was right (None: neither).
        at: the place in `saw` of what matters; None: the last place of an expected answer, or the end.
        end: where that ends; None: after as many characters as an expected answer has.
    """

    about: str
    saw: str
    question: str
    expected: Sequence[str]
    said: Sequence[tuple[str, str, bool | None]]
    at: int | None = None
    end: int | None = None

    def excerpt(self) -> tuple[str, str, str]:
        """What stands before, at and after the place that matters, with dots where something is left out."""
        found = next((e.strip() for e in self.expected if e.strip() and e.strip() in self.saw), None)
        place = self.at
        if place is None:
            place = len(self.saw) if found is None else self.saw.rfind(found)
        past = place + len(found or "") if self.end is None else self.end
        start, end = max(0, place - _EXCERPT), min(len(self.saw), past + _EXCERPT)
        before, after = self.saw[start:place], self.saw[past:end]
        before = f"… {before.partition(' ')[2]}" if start else before
        after = f"{after.rpartition(' ')[0]} …" if end < len(self.saw) else after
        return before, self.saw[place:past], after

    @property
    def whole(self) -> str:
        """All that was shown, as far as a page has room; nothing where the excerpt is all."""
        if len(self.saw) <= 2 * _EXCERPT:
            return ""
        return self.saw if len(self.saw) <= _LONGEST else self.saw[:_LONGEST] + " …"


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        about: a paragraph under it.
        figures: drawings, as `draw` gives them.
        terms: (word, explanation) pairs.
        tables: shown in order.
        examples: questions and answers.
        more: sections that are folded up.
        text: shown as it is, such as commands or samples.
    """

    title: str
    about: str = ""
    figures: Sequence[str] = ()
    terms: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    examples: Sequence[Example] = ()
    more: Sequence[Section] = ()
    text: Sequence[str] = field(default=())


def write_page(
    path: Path, title: str, leads: Sequence[Lead], sections: Sequence[Section], colours: dict[str, str] | None = None
) -> Path:
    """Write an HTML page that needs nothing else, and its tables as .csv and .md into the folder `tables` beside it.

    Args:
        path: of the page.
        title: its heading.
        leads: what comes first.
        sections: what follows.
        colours: of names, shown beside them in tables as in the drawings.

    Returns:
        `path`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mosaics.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "data": _data, "slug": slug}
    environment.tests["number"] = lambda cell: isinstance(cell, Number)
    environment.tests["figure"] = lambda cell: isinstance(cell, int | float | Number) and not isinstance(cell, bool)
    page = environment.get_template("page.html.j2").render(
        title=title, leads=leads, sections=sections, colours=colours or {}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    for table in all_tables(sections):
        folder = path.parent / "tables"
        folder.mkdir(exist_ok=True)
        (folder / f"{table.name}.csv").write_text(table.csv(), encoding="utf-8")
        (folder / f"{table.name}.md").write_text(table.markdown(), encoding="utf-8")
    return path


def all_tables(sections: Sequence[Section]) -> list[Table]:
    """Every table of sections, folded ones too."""
    return [table for section in sections for table in (*section.tables, *all_tables(section.more))]


def slug(name: Any) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")


def _data(text: str, kind: str) -> str:
    return f"data:text/{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
