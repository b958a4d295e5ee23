"""A causal convolution over a few positions, each channel by itself, within documents."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import FLOATS, INTEGERS, check

__all__ = ["short_convolution"]


def short_convolution(
    inputs: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    r"""\( y_t = b + \sum_{j=0}^{K-1} w_{K-1-j} \odot x_{t-j} \), over positions of t's document.

    Source: as `torch.nn.functional.conv1d` with padding on the left; what a Mamba block (arXiv 2312.00752) begins with.

    Args:
        inputs: `(batch, time, width)`.
        weight: `(width, K)`; the last column is that of the position itself.
        bias: `(width,)`.
        tail: `(batch, K - 1, width)`, the inputs before the first; None: 0.
        start: `(batch, time)`, integers, where the document of each position begins, counted from the first position of
            this call (negative in the tail); None: all is one document.

    Returns:
        Like `inputs`.

    Raises:
        ValueError: a tensor has a wrong shape, device or dtype.
    """
    named = inputs.dim() == 3 and weight.dim() == 2 and weight.shape[1] > 0
    batch, time, width = inputs.shape if named else ("batch", "time", "width")
    size = weight.shape[1] if named else "1 or more"
    before = size - 1 if named else "K - 1"
    given = [
        ("inputs", inputs, (batch, time, width), FLOATS),
        ("weights", weight, (width, size), FLOATS),
        ("bias", bias, (width,), FLOATS),
        ("tail", tail, (batch, before, width), FLOATS),
        ("start", start, (batch, time), INTEGERS),
    ]
    check("short_convolution", inputs.device, given)
    tail = inputs.new_zeros(batch, before, width) if tail is None else tail.to(inputs.dtype)
    whole, position = torch.cat([tail, inputs], dim=1), torch.arange(time, device=inputs.device)
    answer = None if bias is None else bias.to(inputs.dtype)
    for back in range(size):
        part = whole[:, before - back : before - back + time]
        if start is not None and back:
            part = part.masked_fill((position - back < start)[..., None], 0.0)
        part = part * weight[:, size - 1 - back].to(inputs.dtype)
        answer = part if answer is None else answer + part
    return answer
