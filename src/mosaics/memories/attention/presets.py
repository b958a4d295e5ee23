"""Transformers, and local fits over the pairs of their attention."""

from __future__ import annotations

from typing import Any

from mosaics.memories.sizes import SIZES, TINY, Size


def presets() -> dict[str, dict[str, Any]]:
    """Transformers in the sizes of Memory Mosaics v2, the others in the smallest."""
    both = {"transformer": transformer, "transformer-long-short": long_short}
    found = {f"{name}-{of}": arrangement(size) for name, arrangement in both.items() for of, size in SIZES.items()}
    return found | {f"{name}-tiny": TINY.model([TINY.memory(name)]) for name in ("lla", "parallax")}


def transformer(size: Size, **more: Any) -> dict[str, Any]:
    """The baseline of Memory Mosaics v2: Llama with as many heads for keys and values as for queries."""
    return size.model([size.memory("attention")], **more)


def long_short(size: Size) -> dict[str, Any]:
    """A Transformer whose attention is split as the memories of v2 are, whose names its halves bear (Figure 5)."""
    delay = {"delay": size.train_delay[0], "train_delay": list(size.train_delay)}
    short = size.memory("attention", window=size.window) | {"name": "short_term"}
    return size.model([short, size.memory("attention", **delay) | {"name": "long_term"}])
