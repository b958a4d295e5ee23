"""What many memories do in the same way: initial values, counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def init_clamped_normal(weight: Tensor, std: float) -> None:
    """N(0, std) clamped to three standard deviations: clamped, not drawn again (Memory Mosaics v2, Table 6)."""
    nn.init.normal_(weight, std=std)
    with torch.no_grad():
        weight.clamp_(-3 * std, 3 * std)


def init_map(linear: nn.Linear, layer_index: int, deviation: float | None = None) -> None:
    """A map as Memory Mosaics v2 starts it (Table 6): 1 / sqrt(2 n (l + 1)) for n inputs, clamped; no bias.

    Args:
        linear: the map.
        layer_index: l, from 0.
        deviation: another standard deviation in the place of the table's.
    """
    init_clamped_normal(linear.weight, deviation or 1 / math.sqrt(2 * linear.in_features * (layer_index + 1)))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def check_delay(name: str, delay: int, context_length: int) -> None:
    """Raises `ValueError` if a memory of that name that reads so far back finds nothing in a context."""
    if context_length <= delay:
        raise ValueError(
            f"A context of {context_length} tokens is not longer than the delay of {name}, up to {delay}, so that "
            f"memory would stay empty; train at a longer context, or lower {name}.delay and {name}.train_delay."
        )


def check_deviation(deviation: float | None) -> None:
    """Raises `ValueError` if `initializer_range` is given and not above 0."""
    if deviation is not None and deviation <= 0:
        raise ValueError(f"initializer_range is {deviation}; give a number above 0, or null for the paper's.")


def head_width(hidden_size: int, heads: int, given: int | None = None) -> int:
    """The width of one of several equal heads, if it is not given.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if heads < 1 or (given is None and hidden_size % heads):
        raise ValueError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}; choose heads that divide it."
        )
    return hidden_size // heads if given is None else given


def linear_flops(module: nn.Module) -> int:
    """Two operations for each weight of the linear maps below `module`."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def mean_pairs(context_length: int, window: int | None) -> float:
    """How many pairs a position reads, averaged over a causal context."""
    if window is None or context_length <= window:
        return context_length / 2
    return window - window**2 / (2 * context_length)
