"""Memories: one file per system, all behind one contract. Importing this package fills the registry."""

from mosaics.memories import (  # noqa: F401
    attention,
    feed_forward,
    kernel_persistent,
    leaky_contextual,
    long_term,
    short_term,
)
from mosaics.memories.base import REGISTRY, Common, Context, Layout, Memory, Read, Rows, State, register
from mosaics.memories.stack import Block, Stack, StackState

__all__ = [
    "REGISTRY",
    "Block",
    "Common",
    "Context",
    "Layout",
    "Memory",
    "Read",
    "Rows",
    "Stack",
    "StackState",
    "State",
    "register",
]
