"""Systems that wrap a Transformer."""

from __future__ import annotations

from typing import Any

from mosaics.memories.attention.presets import transformer
from mosaics.memories.sizes import TINY


def presets() -> dict[str, dict[str, Any]]:
    """RMT, with segments shorter than the paper's 150, which have as many memory tokens as there."""
    return {"rmt-tiny": transformer(TINY, around={"type": "rmt", "options": {"memory_tokens": 10, "segment": 64}})}
