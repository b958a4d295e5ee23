"""What was read once and is kept for any request to go on from."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

from transformers import DynamicCache

from mosaics.models.cache import held_bytes


@dataclass(frozen=True)
class Kept:
    """A memory: its cache (never changed: it is copied for every request), the tokens it is of, and since when.

    One that was `given` when the server started stays until it ends.
    """

    id: str
    cache: DynamicCache
    tokens: int
    given: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def bytes(self) -> int:
        return held_bytes(self.cache)


class Memories:
    """Memories by their ids. When there is no more room, the ones whose last use is longest ago go.

    Args:
        number: how many there may be at most.
        bytes: how many they may have together.
    """

    def __init__(self, number: int, bytes: int) -> None:
        self.number, self.bytes = number, bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the last one was used last

    def __iter__(self):
        return iter(list(self._kept.values()))

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, id: str) -> Kept:
        """The memory, which counts as a use.

        Raises:
            KeyError: there is none.
        """
        self._kept.move_to_end(id)
        return self._kept[id]

    def room(self) -> int:
        """The bytes that a new memory may have: those that no given memory has."""
        given = [kept for kept in self if kept.given]
        return self.bytes - sum(kept.bytes for kept in given) if len(given) < self.number else 0

    def add(self, new: Kept) -> None:
        """Keep one, and let go of others until there is room.

        Raises:
            ValueError: there is no room for it whatever else goes.
        """
        if new.bytes > self.room():
            raise ValueError(f"a memory of {new.bytes:,} bytes does not fit in {max(self.room(), 0):,}")
        others = [kept for kept in self if not kept.given]
        while len(self) >= self.number or new.bytes + sum(kept.bytes for kept in self) > self.bytes:
            del self._kept[others.pop(0).id]
        self._kept[new.id] = new

    def remove(self, id: str) -> None:
        """Let go of one.

        Raises:
            KeyError: there is none.
            PermissionError: it was given when the server started.
        """
        if self._kept[id].given:
            raise PermissionError(f"the memory {id!r} was given when the server started and stays")
        del self._kept[id]
