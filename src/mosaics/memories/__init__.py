"""Memories: one file per system, in folders by group, all behind one contract.

Importing this package fills the registry; packages of others register theirs under entry points of the group
`mosaics.memories`, by the names of their types.
"""

import importlib
import pkgutil

from mosaics.memories.contract import REGISTRY, Around, Common, Context, Layout, Memory, Read, Rows, State, register
from mosaics.memories.stack import Block, Stack, StackState

__all__ = [
    "REGISTRY",
    "Around",
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

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
