"""Softmax attention with rotary positions: the Transformer's contextual memory, as a baseline in the same mosaic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaics.memories.base import (
    Common,
    Context,
    Layout,
    Memory,
    Pairs,
    Read,
    State,
    init_clamped_normal,
    linear_flops,
    mean_pairs,
    register,
)
from mosaics.ops.kernel_regression import Bandwidth, kernel_regression, weights


@dataclass
class AttentionState(State):
    """The stored pairs: rotated keys, and values."""

    pairs: Pairs


@register("attention")
class AttentionMemory(Memory):
    """Attention as in Llama: position t reads positions t-window+1 ... t-delay by softmax(q_t k_i /
    sqrt(width)).

    With a delay of 0 and no window it is Llama's own, whose projections have the same names. A window on one and a
    delay on another, side by side, are the long and short attention of Memory Mosaics v2, Figure 5.

    Raises:
        ValueError: heads do not divide the width or each other, the head width is odd, or the reach is impossible.
    """

    @dataclass(frozen=True)
    class Options:
        """Heads for queries and (fewer, shared) for keys and values; how far back the newest and the oldest readable
        pair lie.

        `delay` is that of evaluation; `train_delay` the range, both ends included, from which training draws.
        """

        num_attention_heads: int
        num_key_value_heads: int | None = None
        head_dim: int | None = None
        window: int | None = None
        delay: int = 0
        train_delay: tuple[int, int] | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        d, heads = common.hidden_size, options.num_attention_heads
        if heads < 1 or (options.head_dim is None and d % heads):
            raise ValueError(
                f"hidden_size {d} is not a multiple of num_attention_heads {heads}; choose heads that divide it."
            )
        self.width = d // heads if options.head_dim is None else options.head_dim
        pair_heads = heads if options.num_key_value_heads is None else options.num_key_value_heads
        if pair_heads < 1 or heads % pair_heads:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {pair_heads}.")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"A head of attention is {self.width} wide; rotary positions need an even width.")
        low, high = options.train_delay or (options.delay, options.delay)
        if (
            options.delay < 0
            or low < 0
            or low > high
            or (options.window is not None and options.window <= options.delay)
        ):
            raise ValueError(
                f"An attention has window {options.window}, delay {options.delay}, training delays {low} to {high}; "
                "give delays of at least 0, the smaller first, and a window larger than the delay."
            )
        self.heads, self.pair_heads = heads, pair_heads
        self.q_proj = nn.Linear(d, heads * self.width, bias=common.bias)
        self.k_proj = nn.Linear(d, pair_heads * self.width, bias=common.bias)
        self.v_proj = nn.Linear(d, pair_heads * self.width, bias=common.bias)
        self.o_proj = nn.Linear(heads * self.width, d, bias=common.bias)

    def initial_state(self) -> AttentionState:
        window = self.options.window
        return AttentionState(Pairs(limit=None if window is None else window - 1, dtype=self.common.state_dtype))

    def forward(
        self, x: Tensor, layout: Layout, state: AttentionState | None, context: Context
    ) -> tuple[Tensor, AttentionState | None]:
        queries, keys, values = (
            proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self._rotation(layout.position(x.device), queries.dtype)
        queries, keys = (y * cos + _half_turned(y) * sin for y in (queries, keys))
        if state is not None:
            keys, values = state.pairs.append(keys, values)
        shared = self.heads // self.pair_heads
        all_keys, all_values = (y.repeat_interleave(shared, dim=1) if shared > 1 else y for y in (keys, values))
        train_delay = self.options.train_delay
        delay = (
            self.options.delay if context.draw is None or train_delay is None else context.draw_integer(*train_delay)
        )
        access = dict(delay=delay, window=self.options.window, start=layout.start)
        wide = torch.promote_types(queries.dtype, torch.float32)
        scale = Bandwidth(torch.full((self.heads,), 1 / math.sqrt(self.width), dtype=wide, device=x.device))
        read = kernel_regression(queries, all_keys, all_values, scale, dropout=self.read_dropout(), **access)
        if context.reads is not None:
            context.reads.append(Read(self.type, self.layer_index, weights(queries, all_keys, scale, **access)))
        if state is not None:
            state.pairs.settle(layout)
        return self.o_proj(read.transpose(1, 2).flatten(2)), state

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(batch or 1, 1, time, width)` at integer positions."""
        wide = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, self.width, 2, device=position.device).to(wide) / self.width
        angles = position.to(wide)[..., None] * self.common.rotary_base**-exponents
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def reset_parameters(self, layer_index: int) -> None:
        """As the maps of Memory Mosaics v2 (Table 6), since the paper gives none for its baseline."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_clamped_normal(linear.weight, 1 / math.sqrt(2 * linear.in_features * (layer_index + 1)))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def flops(self, context_length: int) -> float:
        return linear_flops(self) + 4 * mean_pairs(context_length, self.options.window) * self.heads * self.width

    def state_bytes(self, context_length: int, element_size: int) -> int:
        pairs = context_length if self.options.window is None else min(context_length, self.options.window - 1)
        return pairs * self.pair_bytes(self.pair_heads * self.width, self.pair_heads, element_size)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
