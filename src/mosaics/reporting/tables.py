"""Tables as HTML, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A number with its 95 % interval.

    Attributes:
        value: the number; None: there is none.
        low: where the interval begins; None: not known.
        high: where it ends.
        best: whether it is marked as the best.
        decimals: of the number and of its interval as people read them; None: as `shown` has them.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False
    decimals: tuple[int, int] | None = None

    @property
    def shown(self) -> str:
        """The number alone as people read it."""
        return self._rounded(self.value, 0)

    @property
    def interval(self) -> str:
        """The interval as people read it; nothing where there is none."""
        return "" if self.low is None else f"{self._rounded(self.low, 1)}–{self._rounded(self.high, 1)}"

    def _rounded(self, value: float | None, which: int) -> str:
        if value is None or self.decimals is None:
            return shown(value)
        text = f"{value:,.{self.decimals[which]}f}"
        return text.replace("-0.0", "0.0") if float(text.replace(",", "")) == 0 else text

    def __str__(self) -> str:
        return self.shown + (f" ({self.interval})" if self.interval else "")


@dataclass(frozen=True)
class Table:
    """A table that can be taken along.

    Attributes:
        name: of its files, unique on a page.
        columns: headings, each with its unit.
        rows: cells: text, numbers, None or `Number`.
        note: what is said under it.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def csv(self) -> str:
        """With a column for each end of an interval; numbers with all digits."""
        wide = [
            any(isinstance(row[i], Number) and row[i].low is not None for row in self.rows)
            for i in range(len(self.columns))
        ]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        ends = (", 95 % interval from", ", 95 % interval to")
        writer.writerow(
            [name + end for name, w in zip(self.columns, wide, strict=True) for end in ("", *(ends if w else ()))]
        )
        for row in self.rows:
            cells: list[Any] = []
            for cell, w in zip(row, wide, strict=True):
                number = cell if isinstance(cell, Number) else None
                cells.append(number.value if number else cell)
                cells += ([number.low, number.high] if number else [None, None]) if w else []
            writer.writerow(["" if cell is None else cell for cell in cells])
        return stream.getvalue()

    def markdown(self) -> str:
        """Numbers as people read them, the best in bold."""
        return markdown(self.columns, [[_bold(cell) for cell in row] for row in self.rows])


def _bold(cell: Any) -> Any:
    return f"**{cell}**" if isinstance(cell, Number) and cell.best else cell


def plain(cell: Any) -> str:
    """A cell as text."""
    return str(cell) if isinstance(cell, Number) else shown(cell)


def shown(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 10 else f"{value:,.1f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers as `shown` gives them."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(plain(cell).replace('|', '/') for cell in line)} |\n" for line in lines)
