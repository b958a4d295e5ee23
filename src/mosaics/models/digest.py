"""What tells models, and files of tensors, apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def digest_of(about: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hexadecimal digits, of a text and of every number of named tensors, in their order."""
    found = hashlib.sha256(about.encode())
    for given, tensor in tensors:
        for name, x in _parts(given, tensor.detach()):
            found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            found.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _parts(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of: more than one if it is quantised."""
    if hasattr(x, "full_tensor"):  # sharded
        x = x.full_tensor()
    if not hasattr(x, "__tensor_flatten__"):
        yield name, x
        return
    for part in x.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(x, part))
