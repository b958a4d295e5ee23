"""Stored key-value pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.memories.contract.layout import Layout
from mosaics.memories.contract.state import State, growing
from mosaics.ops.kernel_regression import Narrow, widened

STATE_DTYPES = ("bfloat16", "int8")


@dataclass
class Pairs(State):
    """Key-value pairs in buffers that grow by half, so that storing one more costs the same however many there are.

    The rows are aligned on the right: the newest pair of every row lies in the last slot. With a `dtype` the pairs are
    rounded when they come, and what is read are the rounded ones, also within the call that brings them: so the answer
    does not depend on how a sequence is cut.

    Attributes:
        keys: `(batch, heads, capacity, width)`.
        values: `(batch, heads, capacity, value width)`; the newest pair's value is not known yet.
        key_scales: `(batch, heads, capacity, 1)` in float32, what 8 bits are multiples of; else None.
        value_scales: the same for the values.
        used: slots written.
        limit: how many of the newest slots are kept; None keeps all.
        dtype: in which pairs are kept, one of `STATE_DTYPES`; None: as they come.
    """

    keys: Tensor | None = growing(2)
    values: Tensor | None = growing(2)
    key_scales: Tensor | None = growing(2)
    value_scales: Tensor | None = growing(2)
    used: int = 0
    limit: int | None = None
    dtype: str | None = None
    sketched: ClassVar[type[Pairs] | None] = None  # `SketchedPairs`, which does not go with exported code

    @property
    def kept(self) -> int:
        """Slots that can be read still."""
        return self.used if self.limit is None else min(self.used, self.limit)

    @property
    def stored(self) -> None:
        """Where in what `append` returned the pairs of its call begin, for a `Reach`: they end with it."""

    def reserved(self, capacity: int) -> FixedPairs:
        return FixedPairs(room=capacity, limit=self.limit, dtype=self.dtype)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor | Narrow, Tensor | Narrow]:
        """Store `keys` `(batch, heads, time, width)` and return all pairs that are kept, these included.

        `values` may have more entries at the front: they replace those of the newest pairs stored before.
        """
        kept, time, computed = self.kept, keys.shape[2], keys.dtype
        total = kept + time
        keys, values, new = _rounded(keys, values, self.dtype)
        if kept == 0:
            for name, x in new.items():
                setattr(self, name, x)
            self.used = time
            return widened(keys), widened(values)  # nothing older: they are all at hand
        begin = self.used - kept
        needs_graph = any(x.requires_grad for x in (*new.values(), self.keys, self.values))
        if torch.is_grad_enabled() and needs_graph:
            for name, x in new.items():
                older = getattr(self, name)[:, :, begin : begin + total - x.shape[2]]
                setattr(self, name, torch.cat([older, x], dim=2))
            self.used, begin = total, 0
        else:
            self.make_room(time)
            begin = self.used - kept
            self.used += time
            for name, x in new.items():
                getattr(self, name)[:, :, self.used - x.shape[2] : self.used] = x
        return readable_pairs({name: getattr(self, name)[:, :, begin : self.used] for name in new}, computed)

    def make_room(self, time: int) -> None:
        """Let the next `time` pairs have slots that can be written to."""
        foreign = self.keys.is_inference() and not torch.is_inference_mode_enabled()  # not to be written to
        if foreign or self.used + time > self.keys.shape[2]:
            kept, total = self.kept, self.kept + time
            for name in ("keys", "values", "key_scales", "value_scales"):
                if (x := getattr(self, name)) is not None:
                    x = x[:, :, self.used - kept : self.used]
                    setattr(self, name, _grown(x, total + max(total // 2, 64)))
            self.used = kept

    def settle(self, layout: Layout) -> None:
        """After a call was answered: align the rows again if they had padding, and let go of what is out of reach."""
        if layout.length is not None:
            self.map(lambda x: layout.align(x[:, :, : self.used]))
        if self.limit is not None and self.used > 4 * self.limit + 64:
            self.release()

    def adopt(self, other: Pairs) -> None:
        if other.dtype not in (None, *STATE_DTYPES):
            raise TypeError("dtype")
        self.dtype = other.dtype

    def check(self) -> None:
        for name in ("keys", "values", "key_scales", "value_scales"):
            stored = getattr(self, name)
            if stored is not None and (stored.dim() != 4 or stored.shape[2] < self.used):
                raise TypeError(name)
        if self.used and (self.keys is None or self.values is None):
            raise TypeError("used")

    def join(self, others: Sequence[State]) -> State:
        """As `State.join`; in front of the pairs of a row that has fewer than others are slots of zeros."""
        states = [self, *others]
        if self.keys is None or any(s.keys is None or (s.limit, s.dtype) != (self.limit, self.dtype) for s in states):
            return super().join(others)  # refused, unless none has pairs
        names = [name for name, x in vars(self).items() if isinstance(x, Tensor)]
        used = max(s.kept for s in states)
        joined = dataclasses.replace(self, used=used)
        for name in names:
            own = [getattr(s, name)[:, :, s.used - s.kept : s.used] for s in states]
            rows, room = sum(x.shape[0] for x in own), used + max(used // 2, 64)
            buffer, end = own[0].new_zeros(rows, own[0].shape[1], room, own[0].shape[3]), 0
            for x in own:
                begin, end = end, end + x.shape[0]
                buffer[begin:end, :, used - x.shape[2] : used] = x
            setattr(joined, name, buffer)
        return joined

    def release(self) -> None:
        kept = self.kept
        if kept and self.keys.shape[2] > kept:
            self.map(lambda x: x[:, :, self.used - kept : self.used].clone())
            self.used = kept


@dataclass
class FixedPairs(State):
    """Key-value pairs in buffers of one size, for graphs that are made once: how much of them is filled is a tensor.

    The rows are aligned on the left, each with a fill of its own, and what follows the fill means nothing. The buffers
    are made by the first call, of the kind that it brings, and changed in place unless gradients are wanted.

    Attributes:
        keys: `(batch, heads, slots, width)`; as many slots as the room has, or as are kept if these are fewer.
        values: `(batch, heads, slots, value width)`; the newest pair's value is not known yet.
        key_scales: `(batch, heads, slots, 1)` in float32, what 8 bits are multiples of; else None.
        value_scales: the same for the values.
        fill: `(batch,)`, the pairs of each row.
        stored: `(batch,)`, in a call the fill before it: where in what `append` returned its pairs begin; None in the
            first, whose pairs are all there is.
        room: tokens that may be read.
        limit: how many of the newest pairs are kept; None keeps all.
        dtype: in which pairs are kept, one of `STATE_DTYPES`; None: as they come.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    fill: Tensor | None = None
    stored: Tensor | None = None
    room: int = 0
    limit: int | None = None
    dtype: str | None = None

    @property
    def slots(self) -> int:
        """The slots of the buffers between calls."""
        return self.room if self.limit is None else min(self.room, self.limit)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor | Narrow, Tensor | Narrow]:
        """As `Pairs.append`; within the call there is room for its pairs beside those that are kept.

        Raises:
            ValueError: the first call alone has more pairs than there is room for.
        """
        time, computed = keys.shape[2], keys.dtype
        keys, values, new = _rounded(keys, values, self.dtype)
        if self.fill is None:
            if time > self.room:
                raise ValueError(f"There is room for {self.room} tokens and {time} came; reserve more.")
            for name, x in new.items():
                setattr(self, name, F.pad(x, (0, 0, 0, max(self.slots - time, 0))))
            self.fill = torch.zeros(keys.shape[0], dtype=torch.int64, device=self.keys.device)
            return widened(keys), widened(values)
        self.stored, own = self.fill, self.fill[:, None] + torch.arange(time, device=self.fill.device)
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (*new.values(), self.keys, self.values))
        for name, x in new.items():
            buffer = getattr(self, name)
            if self.slots < self.room:
                buffer = F.pad(buffer, (0, 0, 0, time))
            elif not torch.compiler.is_compiling() and buffer.is_inference() and not torch.is_inference_mode_enabled():
                buffer = buffer.clone()  # not to be written to
            # What completes older pairs first: where a row has none, the next overwrites it.
            for part, begin in ((x[:, :, :-time], -1), (x[:, :, -time:], 0)):
                if count := part.shape[2]:
                    slots = (own[:, :count] + begin * count).clamp(min=0)[:, None, :, None].expand(part.shape)
                    buffer = buffer.scatter(2, slots, part) if wanted else buffer.scatter_(2, slots, part)
            setattr(self, name, buffer)
        return readable_pairs({name: getattr(self, name) for name in new}, computed)

    def settle(self, layout: Layout) -> None:
        """After a call was answered: count what was real of it, and let go of what is out of reach."""
        total = self.fill + (layout.time if layout.length is None else layout.length)
        if self.slots < self.room and self.keys.shape[2] > self.slots:
            gone = (total - self.slots).clamp(min=0)
            kept = (gone[:, None] + torch.arange(self.slots, device=gone.device))[:, None, :, None]
            for name in ("keys", "values", "key_scales", "value_scales"):
                if (x := getattr(self, name)) is not None:
                    setattr(self, name, x.gather(2, kept.expand(*x.shape[:2], self.slots, x.shape[3])))
            total = total - gone
        self.fill, self.stored = total, None


