"""What memories that are weights share: short convolutions with their tails, norms of reads, how decays begin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mosaics.memories.contract import Layout
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
