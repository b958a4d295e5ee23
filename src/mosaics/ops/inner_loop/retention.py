"""How weights are kept in the inner loop: what they are of the sum of the steps so far.

Miras (arXiv 2504.13173, sections 3.2 and 5) calls it the retention gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RETENTIONS = ("l2", "l_q", "l_q_minimiser", "kl", "elastic_net", "elastic_net_proximal", "logit")


@dataclass(frozen=True)
class Retention:
    r"""Weights W = R(A) of sums \( A_t = (1 - \alpha_t) A_{t-1} - \theta_t \nabla_t \), for each map of each head.

    Attributes:
        name: one of `RETENTIONS`:
            `l2`: W = A;
            `l_q`: \( A / (\|A\|_q^{q-2} + \epsilon) \), as printed (Equation 24, Moneta);
            `l_q_minimiser`: \( \mathrm{sign}(A) |A|^{q-1} / (\|A\|_q^{q-2} + \epsilon) \), element by element: the
            minimiser of the problem stated there, whose own norm has the exponent q / (q - 1);
            `kl`: c softmax(A) along `over` (Memora, Equation 27): A is log W but for a constant, so that
            \( W_t = c\, \mathrm{softmax}((1 - \alpha_t) \log W_{t-1} - \theta_t \nabla_t) \);
            `elastic_net`: sign(A) max(|A| - gamma, 0), in the form of follow the regularised leader;
            `elastic_net_proximal`: the same, from which the next chunk goes on in the place of A: with chunks of one
            token \( W_t = S_\gamma((1 - \alpha_t) W_{t-1} - \theta_t \nabla_t) \);
            `logit`: sigmoid(A), weights between 0 and 1: \( \sigma(\mathrm{logit}\,W_{t-1} - \theta_t \nabla_t) \).
        power: q.
        scale: c; None: the root of the number that share it, so that weights are as large as is usual.
        over: of `kl`: `inputs` (the weights of each unit, the rows of the matrices of the paper) or `outputs`.
        threshold: gamma.
        eps: epsilon.
    """

    name: str = "l2"
    power: float = 4.0
    scale: float | None = None
    over: str = "inputs"
    threshold: float = 0.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, value, known in (("retention", self.name, RETENTIONS), ("over", self.over, ("inputs", "outputs"))):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose {', '.join(known[:-1])} or {known[-1]}.")
        if self.power < 1 or self.threshold < 0 or (self.scale is not None and self.scale <= 0):
            raise ValueError("power has to be at least 1, threshold at least 0 and scale above 0.")

    @property
    def linear(self) -> bool:
        """Whether weights are the sums themselves."""
        return self.name == "l2"

    @property
    def goes_on_from_weights(self) -> bool:
        """Whether the next chunk begins with the weights, and not with the sums."""
        return self.name == "elastic_net_proximal"

    @property
    def scales(self) -> bool:
        """Whether weights are the sums over one number."""
        return self.name == "l_q"

    def size(self, sums: Tensor, inputs: int = -2, outputs: tuple[int, ...] = (-1,)) -> Tensor:
        """What sums are divided by, as `weights` takes them; dimensions stay."""
        q = self.power
        powers = (sums.square().pow(q / 2) if q >= 2 else sums.abs().pow(q)).sum((inputs, *outputs), keepdim=True)
        return powers.clamp(min=torch.finfo(sums.dtype).tiny).pow((q - 2) / q) + self.eps

    def weights(self, sums: Tensor, inputs: int = -2, outputs: tuple[int, ...] = (-1,)) -> Tensor:
        """Of sums, in which a map's inputs and outputs have these dimensions (`over` outputs, the last of them)."""
        if self.name == "l_q":
            return sums / self.size(sums, inputs, outputs)
        if self.name == "l_q_minimiser":
            return sums.sign() * sums.abs().pow(self.power - 1) / self.size(sums, inputs, outputs)
        if self.name == "kl":
            dim = inputs if self.over == "inputs" else outputs[-1]
            scale = math.sqrt(sums.shape[dim]) if self.scale is None else self.scale
            return scale * sums.softmax(dim)
        if self.name.startswith("elastic_net"):
            return sums.sign() * (sums.abs() - self.threshold).relu()
        return sums.sigmoid() if self.name == "logit" else sums
