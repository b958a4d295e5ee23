"""What weights learn by in the inner loop: losses of an answer, and the errors that they send back.

Miras (arXiv 2504.13173, section 4) calls the loss the attentional bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOSSES = ("l2", "l_p", "huber", "huber_norm", "huber_coordinates", "shifted", "dot")
_OF_THE_NORM = ("huber_norm", "shifted")
_WITH_DELTA = ("huber", "huber_coordinates", *_OF_THE_NORM)


@dataclass(frozen=True)
class Loss:
    r"""A loss of e = f(k) - v.

    Attributes:
        name: one of `LOSSES`:
            `l2`: \( \|e\|^2 \);
            `l_p`: \( \|e\|_p^p \) (Miras, Equation 9 and Moneta);
            `huber`: \( \|e\|^2 \) where \( \|e\| \le \delta \), and \( \delta \|e\|_1 \) elsewhere, as printed for Yaad
            (Equation 26);
            `huber_norm`: Huber's function of \( \|e\| \), \( \delta (\|e\| - \delta / 2) \) beyond \( \delta \);
            `huber_coordinates`: that of every coordinate;
            `shifted`: \( \frac12 (\|e\| + \delta)^2 \), the worst case where values are moved by up to \( \delta \);
            `dot`: \( -\langle f(k), v \rangle \).
        half: whether the squared norm of `l2` and `huber` counts half. It does in the others.
        power: p of `l_p`, at least 1.
        sharpness: a of \( \tanh(a x) \), which is put in the place of the sign of x in the errors of `l_p` and `huber`;
            None: the sign, through which no outer gradient passes.
        smoothing: \( \sqrt{x^2 + s} \) stands for |x| in the errors of `l_p`.
    """

    name: str = "l2"
    half: bool = False
    power: float = 3.0
    sharpness: float | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"loss is {self.name!r}; choose {', '.join(LOSSES[:-1])} or {LOSSES[-1]}.")
        if self.power < 1 or self.smoothing < 0 or (self.sharpness is not None and self.sharpness <= 0):
            raise ValueError("power has to be at least 1, smoothing at least 0 and sharpness above 0.")

    @property
    def takes_delta(self) -> bool:
        """Whether it has a threshold."""
        return self.name in _WITH_DELTA

    @property
    def of_the_norm(self) -> bool:
        """Whether it is a function of the norm of e alone, so that channels can't have thresholds of their own."""
        return self.name in _OF_THE_NORM

    @property
    def smooth(self) -> bool:
        """Whether something smooth stands for a sign or a modulus, so that its errors are not those of its values."""
        return self.name in ("l_p", "huber") and (self.sharpness is not None or self.smoothing > 0)

    def values(self, answer: Tensor, values: Tensor, delta: Tensor | None) -> Tensor:
        """What adds up to the loss of each row, `(..., width or 1)`; deltas are of that shape."""
        if self.name == "dot":
            return -answer * values
        e = answer - values
        if self.name == "l_p":
            return e.abs().pow(self.power)
        squares = e.square() * (0.5 if self.half else 1.0)
        if self.name == "l2":
            return squares
        size = _norm(e)
        if self.name == "huber":
            return torch.where(size <= delta, squares, delta * e.abs())
        if self.name == "huber_coordinates":
            return torch.where(e.abs() <= delta, 0.5 * e.square(), delta * (e.abs() - 0.5 * delta))
        if self.name == "huber_norm":
            return torch.where(size <= delta, 0.5 * size.square(), delta * (size - 0.5 * delta))
        return 0.5 * (size + delta).square()

    def errors(self, answer: Tensor, values: Tensor, delta: Tensor | None) -> Tensor:
        """The derivative by the answer."""
        if self.name == "dot":
            return -values
        e = answer - values
        if self.name == "l2":
            return e if self.half else 2 * e
        if self.name == "l_p":
            size = e.abs() if self.smoothing == 0 else (e.square() + self.smoothing).sqrt()
            return self.power * self._sign(e) * size.pow(self.power - 1)
        if self.name == "huber_coordinates":
            return torch.where(e.abs() <= delta, e, delta * e.sign())
        size = _norm(e)
        if self.name == "huber":
            return torch.where(size <= delta, e if self.half else 2 * e, delta * self._sign(e))
        beyond = delta * e / size
        return e + beyond if self.name == "shifted" else torch.where(size <= delta, e, beyond)

    def _sign(self, e: Tensor) -> Tensor:
        return e.sign() if self.sharpness is None else torch.tanh(self.sharpness * e)


def _norm(e: Tensor) -> Tensor:
    """Euclidean, with a derivative of 0 at 0."""
    return e.square().sum(-1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny).sqrt()
