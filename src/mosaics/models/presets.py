"""Named arrangements of memories: plain data, as a config takes it."""

from __future__ import annotations

import math
from typing import Any


def _blocks(layers: int, *contextual: list[dict[str, Any]], intermediate_size: int) -> list[dict[str, Any]]:
    """Steps of parallel contextual memories, then a persistent one."""
    persistent = {"type": "feed_forward", "options": {"intermediate_size": intermediate_size}}
    return [{"repeat": layers, "steps": [*contextual, [persistent]]}]


def _memory_mosaics_v2(heads: int, window: int, train_delay: list[int]) -> list[dict[str, Any]]:
    """Memory Mosaics v2, section 3; at evaluation the delay is the smallest of those drawn in training."""
    long = {"num_attention_heads": heads, "delay": train_delay[0], "train_delay": train_delay}
    return [
        {"type": "short_term", "options": {"num_attention_heads": heads, "window": window}},
        {"type": "long_term", "options": long},
    ]


def _transformer(heads: int) -> list[dict[str, Any]]:
    """The paper's baseline: Llama with as many heads for keys and values as for queries."""
    return [{"type": "attention", "options": {"num_attention_heads": heads}}]


def _long_short(heads: int, window: int, train_delay: list[int]) -> list[dict[str, Any]]:
    """A Transformer whose attention is split as the memories of v2 are, whose names its halves bear (Figure 5)."""
    long = {"num_attention_heads": heads, "delay": train_delay[0], "train_delay": train_delay}
    return [
        {"type": "attention", "name": "short_term", "options": {"num_attention_heads": heads, "window": window}},
        {"type": "attention", "name": "long_term", "options": long},
    ]


_SIZES: dict[str, dict[str, Any]] = {
    # Not in the paper: for a laptop, with the window and the delays scaled to a context of 512.
    "tiny": {
        "layers": 4,
        "heads": 4,
        "hidden_size": 256,
        "intermediate_size": 768,
        "window": 64,
        "train_delay": [16, 64],
    },
    "small": {"layers": 24, "heads": 16, "hidden_size": 2048, "intermediate_size": 6144},
    "large": {"layers": 32, "heads": 32, "hidden_size": 4096, "intermediate_size": 14336},
}
_PAPER = {"window": 256, "train_delay": [64, 256], "vocab_size": 128256, "context": 4096}
_LAPTOP = {"vocab_size": 4096, "context": 512}


def _presets() -> dict[str, dict[str, Any]]:
    presets = {}
    for size, own in _SIZES.items():
        s = {**(_LAPTOP if size == "tiny" else _PAPER), **own}
        arrangements = {
            "memory-mosaics-v2": _memory_mosaics_v2(s["heads"], s["window"], s["train_delay"]),
            "transformer": _transformer(s["heads"]),
            "transformer-long-short": _long_short(s["heads"], s["window"], s["train_delay"]),
        }
        for name, contextual in arrangements.items():
            presets[f"{name}-{size}"] = {
                "vocab_size": s["vocab_size"],
                "hidden_size": s["hidden_size"],
                "max_position_embeddings": s["context"],
                "blocks": _blocks(s["layers"], contextual, intermediate_size=s["intermediate_size"]),
            }
            if size != "tiny":  # Llama 3's tokenizer
                presets[f"{name}-{size}"] |= {"bos_token_id": 128000, "eos_token_id": 128001}
    return presets


def _memory_mosaics_v1(layers: int, heads: int, pairs: int, *, nano: bool = False, **settings: Any) -> dict[str, Any]:
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


# Fast weights in the place of v2's memories, with its sizes: what its papers give for a head, but for the width.
_DELTA = {"write": "delta", "unit_keys": True, "convolution": 4}
# Atlas: polynomials want narrow heads.
_OMEGA = {"num_attention_heads": 16, "degree": 2, "window": 8}
_ATLAS = {**_OMEGA, "momentum": True, "orthogonal": 5, "largest_step": 0.1}
_HEBBIAN = {"loss": "dot", "degree": 1}
_FAST_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear-attention": ("delta_rule", {"feature": "elu", "normalised": True, "read_norm": False}),
    "retention": ("delta_rule", {"decay": "fixed", "rotary": True, "gate": "silu"}),
    "gla": ("delta_rule", {"decay": "low_rank", "gate": "silu"}),
    "mamba2": ("mamba2", {}),
    "deltanet": ("delta_rule", _DELTA),
    "gated-deltanet": ("delta_rule", {"decay": "head", "gate": "silu"} | _DELTA),
    "kda": ("delta_rule", {"decay": "channel", "gate": "sigmoid", "rank": 64} | _DELTA),
    "ttt-linear": ("ttt", {"network": "linear", "base_rate": 1.0}),
    "ttt-mlp": ("ttt", {"network": "mlp", "base_rate": 0.1}),
    "titans-lmm": ("titans", {}),
    "moneta": ("miras", {"loss": "l_p", "loss_power": 3.0, "retention": "l_q", "retention_power": 4.0}),
    "yaad": ("miras", {"loss": "huber", "retention": "l2"}),
    "memora": ("miras", {"loss": "l2", "retention": "kl", "base_step": 0.2}),
    "titans-mac": ("titans_mac", {"segment": 64}),
    "titans-mag": ("titans_mag", {"window": 64}),
    "mom": ("mom", {}),
    "lattice": ("lattice", {"form": "decoding"}),
    "omeganet": ("omega", _OMEGA),
    "atlas": ("omega", _ATLAS),
    "atlas-plus": ("omega", {**_ATLAS, "network": "gated"}),
    "dla": ("omega", {**_HEBBIAN, "network": "mlp", "window": 1, "largest_step": 0.02}),
    "swla": ("omega", {**_HEBBIAN, "network": "linear", "window": 2, "gates": "place", "largest_step": 2.0}),
    "deep-transformer": ("deep_attention", {}),
    "swdt": ("deep_attention", {"window": 8}),
    "dot": ("deep_attention", {"window": 8, "loss": "l2"}),
}
_TITANS_MAL = ("titans", {}), ("attention", {"window": 64, "persistent_tokens": 4})

