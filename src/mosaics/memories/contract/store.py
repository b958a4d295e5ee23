"""Pairs of documents that were read before, which no call changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mosaics.memories.contract.context import Context, Read
from mosaics.memories.contract.pairs import Pairs, readable_pairs
from mosaics.memories.contract.state import State
from mosaics.ops.kernel_regression import Bandwidth, Narrow, Reach
from mosaics.ops.kernel_regression.united import united_regression, united_weights


@dataclass
class Store(State):
    """A fixed set of key-value pairs that every row reads whole: those of documents, each read from its beginning.

    Attributes:
        keys: `(1, heads, slots, width)`.
        values: `(1, heads, slots, value width)`.
        key_scales: `(1, heads, slots, 1)` in float32, what 8 bits are multiples of; else None.
        value_scales: the same for the values.
        sizes: `(slots,)`, integers, how many pairs each slot stands for; None: one each.
        offsets: `(1, heads, slots, 1)`, what is added to the product of each key with a query; None: nothing.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    sizes: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def of(cls, pairs: Pairs) -> Store:
        """The complete pairs of one row: all that are kept but the newest."""
        begin, end = pairs.used - pairs.kept, pairs.used - 1
        names = ("keys", "values", "key_scales", "value_scales")
        found = {name: getattr(pairs, name) for name in names}
        return cls(**{name: None if x is None else x[:, :, begin:end].detach().clone() for name, x in found.items()})

    @classmethod
    def united(cls, stores: Sequence[Store]) -> Store:
        """One store with the pairs of all, in that order.

        Raises:
            ValueError: there is none, or they are kept in different dtypes.
        """
        kinds = {tuple(None if x is None else x.dtype for x in vars(store).values()) for store in stores}
        if len(kinds) != 1:
            raise ValueError(f"Pairs of {len(kinds)} kinds can't be one store; read all in one dtype.")
        columns = zip(*(vars(store).values() for store in stores), strict=True)
        return cls(*(None if x[0] is None else torch.cat(x, dim=2 if x[0].dim() == 4 else 0) for x in columns))

    def pairs(self, computed: torch.dtype) -> tuple[Tensor | Narrow, Tensor | Narrow]:
        """Keys and values as they are read in a pass in the dtype `computed`."""
        stored = {name: x for name, x in vars(self).items() if x is not None}
        return readable_pairs(stored, computed)

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
        """What a memory answers from its own pairs and these, as `united_regression`; the pass's context takes what was
        read, under the memory's name and layer."""
        store_keys, store_values = self.pairs(queries.dtype)
        more = dict(sizes=self.sizes, offsets=self.offsets)
        if context.reads is not None:
            show_beside(context, whose, *united_weights(queries, keys, store_keys, bandwidth, reach, **more))
        pairs = keys, values, store_keys, store_values
        return united_regression(queries, *pairs, bandwidth, reach, dropout=dropout, **more)


def show_beside(context: Context, whose: tuple[str, int], own: Tensor, others: Tensor) -> None:
    """Show weights of a memory's own pairs and of those of a store beside them."""
    for weights, of_store in ((own, False), (others, True)):
        rows, slots = partial(_rows, weights), weights.shape[-1]
        context.reads.append(Read(*whose, rows, slots, contextual=not of_store, from_store=of_store))


def _rows(weights: Tensor, positions: slice) -> tuple[Tensor, int]:
    """What a `Read` shows of weights that are made."""
    return weights[:, :, positions], 0
