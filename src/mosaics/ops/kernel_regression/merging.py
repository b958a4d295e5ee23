"""Reads over several stores, joined into what a read of all their pairs together would have said."""

from __future__ import annotations

import torch
from torch import Tensor


def merged(*reads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    r"""\( \sum_s \frac{Z_s}{\sum_r Z_r} f_s \) with the sums of weights \( Z_s \): what one read over the pairs of all
    stores answers, exactly, as long as beta is the same. A bandwidth that depends on n counts each store's pairs.

    Source: the merge of partial softmaxes (Milakov and Gimelshein, arXiv 1805.02867).

    Args:
        reads: what `kernel_regression` returns with `log_sum`, of the same queries: answers `(batch, heads, time, value
            width)` and the logarithms of the sums of weights `(batch, heads, time)`.

    Returns:
        The same of all stores together; 0 and -inf where none has a pair to read.

    Raises:
        ValueError: there is no read, or their shapes differ.
    """
    shapes = {x.shape for x, _ in reads} | {(*log.shape, x.shape[-1]) for x, log in reads}
    if len(shapes) != 1:
        raise ValueError(f"merged got {len(reads)} reads of shapes {sorted(map(tuple, shapes))}; give reads of one.")
    logs = torch.stack([log for _, log in reads])
    top = logs.detach().amax(0).clamp(min=torch.finfo(logs.dtype).min)
    sums = (logs - top).exp()
    total = sums.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    read = sum((share / total)[..., None] * x for (x, _), share in zip(reads, sums, strict=True))
    return read.to(reads[0][0].dtype), (top + total.log()).masked_fill(empty, -torch.inf)
