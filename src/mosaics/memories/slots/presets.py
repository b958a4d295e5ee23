"""Systems whose memory is a bank of learned rows."""

from __future__ import annotations

from typing import Any

from mosaics.memories.sizes import TINY, Size

PAPER = Size(6, 1, 512, 4 * 512, vocab_size=10000, context=256)


def presets() -> dict[str, dict[str, Any]]:
    """The whole system of arXiv 2509.00605, small and in the size of its paper."""
    return {"gam-tiny": gam(TINY), "gam-22m": gam(PAPER)}


def gam(size: Size) -> dict[str, Any]:
    """As its authors' code has it."""
    network = {"type": "feed_forward", "options": {"intermediate_size": 4 * size.hidden_size, "activation": "gelu"}}
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "max_position_embeddings": size.context,
        "learned_positions": size.context,
        "blocks": [{"repeat": size.layers, "steps": [[{"type": "gam", "options": {"slots": 512}}], [network]]}],
        "norm": "layer",
        "bias": True,
        "dropout": 0.1,
        "embedding_scale": 3**-0.5,
        "tie_word_embeddings": True,
    }
