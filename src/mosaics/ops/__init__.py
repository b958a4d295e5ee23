"""Pure functions on tensors, each with a naive twin that is its equation: no parameters, no modules."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_reported: set[tuple[str, str]] = set()


def run(forms: dict[str, Callable], form: str, op: str, first: Tensor, *rest: Any, **options: Any) -> Any:
    """Call the function of `forms` named `form`; the first use of each is logged once.

    Autocast is off inside: an op chooses the precision of each of its products itself.

    Raises:
        ValueError: there is no such form.
    """
    if form not in forms:
        near = difflib.get_close_matches(form, forms, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(forms)}."
        raise ValueError(f"{op} has no form {form!r}; {hint}")
    if not torch.compiler.is_compiling() and (op, form) not in _reported:
        _reported.add((op, form))
        logger.info("%s uses its %s form", op, form)
    if not torch.is_autocast_enabled(first.device.type):  # to enter the context takes longer than a small op
        return forms[form](first, *rest, **options)
    with torch.autocast(first.device.type, enabled=False):
        return forms[form](first, *rest, **options)


def eager_on_cpu(function: Callable) -> Callable:
    """Leave a function of tensors out of what `torch.compile` compiles for a processor: there the ops have kernels of
    their own, which it cannot look into, and a graph would be made anew for every delay that is drawn."""
    eager = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() and options.get("form") is None:
            if next(x for x in args if isinstance(x, Tensor)).device.type == "cpu":
                return eager(*args, **options)
        return function(*args, **options)

    return call
