"""Fast weights and memories that learn at test time: what their papers give for a head, but for the width."""

from __future__ import annotations

from typing import Any

from mosaics.memories.sizes import TINY, Size, of_paper

_DELTA = {"write": "delta", "unit_keys": True, "convolution": 4}
# Atlas: polynomials want narrow heads.
_OMEGA = {"num_attention_heads": 16, "degree": 2, "window": 8}
_ATLAS = {**_OMEGA, "momentum": True, "orthogonal": 5, "largest_step": 0.1}
_HEBBIAN = {"loss": "dot", "degree": 1}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
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
_170M = of_paper(12, 16, 768)
# Where the source gives layers and width. Polynomials of Atlas's wider heads would make its larger sizes far larger
# than their names (their degree is not known), so that they are left out.
SIZES: dict[str, dict[str, Size]] = {
    **{  # Table of arXiv 2504.13173
        name: {"170m": _170M, "340m": of_paper(24, 16, 1024), "780m": of_paper(24, 16, 1536)}
        for name in ("moneta", "yaad", "memora")
    },
    **{name: {"170m": _170M} for name in ("omeganet", "atlas")},  # Table of arXiv 2505.23735
    "mom": {"380m": of_paper(24, 4, 1024, context=2048)},  # arXiv 2502.13685
}


def presets() -> dict[str, dict[str, Any]]:
    """Every system in the smallest size, and in those that its source gives."""
    found = {}
    for name, (kind, options) in SYSTEMS.items():
        for of, size in ({"tiny": TINY} | SIZES.get(name, {})).items():
            found[f"{name}-{of}"] = size.model([size.memory(kind, **options)])
    found["mom-380m"] |= {"tie_word_embeddings": True}
    attention = TINY.memory("attention", window=TINY.window, persistent_tokens=4)
    return found | {"titans-mal-tiny": TINY.model([TINY.memory("titans")], [attention])}
