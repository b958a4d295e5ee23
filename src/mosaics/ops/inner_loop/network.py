"""What is learnt in the inner loop: a linear map or a small network, its loss, and their derivatives in closed form.

All is differentiable, so that an outer loop can go through the inner gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops.inner_loop.losses import Loss

ACTIVATIONS = ("gelu", "gelu_tanh", "geglu")
Norm = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """Maps with an activation between them, and what they are to learn.

    Attributes:
        activation: between two maps: `gelu`; `gelu_tanh`, its usual approximation; `geglu`, gelu of the first half
            times the second: the map before it is two beside each other.
        bias: whether the last row of each map is its bias.
        residual: whether the answer is added to the input; of a wider input, to its first numbers.
        normed: whether a layer norm is behind the last map, whose scale and shift the inner loop does not change.
        loss: of the answer.
        eps: of that norm.
    """

    activation: str = "gelu"
    bias: bool = False
    residual: bool = False
    normed: bool = False
    loss: Loss = field(default_factory=Loss)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; choose {' or '.join(ACTIVATIONS)}.")

    def with_bias(self, x: Tensor) -> Tensor:
        """The inputs of a map, with a 1 for its bias."""
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if self.bias else x

    def active(self, z: Tensor) -> Tensor:
        """The activation."""
        if self.activation == "geglu":
            gate, up = z.chunk(2, dim=-1)
            return F.gelu(gate) * up
        return F.gelu(z, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def halves(self, number: int, maps: int) -> int:
        """How many matrices lie beside each other in a map."""
        return 2 if self.activation == "geglu" and number < maps - 1 else 1

    def back(self, error: Tensor, z: Tensor) -> Tensor:
        """What an error behind the activation is before it."""
        if self.activation != "geglu":
            return error * self._slope(z)
        gate, up = z.chunk(2, dim=-1)
        return torch.cat([error * up * self._slope(gate), error * F.gelu(gate)], dim=-1)

    def _slope(self, z: Tensor) -> Tensor:
        """The derivative of gelu."""
        if self.activation != "gelu_tanh":
            return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)

    def answer(self, x: Tensor, weights: Sequence[Tensor], norm: Norm | None) -> Tensor:
        """f(x) of rows `(..., n, width)` with maps `(..., inputs, outputs)`."""
        return self.completed(self.through(x, weights)[1][-1], x, norm)

    def through(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of all maps, and what they make of them."""
        inputs, sums = [], []
        for number, weight in enumerate(weights):
            inputs.append(self.with_bias(self.active(sums[-1]) if number else x))
            sums.append(inputs[-1] @ weight)
        return inputs, sums

    def completed(self, z: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
        """f(x) of what the last map made of x."""
        if self.normed:
            scale, shift = norm
            z = self._normed(z)[0] * scale + shift
        return x[..., : z.shape[-1]] + z if self.residual else z

    def gradients(
        self, weights: Sequence[Tensor], keys: Tensor, values: Tensor, delta: Tensor | None, norm: Norm | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of every row's loss: inputs `x` and errors `e` of each map, so that the gradient of its weights is x e^T."""
        inputs, sums = self.through(keys, weights)
        last = sums[-1]
        errors = [self._behind_the_norm(self.loss.errors(self.completed(last, keys, norm), values, delta), last, norm)]
        for number in range(len(weights) - 1, 0, -1):
            back = errors[0] @ weights[number].mT
            back = back[..., :-1] if self.bias else back
            errors.insert(0, self.back(back, sums[number - 1]))
        return inputs, errors

    def _behind_the_norm(self, error: Tensor, z: Tensor, norm: Norm | None) -> Tensor:
        if not self.normed:
            return error
        normed, inverse = self._normed(z)
        g = norm[0] * error
        return (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)) * inverse

    def _normed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean 0 and variance 1, and what the deviations were multiplied by."""
        centred = z - z.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * inverse, inverse