# Local linear fits over the stored pairs of a Transformer's attention.
_ATTENTION: dict[str, tuple[str, dict[str, Any]]] = {"lla": ("lla", {}), "parallax": ("parallax", {})}


def _in_the_place(*memories: tuple[str, dict[str, Any]], **sizes: Any) -> dict[str, Any]:
    """Memories, each in a step of its own, in the place of the contextual ones of v2-tiny, or with other sizes."""
    s = {**_LAPTOP, **_SIZES["tiny"], **sizes}
    steps = [[{"type": name, "options": {"num_attention_heads": s["heads"], **own}}] for name, own in memories]
    return {
        "vocab_size": s["vocab_size"],
        "hidden_size": s["hidden_size"],
        "max_position_embeddings": s["context"],
        "blocks": _blocks(s["layers"], *steps, intermediate_size=s["intermediate_size"]),
    }


_V1_LIBRARY = {
    "dropout": 0.05,
    "attention_dropout": 0.05,
    "embedding_dropout": 0.0,
    "logit_scale": None,
    "embedding_scale": 1.0,
}
_V1 = {
    # Not in the paper: for a laptop, as wide as the other tiny ones.
    "memory-mosaics-v1-tiny": _memory_mosaics_v1(
        4, 4, 896, vocab_size=4096, hidden_size=256, max_position_embeddings=512, **_V1_LIBRARY
    ),
    # 50257 words of GPT-2's tokenizer, rounded up.
    "memory-mosaics-v1-babistories": _memory_mosaics_v1(
        12,
        12,
        2688,
        vocab_size=50304,
        hidden_size=768,
        max_position_embeddings=512,
        bos_token_id=50256,
        eos_token_id=50256,
        **_V1_LIBRARY,
    ),
    "memory-mosaics-v1-regbench": _memory_mosaics_v1(
        2, 8, 448, vocab_size=20, hidden_size=128, max_position_embeddings=1000, **_V1_LIBRARY
    ),
    # The characters of Shakespeare's plays.
    "memory-mosaics-v1-nano": _memory_mosaics_v1(
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


def _gam(s: dict[str, Any]) -> dict[str, Any]:
    """The whole system of arXiv 2509.00605 as its authors' code has it."""
    network = {"type": "feed_forward", "options": {"intermediate_size": 4 * s["hidden_size"], "activation": "gelu"}}
    return {
        "vocab_size": s["vocab_size"],
        "hidden_size": s["hidden_size"],
        "max_position_embeddings": s["context"],
        "learned_positions": s["context"],
        "blocks": [{"repeat": s["layers"], "steps": [[{"type": "gam", "options": {"slots": 512}}], [network]]}],
        "norm": "layer",
        "bias": True,
        "dropout": 0.1,
        "embedding_scale": 3**-0.5,
        "tie_word_embeddings": True,
    }


_SYSTEMS = {f"{name}-tiny": _in_the_place(system) for name, system in (_FAST_WEIGHTS | _ATTENTION).items()}
_SYSTEMS["titans-mal-tiny"] = _in_the_place(*_TITANS_MAL)
# Segments shorter than the paper's 150, which have as many memory tokens as there.
_SYSTEMS["rmt-tiny"] = {
    **_in_the_place(("attention", {})),
    "around": {"type": "rmt", "options": {"memory_tokens": 10, "segment": 64}},
}
_SYSTEMS["gam-tiny"] = _gam({**_LAPTOP, **_SIZES["tiny"]})
# Table of arXiv 2505.23735, whose feed-forward width is not known: 8/3 of the width. A head has its 48 channels.
_SYSTEMS["atlas-170m"] = _in_the_place(
    ("omega", _ATLAS), layers=12, hidden_size=768, intermediate_size=2048, vocab_size=32000, context=4096
)
PRESETS: dict[str, dict[str, Any]] = _presets() | _V1 | _SYSTEMS
