"""The random number of an optimisation step: all passes between two steps of the optimizer share it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_given: ContextVar[float | None] = ContextVar("mosaics.draw", default=None)
_drawn: weakref.WeakKeyDictionary[nn.Module, tuple[int, float | None]] = weakref.WeakKeyDictionary()


def draw_step(seed: int, step: int) -> float:
    """The random number in [0, 1) of one optimisation step, from which the long-term delay follows.

    It is shared by all layers, micro-batches and processes.
    """
    return float(np.random.default_rng([seed, step, 0]).random())


@contextmanager
def draw(value: float) -> Iterator[None]:
    """Within it, models in training take `value` for the step's random number: `with mosaics.draw(0.5): model(...)`.

    Raises:
        ValueError: the value is not in [0, 1).
    """
    token = _given.set(checked(value))
    try:
        yield
    finally:
        _given.reset(token)


def checked(value: float) -> float:
    """The value, if it can be a draw.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"draw is {value}; give a number from 0 up to, not including, 1.")
    return value


@torch.compiler.disable
def drawn(model: nn.Module) -> float:
    """What a model in training draws for the pass: the number given by `draw`, or one that follows from torch's seed
    and from how many steps optimizers have taken with this model's parameters since it first asked.

    So all passes between two steps share it, and all processes that were seeded alike.
    """
    if (given := _given.get()) is not None:
        return given
    steps, value = _drawn.get(model, (0, None))
    if value is None:
        value = draw_step(torch.initial_seed(), steps)
        _drawn[model] = steps, value
    return value


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _drawn:
        return
    changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model, (steps, _) in list(_drawn.items()):
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained or any(id(p) in changed for p in trained):  # of a frozen one, what is trained lies around it
            _drawn[model] = steps + 1, None


register_optimizer_step_post_hook(_stepped)
