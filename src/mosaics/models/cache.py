"""The states of a mosaic inside transformers' caches: the only file that knows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from mosaics.memories import Rows, Stack, StackState, State
from mosaics.memories.stack import BlockState


class MosaicCacheLayer(DynamicLayer):
    """The states of one block's memories; the first block's layer also holds what all memories share about the rows,
    and the state of the memory around the blocks."""

    _layer_type = "mosaic"
    is_croppable = False  # the recurrence of the keys cannot be run backwards

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.state: BlockState | None = None
        self.rows: Rows | None = None
        self.around: State | None = None
        self.kinds: list[list[str]] = []  # of the memories of all blocks
        self.positions = 0

    def held(self) -> list[State]:
        """The states that there are."""
        return [state for state in (self.state, self.rows, self.around) if state is not None]

    def get_seq_length(self) -> int:
        """Positions seen so far, padding included, as transformers counts them."""
        return self.positions

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Refused: a mosaic keeps the states of memories, not keys and values of attention."""
        raise ValueError("This cache belongs to a mosaic; make a new cache for another model.")

    def reset(self) -> None:
        self.state = self.rows = self.around = None
        self.positions, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for state in self.held():
            state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        indices = torch.as_tensor(indices)
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        for state in self.held():
            state.select(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless nothing is to be removed."""
        if tokens_to_remove:
            raise ValueError("A mosaic cannot forget its newest tokens; keep a copy of the cache and go back to it.")

    def offload(self) -> None:
        raise ValueError("A mosaic's cache cannot be offloaded yet; leave out cache_implementation='offloaded'.")


class MosaicStaticCacheLayer(MosaicCacheLayer, StaticLayer):
    """The same in a room for `max_cache_len` positions: no shape in it depends on how many were read, and the positions
    seen are a tensor, so that a graph of one pass serves all that follow. `generate` does not compile it by itself."""

    is_compileable = False

    def get_max_length(self) -> int:
        """Positions that there is room for."""
        return self.max_cache_len


def open_cache(
    cache: Cache, stack: Stack, batch: int | None = None, time: int = 0
) -> tuple[StackState, Rows | None, int | Tensor]:
    """The state that a cache holds for `stack`, what is known about its rows, and the positions seen.

    Args:
        cache: transformers' dynamic or static cache.
        stack: of the model.
        batch: the rows that are to go on; None: as many as there are, of a dynamic cache.
        time: the positions that are to come.

    Raises:
        ValueError: the cache is of a kind that cannot hold the states of memories, belongs to another model, holds
            other rows, or has no room.
    """
    if type(cache) not in ((DynamicCache,) if batch is None else (DynamicCache, StaticCache)) or cache.offloading:
        kind = "an offloaded" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
        raise ValueError(f"A mosaic cannot use {kind} cache here; pass DynamicCache(config=model.config), or none.")
    if cache.layer_class_to_replicate is not None and not cache.layers:
        cache.layers.extend(MosaicCacheLayer() for _ in stack.blocks)
    # By its name, as transformers finds it: that of the package and those of exported models do one another's work.
    kinds, memories = {getattr(layer, "_layer_type", None) for layer in cache.layers}, stack.kinds()
    if kinds != {MosaicCacheLayer._layer_type} or len(cache.layers) != len(stack.blocks):
        raise ValueError("The cache belongs to another model; pass DynamicCache(config=model.config), or none.")
    if any(layer.state is not None and layer.kinds != memories for layer in cache.layers):
        raise ValueError("The cache was made by other memories than the model has; start with a new one.")
    held = next((state.batch for layer in cache.layers for state in layer.held() if state.batch is not None), batch)
    if batch is not None and held != batch:
        raise ValueError(f"The cache holds {held} rows and the input has {batch}; give as many.")
    first = cache.layers[0]
    # By the base that all share: the layer may be of an exported model's code.
    if isinstance(first, StaticLayer) and not torch.compiler.is_compiling():
        if int(first.positions) + time > first.max_cache_len:
            raise ValueError(
                f"The static cache has room for {first.max_cache_len} positions, and {int(first.positions)} and {time} "
                "more are too many; make it with a larger max_cache_len."
            )
    if first.state is not None:
        around = getattr(first, "around", None)  # the layer may be of code that knows none
        return StackState([layer.state for layer in cache.layers], around), first.rows, first.positions
    state = stack.initial_state()
    state = state.reserved(first.max_cache_len) if isinstance(first, StaticLayer) else state
    return state, first.rows, first.positions


def close_cache(cache: Cache, stack: Stack, state: StackState, rows: Rows, positions: int) -> None:
    """Put back what `open_cache` gave, after a pass over `positions` more positions."""
    first = cache.layers[0]
    if isinstance(first, StaticLayer):
        positions = torch.tensor(positions, device=next(stack.parameters()).device)
        if rows.tokens is None and (batch := state.batch) is not None:
            rows = Rows(positions.expand(batch).clone(), rows.document)  # counted from now on, whatever comes
    first.rows, first.around = rows, state.around
    kinds = stack.kinds()
    for layer, block_state in zip(cache.layers, state.blocks, strict=True):
        layer.state, layer.is_initialized, layer.kinds = block_state, True, kinds
        layer.positions += positions


def fill_cache(cache: Cache, stack: Stack, state: StackState) -> None:
    """Put states from before the first token into an empty cache."""
    cache.layers[0].around = state.around
    for layer, block_state in zip(cache.layers, state.blocks, strict=True):
        layer.state, layer.is_initialized = block_state, True
        layer.kinds = stack.kinds()


def join_caches(caches: Sequence[Cache], stack: Stack) -> DynamicCache:
    """A new cache with the rows of all, in that order; they stay as they are. Of one cache: a copy.

    Contexts may differ in length: a shorter one is as if it were padded on the left.

    Args:
        caches: of the same model.
        stack: of that model.

    Raises:
        ValueError: a cache is of a kind that cannot hold the states of memories, or the states can't be joined.
    """
    states, rows, positions = zip(*(open_cache(cache, stack) for cache in caches), strict=True)
    batches, known = [state.batch for state in states], [r or Rows() for r in rows]
    if None in batches:
        raise ValueError("A cache that has seen no token has no rows to join; leave it out.")
    after = Rows()
    if len(set(positions)) > 1 or any(r.tokens is not None for r in known):
        after.tokens = _rows([r.tokens for r in known], positions, batches)
    if any(r.document is not None for r in known):
        after.document = _rows([r.document for r in known], [0] * len(known), batches)
    cache = DynamicCache()
    open_cache(cache, stack)
    close_cache(cache, stack, states[0].join(states[1:]), after, max(positions))
    return cache


def _rows(numbers: Sequence[Tensor | None], otherwise: Sequence[int], batches: Sequence[int]) -> Tensor:
    """One number a row of several caches, `(rows,)`; `otherwise` for the rows of a cache that has none."""
    device = next((x.device for x in numbers if x is not None), None)
    filled = (torch.full((b,), n, device=device) for n, b in zip(otherwise, batches, strict=True))
    return torch.cat([x if x is not None else f for x, f in zip(numbers, filled, strict=True)])


def held_bytes(cache: Cache) -> int:
    """Bytes of the tensors that a mosaic's cache holds, room to grow into included."""
    parts = [part for layer in cache.layers for state in layer.held() for part in state.parts()]
    return sum(x.nbytes for part in parts for x in vars(part).values() if isinstance(x, Tensor))


def release(cache: Cache) -> None:
    """Let go of the room to grow into that a mosaic's cache holds."""
    for layer in cache.layers:
        for state in layer.held():
            for part in state.parts():
                part.release()
