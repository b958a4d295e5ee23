"""Mamba-2: fast weights whose step size is what is forgotten and what is written at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    register,
)
from mosaics.memories.fast_weights.common import (
    FastWeights,
    ShortConvolution,
    reset_decay,
    rms_normed,
    without_padding,
)
from mosaics.memories.fast_weights.delta_rule import FastWeightState
from mosaics.ops.delta_rule import delta_rule


@register("mamba2")
class Mamba2Memory(FastWeights):
    r"""\( S_t = e^{-\Delta_t e^a} S_{t-1} + B_t (\Delta_t x_t)^\top,\ y_t = S_t^\top C_t + D x_t \), a matrix for each
    head (Dao and Gu, arXiv 2405.21060); x, B and C go through a short convolution, the answer through a gate and then a
    norm.

    Raises:
        ValueError: the sizes do not fit.
    """

    adapted = ("in_proj", "out_proj")
    EXAMPLES = (
        {"num_attention_heads": 4, "state_width": 5, "convolution": 4},
        {
            "num_attention_heads": 6,
            "head_width": 4,
            "state_width": 6,
            "num_key_heads": 2,
            "convolution": 2,
            "initializer_range": 0.1,
        },
    )

    @dataclass(frozen=True)
    class Options:
        """`head_width` is that of the values of each of `num_attention_heads` heads (by default 2 hidden size / heads,
        as the paper's expansion), `state_width` that of the keys and queries, which `num_key_heads` groups of heads
        share; `convolution` is over so many tokens."""

        num_attention_heads: int
        head_width: int | None = None
        state_width: int = 64
        num_key_heads: int = 1
        convolution: int = 4
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        o, d, heads = options, common.hidden_size, options.num_attention_heads
        if heads < 1 or o.num_key_heads < 1 or heads % o.num_key_heads:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_heads {o.num_key_heads}.")
        if o.head_width is None and 2 * d % heads:
            raise ValueError(f"twice the hidden_size {d} is not a multiple of num_attention_heads {heads}.")
        if min(o.convolution, o.state_width, 1 if o.head_width is None else o.head_width) < 1:
            raise ValueError("convolution, state_width and head_width have to be at least 1.")
        self.inner = heads * (o.head_width or 2 * d // heads)
        self.keys = o.num_key_heads * o.state_width
        self.in_proj = nn.Linear(d, 2 * self.inner + 2 * self.keys + heads, bias=common.bias)
        self.convolution = ShortConvolution(self.inner + 2 * self.keys, o.convolution, bias=True)
        self.decay_rate, self.step_bias = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.read_scale = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, d, bias=common.bias)

    def initial_state(self) -> FastWeightState:
        return FastWeightState()

    def forward(
        self, x: Tensor, layout: Layout, state: FastWeightState | None, context: Context
    ) -> tuple[Tensor, FastWeightState | None]:
        heads, wide = self.options.num_attention_heads, torch.promote_types(x.dtype, torch.float32)
        sizes = [self.inner, self.inner + 2 * self.keys, heads]
        gate, mixed, steps = self.in_proj(x).split(sizes, dim=-1)
        mixed, tail = self.convolution(mixed, layout, None if state is None else state.tail)
        values, keys, queries = F.silu(mixed).split([self.inner, self.keys, self.keys], dim=-1)
        values = values.unflatten(-1, (heads, -1)).transpose(1, 2)
        shared = heads // self.options.num_key_heads
        keys, queries = (
            y.unflatten(-1, (self.options.num_key_heads, -1)).transpose(1, 2).repeat_interleave(shared, dim=1)
            for y in (keys, queries)
        )
        steps = F.softplus(steps.to(wide) + self.step_bias.to(wide)).transpose(1, 2)
        decay = without_padding(-steps * self.decay_rate.to(wide).exp()[:, None], layout)
        if context.reads is not None:
            self.show(context, {"step": steps, "decay": decay.exp()})
        keys, weights = without_padding(keys, layout), None if state is None else state.weights
        read, weights = delta_rule(
            queries, keys, values * steps[..., None], decay, None, weights, start=layout.start, write="hebbian"
        )
        read = read + self.skip.to(wide)[:, None, None] * values
        read = read.to(x.dtype).transpose(1, 2).flatten(2) * F.silu(gate)
        groups = self.options.num_key_heads
        read = rms_normed(
            read.unflatten(-1, (groups, -1)), self.read_scale.view(groups, -1), self.common.norm_eps
        ).flatten(2)
        if state is not None:
            state.weights, state.tail = weights, tail
        return self.out_proj(read), state

    def reset_parameters(self, layer_index: int) -> None:
        """Maps as those of Memory Mosaics v2 (Table 6), so that systems begin alike; the rest as the paper's code."""
        super().reset_parameters(layer_index)
        reset_decay(self.decay_rate, self.step_bias)
        nn.init.ones_(self.skip)
        nn.init.ones_(self.read_scale)

    def flops(self, context_length: int) -> float:
        return super().flops(context_length) + 5 * self.numbers(context_length)

    def activation_bytes(self, element_size: int) -> float:
        heads, channels = self.options.num_attention_heads, self.inner + 2 * self.keys
        own = 6 * channels + 2 * heads * self.options.state_width + 3 * 64 * heads
        return super().activation_bytes(element_size) + 4 * own

    def numbers(self, context_length: int) -> int:
        return self.inner * self.options.state_width
