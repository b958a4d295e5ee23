"""Memories: one file per system, all behind one contract. Importing this package fills the registry."""

from mosaics.memories import attention, feed_forward, long_term, short_term  # noqa: F401
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
