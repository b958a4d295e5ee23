"""The persistent memory of Memory Mosaics v2: a SwiGLU network, filled by training; or a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Memory,
    check_deviation,
    init_map,
    linear_flops,
    nearest,
    register,
)
from mosaics.memories.contract import one_token as one

SOURCE = Path(__file__).with_suffix(".cpp")  # of one token
ACTIVATIONS = ("swiglu", "gelu")


@register("feed_forward")
class FeedForwardMemory(Memory):
    """W_2(SiLU(W_1 x) * W_3 x) (Memory Mosaics v2, section 3: the persistent memory), or W_2 gelu(W_3 x).

    Raises:
        ValueError: the inner width is below 1, or the activation is none of the choices.
    """

    width_option = "intermediate_size"
    EXAMPLES = (
        {"intermediate_size": 24},
        {"intermediate_size": 7, "initializer_range": 0.1},
        {"intermediate_size": 20, "activation": "gelu"},
    )

    @dataclass(frozen=True)
    class Options:
        """`intermediate_size` is the inner width d', `activation` is `swiglu`, or `gelu` (exact) of one map without a
        gate, `initializer_range` the standard deviation of the maps at the start (None: Table 6)."""

        intermediate_size: int
        activation: str = "swiglu"
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        d, inner = common.hidden_size, options.intermediate_size
        if inner < 1:
            raise ValueError(f"intermediate_size is {inner}; give at least 1.")
        if options.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {options.activation!r}; {nearest(options.activation, ACTIVATIONS)}")
        check_deviation(options.initializer_range)
        self.gate_proj = nn.Linear(d, inner, bias=common.bias) if options.activation == "swiglu" else None
        self.up_proj = nn.Linear(d, inner, bias=common.bias)
        self.down_proj = nn.Linear(inner, d, bias=common.bias)

    def forward(self, x: Tensor, layout: Layout, state: None, context: Context) -> tuple[Tensor, None]:
        inner = self.up_proj(x)
        return self.down_proj(F.gelu(inner) if self.gate_proj is None else F.silu(self.gate_proj(x)) * inner), None

    def one_token(self, x: Tensor, layout: Layout, state: None, context: Context) -> one.Part | None:
        d, inner, linears = self.common.hidden_size, self.options.intermediate_size, self._modules
        if type(self).forward is not FeedForwardMemory.forward or self.gate_proj is None:
            return None
        numbers = []
        for name, *sizes in (("gate_proj", inner, d), ("up_proj", inner, d), ("down_proj", d, inner)):
            numbers += one.numbers_of(linears.get(name), *sizes, x.dtype)
        return one.Part(_stages(x.dtype), numbers, inner)

    def reset_parameters(self, layer_index: int) -> None:
        """Table 6: a map from n inputs starts at 1 / sqrt(2 n (l + 1))."""
        for linear in self.children():
            init_map(linear, layer_index, self.options.initializer_range)

    def reach(self) -> tuple[int, int]:
        return 0, 0

    def activation_bytes(self, element_size: int) -> float:
        """As measured on a block of v2, in both precisions; without a gate what enters and leaves the activation."""
        of_inner = 2 * element_size if self.gate_proj is None else 8 + element_size
        return element_size * self.common.hidden_size + of_inner * self.options.intermediate_size

    def flops(self, context_length: int) -> float:
        return linear_flops(self)


@cache
def _stages(dtype: torch.dtype) -> tuple[int, ...]:
    return one.addresses(SOURCE, *(f"{name}_{one.KINDS[dtype]}" for name in ("inner", "outer")))
