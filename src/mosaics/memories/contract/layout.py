"""What each position of a call is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mosaics.memories.contract.state import Rows
from mosaics.ops import may_be


@dataclass(frozen=True)
class Layout:
    """What each position of a call is. Rows are compact: real tokens first, padding (if any) at the end.

    `Layout.of` makes it from a mask with padding anywhere, together with the order that compacts a row, so that no
    memory meets padding between tokens. A document begins wherever the id changes.

    Attributes:
        batch: the number of rows.
        time: the number of positions.
        start: `(batch, time)`, where the document of each position begins, counted from the first position of this call
            (negative for a document that an earlier call opened); None when every row is one document, opened at the
            first stored pair.
        length: `(batch,)`, the real tokens of each row; None when there is no padding.
        stored: the positions of earlier calls.
    """

    batch: int
    time: int
    start: Tensor | None = None
    length: Tensor | None = None
    stored: int = 0
    made: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # `Segments` by size

    @classmethod
    def of(
        cls,
        batch: int,
        time: int,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        rows: Rows | None = None,
        stored: int = 0,
    ) -> tuple[Layout, Tensor | None, Rows]:
        """The layout of a call, the order that compacts its rows, and what the next call has to know.

        Where a graph is made, nothing is asked of the tensors: rows that are given a mask count as padded, and those
        that are given ids as of several documents.

        Args:
            batch: the number of rows.
            time: the number of positions.
            attention_mask: `(batch, time)`, true (or 1) for real tokens; None: all are real.
            document_ids: `(batch, time)`; None: the open document goes on.
            rows: what the call before returned; None for the first.
            stored: the positions of earlier calls.

        Returns:
            The layout; `(batch, time)` positions in compact order, or None if they are so already; the rows.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is not None and not may_be(lambda: ~mask.all()):
            mask = None
        order, length = None, None
        if mask is not None:
            length = mask.sum(1)
            if time > 1 and may_be(lambda: (mask[:, 1:] & ~mask[:, :-1]).any()):
                order = torch.argsort(~mask, dim=1, stable=True)
        rows = rows or Rows()
        fresh = rows.tokens is None and stored == 0
        if length is None and document_ids is None and rows.tokens is None:
            return cls(batch, time, stored=stored), None, rows

        device = next(x.device for x in (length, document_ids, rows.tokens) if x is not None)
        position = torch.arange(time, device=device).expand(batch, time)
        tokens = position.new_full((batch,), stored) if rows.tokens is None else rows.tokens
        document = rows.document
        border = torch.zeros(batch, time, dtype=torch.bool, device=device)
        if document_ids is not None:
            ids = document_ids if order is None else document_ids.gather(1, order)
            before = torch.zeros_like(ids[:, 0]) if document is None else document
            border = ids != torch.cat([before[:, None].to(ids), ids], dim=1)[:, :-1]
        border[:, 0] |= fresh
        if length is not None:
            border &= position < length[:, None]
        start = torch.where(border, position, -tokens[:, None]).cummax(1).values
        whole = fresh and (document_ids is None or not may_be(lambda: border[:, 1:].any()))
        if whole and length is None:
            return cls(batch, time), None, Rows(None, document if document_ids is None else ids[:, -1])

        last = position[:, -1] if length is None else length - 1
        seen = last.clamp(min=0)[:, None]
        rows = Rows(
            last + 1 - start.gather(1, seen)[:, 0],
            document if document_ids is None else torch.where(last >= 0, ids.gather(1, seen)[:, 0], before.to(ids)),
        )
        return cls(batch, time, None if whole else start, length, stored), order, rows

    @property
    def is_first(self) -> Tensor | None:
        """`(batch, time)`, whether a position begins a document; None when only the first of a fresh row may."""
        return None if self.start is None else self.start == torch.arange(self.time, device=self.start.device)

    @property
    def is_padding(self) -> Tensor | None:
        """`(batch, time)`, whether a position is padding; None when none is."""
        return (
            None if self.length is None else torch.arange(self.time, device=self.length.device) >= self.length[:, None]
        )

    def segments(self, size: int, device: torch.device) -> Segments:
        """The positions of the call in segments of `size` tokens of their document, made once for all layers."""
        if torch.compiler.is_compiling():
            return Segments.of(self, size, device)
        if size not in self.made:
            self.made[size] = Segments.of(self, size, device)
        return self.made[size]

    def calls(self, size: int, device: torch.device) -> Iterator[tuple[Layout, Tensor]]:
        """The call as calls of one segment of `size` tokens each, in order, for memories that have to store a segment
        before they answer the next: their layouts, and which position of this call each of theirs is, `(batch, their
        time)`; `time` at padding. They are compact; a row may have no token in some."""
        segments, own = self.segments(size, device), self.position(device).expand(self.batch, self.time)
        filled = segments.filled
        length, first = filled.sum(-1), filled.long().argmax(-1, keepdim=True)
        for number, lengths in enumerate(length.T.tolist()):
            time = max([1, *lengths])
            place = torch.arange(time, device=device)
            index = segments.source[:, number].gather(1, (first[:, number] + place).clamp(max=size - 1))
            index = index.masked_fill(place >= length[:, number, None], self.time)
            start = -own.gather(1, index[:, :1].clamp(max=self.time - 1)).expand(-1, time)
            whole = min(lengths, default=time) == time
            yield Layout(self.batch, time, start, None if whole else length[:, number], self.stored), index

    def subset(self, chosen: Tensor, tokens: Tensor | None = None) -> Subset:
        """Some positions of the call as rows of their own, for memories that see only what is routed to them.

        Args:
            chosen: `(batch, sets, time)`, booleans, whether a position is in a set; padding is in none.
            tokens: `(batch, sets)`, how many of each row's open document earlier calls had in each set: `tokens` of
                the subset before; None: no token.
        """
        return Subset.of(self, chosen, tokens)

    def position(self, device: torch.device) -> Tensor:
        """`(batch or 1, time)`, how many tokens of its document come before each position."""
        own = torch.arange(self.time, device=device)
        return (own + self.stored)[None] if self.start is None else own - self.start

    def align(self, x: Tensor) -> Tensor:
        """Shift each row of `x` `(batch, ..., slots, width)` right until its last real position is the last slot."""
        if self.length is None:
            return x
        slots = x.shape[-2]
        source = (torch.arange(slots, device=x.device) - (self.time - self.length)[:, None]) % slots
        source = source.view(self.batch, *[1] * (x.dim() - 3), slots, 1).expand(x.shape)
        return x.gather(-2, source)


