"""The gated recurrence of the keys in Triton, where that is installed: it is imported when the form is first used."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mosaics.ops.leaky_average.state import LeakyAverageState

HAS_TRITON = find_spec("triton") is not None


def pays(inputs: Tensor) -> bool:
    """Whether the kernel can be used: a tile of it holds all of a head's width in registers."""
    return HAS_TRITON and inputs.is_cuda and inputs.dtype != torch.float64 and inputs.shape[3] <= 128


def leaky_average(*args: Any, **options: Any) -> tuple[Tensor, LeakyAverageState]:
    """Equation 8 as one kernel; see `mosaics.ops.leaky_average.triton_form.leaky_average`.

    Raises:
        ValueError: Triton is not installed, or as there.
    """
    if not HAS_TRITON:
        raise ValueError("The triton form needs Triton, which is not installed; install it or use the chunked form.")
    from mosaics.ops.leaky_average import triton_form

    return triton_form.leaky_average(*args, **options)
