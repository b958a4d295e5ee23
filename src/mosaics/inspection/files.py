"""An inspection as files: the page, and the tables."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mosaics.inspection.data import write_data
from mosaics.inspection.inspection import Inspection
from mosaics.inspection.page import gains, page, summary
from mosaics.inspection.text import pieces


def write(inspection: Inspection, tokenizer: Any, name: str, output: Path | None, data: Path | None = None) -> str:
    """Write an inspection, each file whole or not at all.

    Args:
        inspection: of a text.
        tokenizer: of the model.
        name: of the model, for the page.
        output: the page; None: there is to be none.
        data: the tables, `.json` or `.parquet`; None: there are to be none.

    Returns:
        What the page begins with.

    Raises:
        ValueError: the data has another ending.
        OSError: a file can't be written.
    """
    before = inspection.context_ids.tolist()
    texts = pieces(tokenizer, before + inspection.ids.tolist())
    if output is not None:
        whole = page(inspection, texts, lambda token: pieces(tokenizer, [token])[0], name)
        _replaced(output, lambda path: path.write_text(whole, encoding="utf-8"))
    if data is not None:
        _replaced(data, lambda path: write_data(path, inspection, texts))
    return " ".join(filter(None, [summary(inspection, texts[len(before) :])[2], gains(inspection)]))


def _replaced(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside it, then rename."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
