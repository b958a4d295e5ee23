"""Memory that was freed and that the C library keeps."""

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch


def give_back(device: torch.device) -> None:
    """Give the system the free pages of a processor's heap, where the C library can (glibc); a matter of milliseconds.

    Where small tensors are kept between large ones that come and go, as in a loop over chunks with gradients, they
    split the places of the large ones, and the heap grows to many times of what is kept.
    """
    if device.type == "cpu" and not torch.compiler.is_compiling() and (trim := _malloc_trim()) is not None:
        trim(0)


@lru_cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return None