@dataclass(frozen=True)
class Segments:
    """Tokens of a call in segments of their document, for what is defined by chunks: however a sequence is cut, packed
    or padded, a token lies at the same place of the same segment.

    The segments of a row count from 0 in the order of the call; the first may be one that an earlier call opened.

    Attributes:
        size: tokens of a segment.
        count: the most segments that a row has.
        position: `(batch, time)`, the place of each token in its segment, from 0.
        index: `(batch, time)`, the number of its segment; that of padding is the last one's.
        source: `(batch, count, size)`, which position of the call lies there; `time` where none does.
        opens: `(batch, count)`, whether a segment begins in this call.
        begins: `(batch, count)`, whether a segment is the first of its document.
    """

    size: int
    count: int
    position: Tensor
    index: Tensor
    source: Tensor
    opens: Tensor
    begins: Tensor

    @classmethod
    def of(cls, layout: Layout, size: int, device: torch.device) -> Segments:
        """The segments of a layout.

        Raises:
            ValueError: the size is below 1.
        """
        if size < 1:
            raise ValueError(f"A segment of {size} tokens is none; give at least 1.")
        batch, time, padding = layout.batch, layout.time, layout.is_padding
        own = layout.position(device).expand(batch, time)
        position = own % size
        new = position == 0 if padding is None else (position == 0) & ~padding
        index = new.cumsum(1) - new[:, :1].long()  # the first may be of an earlier call
        count = int(index[:, -1].max()) + 1 if batch else 1
        place = index * size + position
        if padding is not None:
            place = place.masked_fill(padding, count * size)  # a place that is dropped
        source = torch.full((batch, count * size + 1), time, device=device)
        source.scatter_(1, place, torch.arange(time, device=device).expand(batch, time))
        source = source[:, :-1].view(batch, count, size)
        opens = source[..., 0] < time
        begins = opens & (own.gather(1, source[..., 0].clamp(max=time - 1)) == 0)
        return cls(size, count, position, index, source, opens, begins)

    @property
    def filled(self) -> Tensor:
        """`(batch, count, size)`, where tokens of this call lie."""
        return self.source < self.position.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """`x` `(batch, time, ...)` as `(batch, count, size, ...)`, 0 where no token of this call lies."""
        batch, _, *rest = x.shape
        padded = torch.cat([x, x.new_zeros(batch, 1, *rest)], dim=1)
        index = self.source.view(batch, self.count * self.size, *[1] * len(rest)).expand(-1, -1, *rest)
        return padded.gather(1, index).unflatten(1, (self.count, self.size))

    def scatter(self, y: Tensor) -> Tensor:
        """`y` `(batch, count, size, ...)` back as `(batch, time, ...)`; at padding it means nothing."""
        batch, _, _, *rest = y.shape
        place = (self.index * self.size + self.position).view(*self.position.shape, *[1] * len(rest))
        return y.flatten(1, 2).gather(1, place.expand(-1, -1, *rest))


