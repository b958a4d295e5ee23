"""Named arrangements of memories: plain data, as a config takes it."""

from __future__ import annotations

from typing import Any


def _memory_mosaics_v2(
    layers: int, heads: int, intermediate_size: int, window: int, train_delay: list[int]
) -> list[dict[str, Any]]:
    """Two contextual memories side by side, then a persistent one (Memory Mosaics v2, section 3).

    At evaluation the delay is the smallest of those drawn in training.
    """
    short = {"num_attention_heads": heads, "window": window}
    long = {"num_attention_heads": heads, "delay": train_delay[0], "train_delay": train_delay}
    steps = [
        [{"type": "short_term", "options": short}, {"type": "long_term", "options": long}],
        [{"type": "feed_forward", "options": {"intermediate_size": intermediate_size}}],
    ]
    return [{"repeat": layers, "steps": steps}]


_LLAMA_3_TOKENS = {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001}

PRESETS: dict[str, dict[str, Any]] = {
    # Not in the paper: for a laptop, with the window and the delays scaled to a context of 512.
    "memory-mosaics-v2-tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "max_position_embeddings": 512,
        "blocks": _memory_mosaics_v2(layers=4, heads=4, intermediate_size=768, window=64, train_delay=[16, 64]),
    },
    "memory-mosaics-v2-small": {
        **_LLAMA_3_TOKENS,
        "hidden_size": 2048,
        "blocks": _memory_mosaics_v2(layers=24, heads=16, intermediate_size=6144, window=256, train_delay=[64, 256]),
    },
    "memory-mosaics-v2-large": {
        **_LLAMA_3_TOKENS,
        "hidden_size": 4096,
        "blocks": _memory_mosaics_v2(layers=32, heads=32, intermediate_size=14336, window=256, train_delay=[64, 256]),
    },
}
