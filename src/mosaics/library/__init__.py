"""Libraries: documents that a model reads once, then asked together, cited and forgotten."""

from mosaics.library.asking import Answered, CitedDocument, CitedPassage, CitedToken, ask
from mosaics.library.folder import Entry
from mosaics.library.library import Added, Library, Passage

__all__ = [
    "Added",
    "Answered",
    "CitedDocument",
    "CitedPassage",
    "CitedToken",
    "Entry",
    "Library",
    "Passage",
    "ask",
]