@dataclass(frozen=True)
class Subset:
    """Positions of a call in one or several sets, each of them a row of its own whose documents have only the tokens
    that are in it. However a sequence is cut, packed or padded, a set has the same tokens in the same order.

    All rows are as long as the longest, `count`: that many tokens are computed for each, and the host waits to know it.

    Attributes:
        layout: of `batch * sets` rows of `count` positions, the sets of a row next to each other.
        source: `(batch, sets, count)`, which position of the call lies there; `time` where none does.
        rank: `(batch, sets, time)`, how many positions of the call before each are in the set.
        tokens: `(batch, sets)`, how many tokens of each row's open document are in each set, for the next call.
    """

    layout: Layout
    source: Tensor
    rank: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, layout: Layout, chosen: Tensor, tokens: Tensor | None = None) -> Subset:
        """As `Layout.subset`."""
        batch, sets, time = chosen.shape
        if (padding := layout.is_padding) is not None:
            chosen = chosen & ~padding[:, None]
        rank, length = chosen.cumsum(2) - chosen.long(), chosen.sum(2)
        count = max(1, int(length.max())) if length.numel() else 1
        position = torch.arange(time, device=chosen.device).expand(batch, sets, time)
        source = torch.full((batch, sets, count + 1), time, device=chosen.device)
        source = source.scatter_(2, rank.masked_fill(~chosen, count), position)[..., :-1]
        tokens = length.new_zeros(batch, sets) if tokens is None else tokens
        opened = position.new_full((batch, time), -layout.stored) if layout.start is None else layout.start
        opened = opened[:, None].expand(batch, sets, time)
        start = torch.where(opened < 0, -tokens[..., None], rank.gather(2, opened.clamp(min=0)))
        last = position[:, 0, -1:] if layout.length is None else (layout.length[:, None] - 1).clamp(min=0)
        after = length - start.gather(2, last[:, None].expand(batch, sets, 1))[..., 0]
        inner = None
        if layout.start is not None or layout.stored:  # what fills up a row belongs to the document before
            inner = torch.cat([start, -tokens[..., None]], dim=2).gather(2, source).cummax(2).values.flatten(0, 1)
        rows = Layout(batch * sets, count, inner, length.flatten(), layout.stored)
        return cls(rows, source, rank, after)

    def gather(self, x: Tensor) -> Tensor:
        """`x` `(batch, time, ...)` as `(batch, sets, count, ...)`, 0 where no position lies."""
        batch, _, *rest = x.shape
        padded = torch.cat([x, x.new_zeros(batch, 1, *rest)], dim=1)
        index = self.source.flatten(1)
        index = index.view(*index.shape, *[1] * len(rest)).expand(-1, -1, *rest)
        return padded.gather(1, index).unflatten(1, self.source.shape[1:])

    def at(self, y: Tensor, which: Tensor) -> Tensor:
        """Of `y` `(batch, sets, count, ...)` what belongs to each position: `(batch, time, k, ...)` of the sets `which`
        `(batch, time, k)`. Where a position is not in the set it means nothing."""
        count, rest = y.shape[2], y.shape[3:]
        rank = self.rank.transpose(1, 2).gather(2, which).clamp(max=count - 1)
        index = (which * count + rank).flatten(1)
        index = index.view(*index.shape, *[1] * len(rest)).expand(-1, -1, *rest)
        return y.flatten(1, 2).gather(1, index).unflatten(1, which.shape[1:])
