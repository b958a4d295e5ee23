"""Pure functions on tensors, each with a naive twin that is its equation: no parameters, no modules."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger(__name__)
_reported: set[tuple[str, str]] = set()
FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Given = tuple[str, Tensor | None, tuple[int | str, ...], tuple[torch.dtype, ...]]


class Faster:
    """Forms of an op that are there for speed alone, each in a module of the op's package.

    The code that goes with an exported model has none of them, and does without.

    Args:
        package: of the op, whose name is the op's.
        forms: names of modules; each has a function of the op's name and one that says whether it `pays` for an input.
    """

    def __init__(self, package: str, *forms: str) -> None:
        self._op = package.rpartition(".")[2]
        self._modules: dict[str, ModuleType] = {}
        for form in forms:
            try:
                self._modules[form] = importlib.import_module(f"{package}.{form}")
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{form}":
                    raise

    def functions(self) -> dict[str, Callable]:
        """The forms that are there, by name."""
        return {form: getattr(module, self._op) for form, module in self._modules.items()}

    def pays(self, form: str, *given: Any) -> bool:
        """Whether a form is there, can be used and is worth it for an input."""
        return form in self._modules and self._modules[form].pays(*given)


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
    if first.is_meta or not torch.is_autocast_enabled(first.device.type):  # to enter the context takes longer
        return forms[form](first, *rest, **options)
    with torch.autocast(first.device.type, enabled=False):
        return forms[form](first, *rest, **options)


def check(op: str, device: torch.device, given: Iterable[Given]) -> None:
    """Refuse what an op can't compute before a form sees it: one would read beyond a tensor's end, another broadcast.

    Args:
        op: its name.
        device: where all tensors have to be.
        given: of every argument what it is called, the tensor (None is left out), the shape and the dtypes that it may
            have.

    Raises:
        ValueError: a tensor has another shape or dtype, or is on another device.
    """
    for name, x, shape, dtypes in given:
        if x is not None and (x.shape != shape or x.dtype not in dtypes or x.device != device):
            names = [str(dtype).removeprefix("torch.") for dtype in (x.dtype, *dtypes)]
            raise ValueError(
                f"{op} got {name} of shape {tuple(x.shape)} in {names[0]} on {x.device}; with its other arguments that "
                f"has to be ({', '.join(map(str, shape))}) in {' or '.join(names[1:])} on {device}."
            )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which alone takes ten times as long to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def widest(x: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def has_numbers(x: Tensor) -> bool:
    """Whether a tensor holds numbers, and does not only say what is computed (on the meta device, in `FakeTensorMode`,
    while something is exported). A graph that is compiled has them when it runs."""
    if type(x) is Tensor or type(x) is nn.Parameter:
        return not x.is_meta
    try:
        return not isinstance(x, FakeTensor) and x.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def may_be(condition: Callable[[], Tensor]) -> bool:
    """Whether a condition, a tensor of one boolean, is true; while a graph is made, which has to serve both, it may
    be."""
    return torch.compiler.is_compiling() or bool(condition())


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
