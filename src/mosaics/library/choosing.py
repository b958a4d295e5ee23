"""Documents of which a read takes those alone that can matter to it, as far as a sketch of their keys proves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mosaics.memories import Context, State
from mosaics.memories.contract import Store
from mosaics.memories.contract.store import show_beside
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach
from mosaics.ops.kernel_regression.choosing import largest_shares, needed
from mosaics.ops.kernel_regression.sketch import sketch_of
from mosaics.ops.kernel_regression.united import united_regression, united_weights


def sketch_of_store(store: Store, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is kept of a document's keys to choose by: `data`, `scale` and `radius` of a `BoundedStore`.

    Args:
        store: all pairs of the document.
        dtype: of the model.
    """
    keys, _ = store.pairs(torch.promote_types(dtype, torch.float32))
    data, scale, radius = sketch_of(keys.widened() if isinstance(keys, Narrow) else keys)
    return {"data": data, "scale": scale, "radius": radius.amax(2, keepdim=True)}


@dataclass
class BoundedStore(State):
    """Documents in the place of their `Store`. Each read fetches the pairs of those that `needed` names.

    Attributes:
        data: `(1, heads, slots, width)`, int8, of all keys of all documents.
        scale: `(1, heads, slots, 1)`.
        radius: `(1, heads, documents, 1)`.
        sizes: `(documents,)`, integers, the pairs of each.
        tolerance: the largest error of what is read at a position, as a share of the length of the longest value.
        fetch: gives the pairs of each document.
    """

    data: Tensor
    scale: Tensor
    radius: Tensor
    sizes: Tensor
    tolerance: float
    fetch: tuple[Callable[[], Store], ...]
    _last: dict[tuple[int, ...], Store] = field(default_factory=dict)  # what was read last, as one

    @classmethod
    def of(cls, sketch: Mapping[str, Tensor], tolerance: float, fetch: Callable[[], Store]) -> BoundedStore:
        """One document, of which `sketch_of_store` gave the sketch."""
        return cls(**sketch, sizes=torch.tensor([sketch["data"].shape[2]]), tolerance=tolerance, fetch=(fetch,))

    @classmethod
    def united(cls, stores: Sequence[BoundedStore]) -> BoundedStore:
        """The documents of all, in that order."""
        parts = {name: torch.cat([getattr(s, name) for s in stores], dim=2) for name in ("data", "scale", "radius")}
        fetch = tuple(one for store in stores for one in store.fetch)
        return cls(**parts, sizes=torch.cat([s.sizes for s in stores]), tolerance=stores[0].tolerance, fetch=fetch)

    def read_beside(
        self,
        queries: Tensor,
        keys: Tensor | Narrow,
        values: Tensor | Narrow,
        bandwidth: Bandwidth,
        reach: Reach,
        context: Context,
        whose: tuple[str, int],
        dropout: float = 0.0,
    ) -> Tensor:
        """As that of a `Store`; the weight of a document that was left out is 0."""
        bounds = self.data, self.scale, self.radius, self.sizes
        chosen = needed(largest_shares(queries, keys, values, *bounds, bandwidth, reach), self.tolerance)
        store_keys, store_values = self._pairs(tuple(chosen), queries, values)
        total = self.data.shape[2]
        if context.reads is not None:
            own, of_store = united_weights(queries, keys, store_keys, bandwidth, reach, total=total)
            is_read = torch.zeros(len(self.sizes), dtype=torch.bool).index_fill_(0, torch.tensor(chosen).long(), True)
            others = of_store.new_zeros(*of_store.shape[:3], total)
            others[..., is_read.repeat_interleave(self.sizes)] = of_store
            show_beside(context, whose, own, others)
        pairs = keys, values, store_keys, store_values
        return united_regression(queries, *pairs, bandwidth, reach, dropout=dropout, total=total)

    def _pairs(self, chosen: tuple[int, ...], queries: Tensor, values: Tensor | Narrow) -> tuple[Any, Any]:
        if not chosen:
            heads, width, value_width = queries.shape[1], queries.shape[3], values.shape[3]
            return queries.new_empty(1, heads, 0, width), queries.new_empty(1, heads, 0, value_width)
        if chosen not in self._last:
            self._last.clear()
            self._last[chosen] = Store.united([self.fetch[i]() for i in chosen])
        return self._last[chosen].pairs(queries.dtype)