def _rounded(keys: Tensor, values: Tensor, dtype: str | None) -> tuple[Any, Any, dict[str, Tensor]]:
    """Keys and values as they are kept, and their parts by the names of the buffers."""
    if dtype is None or getattr(torch, dtype) == keys.dtype:
        return keys, values, {"keys": keys, "values": values}
    keys, values = (Narrow.of(x, getattr(torch, dtype)) for x in (keys, values))
    new = {"keys": keys.data, "values": values.data}
    if keys.scale is not None:
        new |= {"key_scales": keys.scale, "value_scales": values.scale}
    return keys, values, new


def readable_pairs(stored: dict[str, Tensor], computed: torch.dtype) -> tuple[Tensor | Narrow, Tensor | Narrow]:
    """What buffers hold, as it is read in a pass in the dtype `computed`."""
    if stored["keys"].dtype == computed:
        return stored["keys"], stored["values"]
    return (
        Narrow(stored["keys"], stored.get("key_scales"), computed),
        Narrow(stored["values"], stored.get("value_scales"), computed),
    )


def _grown(x: Tensor, capacity: int) -> Tensor:
    buffer = x.new_empty(*x.shape[:2], capacity, x.shape[3])  # what is not used takes no room until it is
    buffer[:, :, : x.shape[2]] = x
    return buffer


def check_tolerance(value: Any) -> None:
    """Raises `ValueError` if `value` is no share of the length of a value, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1):
        raise ValueError(f"read_tolerance is {value!r}; give a number above 0 and below 1, or leave it out.")


def check_state_dtype(name: Any) -> None:
    """Raises `ValueError` if `name` is neither one of `STATE_DTYPES` nor None."""
    if name is not None and name not in STATE_DTYPES:
        raise ValueError(f"state_dtype is {name!r}; choose {' or '.join(STATE_DTYPES)}, or leave it out.")
