"""What is learnt in the inner loop: a linear map or a small network, its loss, and their derivatives in closed form.

All is differentiable, so that an outer loop can go through the inner gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("l2", "normed")
ACTIVATIONS = ("gelu", "gelu_tanh")


@dataclass(frozen=True)
class Network:
    """Maps with an activation between them, and what they are to learn.

    Attributes:
        activation: between two maps: `gelu`, or `gelu_tanh`, its usual approximation.
        bias: whether the last row of each map is its bias.
        loss: `l2` is the squared norm of f(k) - v; `normed` half the squared norm of LN(f(k)) - (v - k) with the
            layer norm that comes with it (TTT, arXiv 2407.04620).
        eps: of that norm.
    """

    activation: str = "gelu"
    bias: bool = False
    loss: str = "l2"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, known in (("activation", ACTIVATIONS), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}.")

    def with_bias(self, x: Tensor) -> Tensor:
        """The inputs of a map, with a 1 for its bias."""
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if self.bias else x

    def active(self, z: Tensor) -> Tensor:
        """The activation."""
        return F.gelu(z, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def slope(self, z: Tensor) -> Tensor:
        """The activation's derivative."""
        if self.activation == "gelu":
            return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)

    def answer(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """f(x) of rows `(..., n, width)` with maps `(..., inputs, outputs)`."""
        for number, weight in enumerate(weights):
            x = self.with_bias(self.active(x) if number else x) @ weight
        return x

    def losses(self, answer: Tensor, keys: Tensor, values: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """The loss of every row."""
        if self.loss == "l2":
            return (answer - values).square().sum(-1)
        scale, shift = norm
        centred = answer - answer.mean(-1, keepdim=True)
        normed = centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * scale + shift
        return 0.5 * (normed - (values - keys)).square().sum(-1)

    def gradients(
        self, weights: Sequence[Tensor], keys: Tensor, values: Tensor, norm: tuple[Tensor, Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of every row's loss: inputs `x` and errors `e` of each map, so that the gradient of its weights is x e^T."""
        inputs, sums, x = [], [], keys
        for number, weight in enumerate(weights):
            inputs.append(self.with_bias(self.active(x) if number else x))
            x = inputs[-1] @ weight
            sums.append(x)
        errors = [self._error(x, keys, values, norm)]
        for number in range(len(weights) - 1, 0, -1):
            back = errors[0] @ weights[number].mT
            back = back[..., :-1] if self.bias else back
            errors.insert(0, back * self.slope(sums[number - 1]))
        return inputs, errors

    def _error(self, answer: Tensor, keys: Tensor, values: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.loss == "l2":
            return 2 * (answer - values)
        scale, shift = norm
        centred = answer - answer.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        normed = centred * inverse
        g = scale * (scale * normed + shift - (values - keys))
        return (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * inverse
