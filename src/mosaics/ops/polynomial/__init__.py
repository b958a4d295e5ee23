"""All monomials of a vector up to a degree: features whose products are a polynomial of a product."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter

import torch
from torch import Tensor


def polynomial(x: Tensor, roots: Tensor) -> Tensor:
    r"""Monomials of `x` `(..., d)` up to degree p, `(..., C(d + p, p))`, with \( \phi(q) \cdot \phi(k) = \sum_i a_i (q
    \cdot k)^i \) for the `roots` \( \sqrt{a_0}, ..., \sqrt{a_p} \): those of degree 1 first, the constant last."""
    parts = [roots[1] * x]
    for degree in range(2, len(roots)):
        factors, sizes = _monomials(x.shape[-1], degree)
        monomials = x[..., torch.tensor(factors, device=x.device)].prod(-1)
        parts.append(roots[degree] * torch.tensor(sizes, dtype=x.dtype, device=x.device) * monomials)
    return torch.cat([*parts, roots[0].expand(*x.shape[:-1], 1)], dim=-1)


@functools.cache
def _monomials(width: int, degree: int) -> tuple[list[tuple[int, ...]], list[float]]:
    """Which numbers each monomial multiplies, and the root of how many orders they have."""
    factors = list(itertools.combinations_with_replacement(range(width), degree))
    orders = [math.factorial(degree) // math.prod(math.factorial(n) for n in Counter(own).values()) for own in factors]
    return factors, [math.sqrt(n) for n in orders]
