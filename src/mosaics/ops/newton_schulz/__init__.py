r"""Matrices made nearly orthogonal: `newton_schulz`. The mathematics is in this folder's README."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.ops import FLOATS, cast, check, run

COEFFICIENTS = (3.4445, -4.7750, 2.0315)

__all__ = ["COEFFICIENTS", "FORMS", "newton_schulz"]


def newton_schulz(matrices: Tensor, iterations: int = 5, *, form: str | None = None) -> Tensor:
    r"""\( X = S / \|S\|_F \), then `iterations` times \( X \leftarrow a X + b (X X^T) X + c (X X^T)^2 X \).

    Source: Muon (Jordan et al., 2024), whose coefficients a, b, c these are; Atlas (arXiv 2505.23735) has it inside.
    Computed in float32 or wider.

    Args:
        matrices: S, `(..., rows, columns)`.
        iterations: how often, at least 1.
        form: force one of `FORMS`; by default the fastest.

    Returns:
        X in the shape and dtype of S; 0 without a gradient where the squares of S add up to 0.

    Raises:
        ValueError: the form is unknown, there are no matrices, or `iterations` is below 1.
    """
    shape = matrices.shape if matrices.dim() > 1 else ("...", "rows", "columns")
    check("newton_schulz", matrices.device, [("matrices", matrices, shape, FLOATS)])
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; give at least 1.")
    wide = cast(matrices, torch.promote_types(matrices.dtype, torch.float32))
    return cast(run(FORMS, form or "smaller_side", "newton_schulz", wide, iterations), matrices.dtype)


def _naive(matrices: Tensor, iterations: int) -> Tensor:
    a, b, c = COEFFICIENTS
    results = []
    for s in matrices.reshape(-1, *matrices.shape[-2:]):
        if s.square().sum() == 0:
            results.append(torch.zeros_like(s))
            continue
        x = s / torch.linalg.matrix_norm(s)
        for _ in range(iterations):
            x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
        results.append(x)
    return torch.stack(results).view(matrices.shape) if results else matrices.clone()


def _smaller_side(matrices: Tensor, iterations: int) -> Tensor:
    a, b, c = COEFFICIENTS
    squares = matrices.square().sum((-2, -1), keepdim=True)
    there = squares > 0
    inverse = torch.where(there, torch.where(there, squares, 1.0).rsqrt(), 0.0)
    turned = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if turned else matrices
    x = x * inverse
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if turned else x


FORMS = {"naive": _naive, "smaller_side": _smaller_side}
