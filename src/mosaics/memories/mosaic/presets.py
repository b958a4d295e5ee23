"""Memory Mosaics."""

from __future__ import annotations

import math
from typing import Any

from mosaics.memories.sizes import SIZES, Size

V1_LIBRARY = {
    "dropout": 0.05,
    "attention_dropout": 0.05,
    "embedding_dropout": 0.0,
    "logit_scale": None,
    "embedding_scale": 1.0,
}


def presets() -> dict[str, dict[str, Any]]:
    """Memory Mosaics v2 in three sizes, and v1 in those of its paper and one of ours."""
    return {f"memory-mosaics-v2-{name}": memory_mosaics_v2(size) for name, size in SIZES.items()} | {
        # Not in the paper: for a laptop, as wide as the other tiny ones.
        "memory-mosaics-v1-tiny": memory_mosaics_v1(
            4, 4, 896, vocab_size=4096, hidden_size=256, max_position_embeddings=512, **V1_LIBRARY
        ),
        # 50257 words of GPT-2's tokenizer, rounded up.
        "memory-mosaics-v1-babistories": memory_mosaics_v1(
            12,
            12,
            2688,
            vocab_size=50304,
            hidden_size=768,
            max_position_embeddings=512,
            bos_token_id=50256,
            eos_token_id=50256,
            **V1_LIBRARY,
        ),
        "memory-mosaics-v1-regbench": memory_mosaics_v1(
            2, 8, 448, vocab_size=20, hidden_size=128, max_position_embeddings=1000, **V1_LIBRARY
        ),
        # The characters of Shakespeare's plays.
        "memory-mosaics-v1-nano": memory_mosaics_v1(
            6,
            6,
            1344,
            nano=True,
            vocab_size=65,
            hidden_size=384,
            max_position_embeddings=256,
            dropout=0.2,
            attention_dropout=0.2,
            embedding_scale=0.02 * 384**0.5,
        ),
    }


def memory_mosaics_v2(size: Size) -> dict[str, Any]:
    """Section 3 of the paper; at evaluation the delay is the smallest of those drawn in training."""
    delay = {"delay": size.train_delay[0], "train_delay": list(size.train_delay)}
    return size.model([size.memory("short_term", window=size.window), size.memory("long_term", **delay)])


def memory_mosaics_v1(layers: int, heads: int, pairs: int, *, nano: bool = False, **settings: Any) -> dict[str, Any]:
    """Memory Mosaics v1 (arXiv 2405.06394) as the authors' library has it, or as their nano version."""
    contextual: dict[str, Any] = {"num_attention_heads": heads}
    persistent: dict[str, Any] = {"num_attention_heads": heads, "num_pairs": pairs}
    if nano:  # what differs there
        for options, power in ((contextual, 2), (persistent, 1)):
            options |= {"max_log_bandwidth": power * math.log(2**16 - 1), "unit_norm_eps": 1e-10}
            options |= {"initializer_range": 0.02}
    steps = [
        [{"type": "leaky_contextual", "options": contextual}],
        [{"type": "kernel_persistent", "options": persistent}],
    ]
    return {"blocks": [{"repeat": layers, "steps": steps}], "norm": "layer", "tie_word_embeddings": True, **settings}
