"""Where a model computes and with what: its device, its dtype, its memories."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mosaics.system import default_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def place(model, device: str, dtype: str, without: Sequence[str] = ()):
    """Moves a model to a device and dtype, and takes memories out of it.

    Raises:
        ValueError: an unknown dtype, a device that is not there, or a model without such a memory.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if device == "auto":
        device = default_device()
    check_memories(model, without)
    for kind in without:
        model.remove_memories(kind)
    try:
        return model.to(device=torch.device(device), dtype=DTYPES[dtype])
    except (RuntimeError, AssertionError) as error:
        if "out of memory" in str(error):
            raise
        raise ValueError(f"the device {device!r} can't be used ({str(error).splitlines()[0]}); try cpu") from None


def check_memories(model, kinds: Sequence[str]) -> None:
    """Raises `ValueError` if a model has no memory of one of the kinds."""
    for kind in kinds:
        if not hasattr(model, "remove_memories"):
            raise ValueError(f"a {model.config.model_type} has no memories to take out; leave out --without {kind}")
        memories = list(model.model.stack.memories())
        if not any(kind in (memory.name, memory.type) for memory in memories):
            present = ", ".join(sorted({memory.name for memory in memories}))
            raise ValueError(f"the model has no {kind!r} memory; it has {present}")
