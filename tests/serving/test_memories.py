"""Memories that are kept: those that are not used go first, and never more is held than may be."""

from dataclasses import dataclass

import pytest
import torch

from mosaics.models.cache import held_bytes, release
from mosaics.models.memory_file import read_context
from mosaics.serving.memories import Kept, Memories


@dataclass
class Holding:
    """Stands for a cache of so many bytes."""

    bytes: int


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    monkeypatch.setattr("mosaics.serving.memories.held_bytes", lambda cache: cache.bytes)


def kept(id, bytes=10, given=False):
    return Kept(id, Holding(bytes), 5, given)


def ids(memories):
    return [memory.id for memory in memories]


def test_memories_let_go_of_the_one_whose_use_is_longest_ago():
    memories = Memories(3, 1000)
    for id in "abc":
        memories.add(kept(id))
    assert memories.get("a").id == "a"
    memories.add(kept("d"))
    assert ids(memories) == ["c", "a", "d"] and len(memories) == 3
    with pytest.raises(KeyError):
        memories.get("b")


def test_memories_let_go_until_the_bytes_fit():
    memories = Memories(10, 100)
    for id in "abc":
        memories.add(kept(id, 30))
    memories.add(kept("d", 65))
    assert ids(memories) == ["c", "d"]
    with pytest.raises(ValueError, match="101 bytes does not fit in 100"):
        memories.add(kept("e", 101))
    assert ids(memories) == ["c", "d"]


def test_memories_keep_those_that_were_given():
    memories = Memories(2, 100)
    memories.add(kept("a", 60, given=True))
    for id in "bc":
        memories.add(kept(id, 30))
    assert ids(memories) == ["a", "c"] and memories.room() == 40
    with pytest.raises(ValueError, match="41 bytes does not fit in 40"):
        memories.add(kept("d", 41))
    with pytest.raises(PermissionError):
        memories.remove("a")
    memories.remove("c")
    with pytest.raises(KeyError):
        memories.remove("c")
    memories.add(kept("e", 40, given=True))
    assert memories.room() == 0 and ids(memories) == ["a", "e"]


def test_kept_counts_the_bytes_it_holds(loaded, monkeypatch):
    monkeypatch.setattr("mosaics.serving.memories.held_bytes", held_bytes)
    model = loaded[0]
    cache = read_context(model, torch.arange(3, 203)[None], chunk=50)
    release(cache)
    per_token = model.describe(300)["state_bytes"] - model.describe(299)["state_bytes"]
    assert per_token * 200 <= Kept("a", cache, 200).bytes < per_token * 200 + 20000
