"""What memories that are weights share: maps, short convolutions with their tails, norms of reads, decays, costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Layout,
    Memory,
    State,
    check_deviation,
    head_width,
    init_map,
    linear_flops,
)
from mosaics.ops.short_convolution import short_convolution


class ShortConvolution(nn.Module):
    """A causal convolution of each channel over `size` tokens of its document, whose last inputs are its state.

    Args:
        width: channels.
        size: tokens, at least 1.
        bias: whether there is one.
    """

    def __init__(self, width: int, size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor, layout: Layout, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(batch, time, width)` of inputs of that shape, and the next tail `(batch, size - 1, width)`."""
        answer = short_convolution(x, self.weight, self.bias, tail, layout.start)
        size = self.weight.shape[1] - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], size, x.shape[2])
        whole = torch.cat([tail.to(x.dtype), x], dim=1)
        return answer, layout.align(whole[:, None])[:, 0, whole.shape[1] - size :]

    def reset_parameters(self) -> None:
        """As PyTorch's convolutions: uniform within 1 / sqrt(size)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flops(self) -> int:
        """Operations for each token."""
        return 2 * self.weight.numel()


class FastWeights(Memory):
    """A memory that is weights, with short convolutions of one size, if any, which have their inputs in common."""

    adapted = ("q_proj", "v_proj")

    def __init__(self, options: Any, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        if options.convolution < 0:
            raise ValueError(f"convolution is {options.convolution}; give the tokens that it is over, or 0.")
        check_deviation(options.initializer_range)

    def convolutions(self) -> list[ShortConvolution]:
        """Those that there are."""
        return [module for module in self.modules() if isinstance(module, ShortConvolution)]

    def reset_maps(self, layer_index: int) -> None:
        """As those of Memory Mosaics v2 (Table 6), so that systems begin alike."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            init_map(linear, layer_index, self.options.initializer_range)

    def reset_parameters(self, layer_index: int) -> None:
        self.reset_maps(layer_index)
        for convolution in self.convolutions():
            convolution.reset_parameters()

    def reach(self) -> tuple[int, None]:
        """What it learns later wears out what it learnt before; what is asked here, no convolution sees."""
        return max(6, *(c.weight.shape[1] + 2 for c in self.convolutions()), 0), None

    def flops(self, context_length: int) -> float:
        """Those of maps and convolutions, to which a memory adds those of its weights."""
        return linear_flops(self) + sum(convolution.flops() for convolution in self.convolutions())

    def numbers(self, context_length: int) -> int:
        """How many the state has of one sequence in float32 or wider, beside the inputs of the convolutions."""
        raise NotImplementedError

    def state_bytes(self, context_length: int, element_size: int) -> int:
        if not context_length:
            return 0
        tail = sum((c.weight.shape[1] - 1) * c.weight.shape[0] for c in self.convolutions()[:1])
        return self.numbers(context_length) * max(4, element_size) + tail * element_size


class GatedHeads(FastWeights):
    """Heads whose queries, keys and values come from maps and one convolution; what they read is normed, multiplied by
    a map of the input, and mapped.

    Args:
        options: the memory's, with `num_attention_heads`, `convolution` and `initializer_range`.
        common: what belongs to the whole model.
        layer_index: the block's index, from 0.
        key_width: of a head's keys and queries; None: as its values.
    """

    def __init__(self, options: Any, common: Common, layer_index: int, key_width: int | None = None) -> None:
        super().__init__(options, common, layer_index)
        d, bias = common.hidden_size, common.bias
        self.heads, self.width = options.num_attention_heads, head_width(d, options.num_attention_heads)
        self.widths = [d if key_width is None else self.heads * key_width] * 2 + [d]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, width, bias=bias) for width in self.widths)
        self.gate_proj, self.o_proj = (nn.Linear(d, d, bias=bias) for _ in range(2))
        size = options.convolution
        self.convolution = ShortConvolution(sum(self.widths), size) if size else None

    def projected(
        self,
        x: Tensor,
        layout: Layout,
        state: State | None,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Queries, keys and values `(batch, heads, time, width)` in float32 or wider, with a function before and one
        after the convolution; and its last inputs."""
        mixed, tail = torch.cat([proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1), None
        if before is not None:
            mixed = before(mixed)
        if self.convolution is not None:
            mixed, tail = self.convolution(mixed, layout, None if state is None else state.tail)
        if after is not None:
            mixed = after(mixed)
        wide = torch.promote_types(x.dtype, torch.float32)
        parts = mixed.split(self.widths, dim=-1)
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(wide) for y in parts], tail

    def answered(self, read: Tensor, x: Tensor, gate: Tensor, eps: float | None = None) -> Tensor:
        """The memory's answer `(batch, time, d)`, of what heads read `(batch, heads, time, width)`."""
        read = rms_normed(read, self.read_scale, self.common.norm_eps if eps is None else eps)
        return self.o_proj(read.to(x.dtype).transpose(1, 2).flatten(2) * gate)

    def reset_parameters(self, layer_index: int) -> None:
        super().reset_parameters(layer_index)
        nn.init.ones_(self.read_scale)


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` over the root of its mean square along the last dimension, times `weight`; float32 or wider inside."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(|x|² + eps)` along the last dimension, as the public codes of the delta rule have it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def without_padding(x: Tensor, layout: Layout) -> Tensor:
    """`(batch, heads, time, ...)` with 0 at padding."""
    padding = layout.is_padding
    if padding is None:
        return x
    return x.masked_fill(padding.view(layout.batch, 1, layout.time, *[1] * (x.dim() - 3)), 0.0)


def reset_decay(log_rates: Tensor, bias: Tensor, least: float = 0.001, most: float = 0.1) -> None:
    """How decays exp(-e^a softplus(x + b)) begin (Mamba-2): e^a from 1 to 16, and softplus(b) from `least` to `most`,
    both drawn evenly, the second by its logarithm."""
    with torch.no_grad():
        log_rates.uniform_(1, 16).log_()
        steps = torch.empty_like(bias).uniform_(math.log(least), math.log(most)).exp_()
        bias.copy_(steps + (-torch.expm1(-steps)).log())  # the inverse of softplus
