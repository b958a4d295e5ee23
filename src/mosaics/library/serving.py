"""Libraries behind a server, each a memory that requests name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mosaics.library.library import Library
from mosaics.models.memory_file import read_context
from mosaics.serving.desk import Desk
from mosaics.serving.memories import Kept
from mosaics.serving.server import keep


def take_up_libraries(desk: Desk, folders: Mapping[str, Path]) -> None:
    """Take up libraries, all documents of each as one memory, by their ids; the begin-of-text has been read.

    Raises:
        ValueError: one is damaged or another model's, there is no room, or texts have no begin-of-text.
        OSError: one can't be read.
    """
    for id, folder in folders.items():
        begin = desk.tokenizer("").input_ids
        if not begin:
            raise ValueError(f"--library {id}: texts of this model have no begin-of-text; ask it with mosaics ask")
        cache = Library(folder, desk.model, desk.tokenizer).memory()
        read_context(desk.model, torch.tensor([begin], device=desk.model.device), cache=cache)
        keep(desk, f"--library {id}", Kept(id, cache, len(begin), given=True))
