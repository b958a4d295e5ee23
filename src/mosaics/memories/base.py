"""The contract of a memory, the registry of memories, the layout of a batch, and what passes between calls."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from mosaics.ops.kernel_regression import Narrow, widened

STATE_DTYPES = ("bfloat16", "int8")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, or all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(valid)}."


class State:
    """Base of the dataclasses that a memory carries from call to call: tensors (batch first), states, plain values."""

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor in the state, however deep, by `function` of it."""
        for f in dataclasses.fields(self):
            setattr(self, f.name, _mapped(getattr(self, f.name), function))

    def parts(self) -> Iterator[State]:
        """This state and all that are in it, however deep."""
        yield self
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, State):
                    yield from part.parts()

    @property
    def batch(self) -> int | None:
        """The rows; None where there is no tensor yet."""
        held = (x for part in self.parts() for x in vars(part).values() if isinstance(x, Tensor))
        return next((x.shape[0] for x in held), None)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order; a row may be kept more than once."""
        self.map(lambda x: x.index_select(0, rows.to(x.device)))

    def repeat(self, times: int) -> None:
        """Repeat every row `times` times, next to each other."""
        self.map(lambda x: x.repeat_interleave(times, dim=0))

    def join(self, others: Sequence[State]) -> State:
        """A new state with the rows of this one and, below them, those of others; they stay as they are.

        Raises:
            ValueError: the rows can't be of one state: something that does not belong to a row differs.
        """
        names = [f.name for f in dataclasses.fields(self)]
        return dataclasses.replace(self, **{n: _joined([getattr(s, n) for s in (self, *others)]) for n in names})

    def detach(self) -> None:
        """Cut the state off the graph that made it."""
        self.map(Tensor.detach)

    def release(self) -> None:
        """Let go of room that is only there to grow into."""


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, State):
        value.map(function)
    elif isinstance(value, list):
        return [_mapped(v, function) for v in value]
    return value


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and all(isinstance(x, Tensor) and x.shape[1:] == first.shape[1:] for x in values):
        return torch.cat(values)
    if isinstance(first, State) and all(type(x) is type(first) for x in values):
        return first.join(values[1:])
    if isinstance(first, list) and all(isinstance(x, list) and len(x) == len(first) for x in values):
        return [_joined(list(parts)) for parts in zip(*values, strict=True)]
    if isinstance(first, Tensor | State | list) or any(isinstance(x, Tensor) or x != first for x in values):
        raise ValueError("The states differ in more than their rows; keep them apart.")
    return first


@dataclass
class Rows(State):
    """What all memories of a model share about the rows of a batch between calls.

    Attributes:
        tokens: `(batch,)`, the real tokens of each row's open document so far; None while every row is one document
            without padding, as long as the stored pairs.
        document: `(batch,)`, the id of each row's open document; None until ids were given (then it counts as 0).
    """

    tokens: Tensor | None = None
    document: Tensor | None = None


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
        if mask is not None and bool(mask.all()):
            mask = None
        order, length = None, None
        if mask is not None:
            length = mask.sum(1)
            if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                order = torch.argsort(~mask, dim=1, stable=True)
        rows = rows or Rows()
        fresh = stored == 0
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
            border = ids != torch.cat([before[:, None].to(ids), ids[:, :-1]], dim=1)
        border[:, 0] |= fresh
        if length is not None:
            border &= position < length[:, None]
        start = torch.where(border, position, -tokens[:, None]).cummax(1).values
        whole = fresh and not bool(border[:, 1:].any())
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

    keys: Tensor | None = None
    values: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    used: int = 0
    limit: int | None = None
    dtype: str | None = None

    @property
    def kept(self) -> int:
        """Slots that can be read still."""
        return self.used if self.limit is None else min(self.used, self.limit)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor | Narrow, Tensor | Narrow]:
        """Store `keys` `(batch, heads, time, width)` and return all pairs that are kept, these included.

        `values` may have more entries at the front: they replace those of the newest pairs stored before.
        """
        kept, time, computed = self.kept, keys.shape[2], keys.dtype
        total = kept + time
        if self.dtype is None or getattr(torch, self.dtype) == computed:
            new = {"keys": keys, "values": values}
        else:
            keys, values = (Narrow.of(x, getattr(torch, self.dtype)) for x in (keys, values))
            new = {"keys": keys.data, "values": values.data}
            if keys.scale is not None:
                new |= {"key_scales": keys.scale, "value_scales": values.scale}
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
            foreign = self.keys.is_inference() and not torch.is_inference_mode_enabled()  # not to be written to
            if foreign or self.used + time > self.keys.shape[2]:
                capacity = total + max(total // 2, 64)
                for name in new:
                    setattr(self, name, _grown(getattr(self, name)[:, :, begin : self.used], capacity))
                self.used, begin = kept, 0
            self.used += time
            for name, x in new.items():
                getattr(self, name)[:, :, self.used - x.shape[2] : self.used] = x
        stored = {name: getattr(self, name)[:, :, begin : self.used] for name in new}
        if stored["keys"].dtype == computed:
            return stored["keys"], stored["values"]
        return (
            Narrow(stored["keys"], stored.get("key_scales"), computed),
            Narrow(stored["values"], stored.get("value_scales"), computed),
        )

    def settle(self, layout: Layout) -> None:
        """After a call was answered: align the rows again if they had padding, and let go of what is out of reach."""
        if layout.length is not None:
            self.map(lambda x: layout.align(x[:, :, : self.used]))
        if self.limit is not None and self.used > 4 * self.limit + 64:
            self.release()

    def join(self, others: Sequence[State]) -> State:
        """As `State.join`; in front of the pairs of a row that has fewer than others are slots of zeros."""
        states = [self, *others]
        if self.keys is None or any(s.keys is None or (s.limit, s.dtype) != (self.limit, self.dtype) for s in states):
            return super().join(others)  # refused, unless none has pairs
        names = [name for name, x in vars(self).items() if isinstance(x, Tensor)]
        used = max(s.kept for s in states)
        joined = Pairs(used=used, limit=self.limit, dtype=self.dtype)
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


def _grown(x: Tensor, capacity: int) -> Tensor:
    buffer = x.new_empty(*x.shape[:2], capacity, x.shape[3])  # what is not used takes no room until it is
    buffer[:, :, : x.shape[2]] = x
    return buffer


@dataclass
class Context:
    """What belongs to one forward pass and is shared by all memories.

    Attributes:
        draw: the step's random number in [0, 1), one for all layers, micro-batches and processes, from which a memory
            takes what it draws in training; None at evaluation and with a cache.
        embeddings: `(batch, time, d)`, the token embeddings in compact order.
        layout: what each position of the pass is, as the memories are given it.
        order: `(batch, time)`, the positions in compact order; None if they are so already.
        auxiliary_losses: losses that memories add for the trainer to sum.
        reads: when a list, every memory that reads stored pairs appends a `Read`.
        stream: what systems that pass memory from layer to layer carry.
    """

    draw: float | None = None
    embeddings: Tensor | None = None
    layout: Layout | None = None
    order: Tensor | None = None
    auxiliary_losses: list[Tensor] = field(default_factory=list)
    reads: list[Read] | None = None
    stream: dict[str, Any] = field(default_factory=dict)

    def draw_integer(self, low: int, high: int) -> int:
        """The step's draw as an integer between `low` and `high`, both included and all equally likely."""
        return low + int(self.draw * (high - low + 1))


@dataclass(frozen=True)
class Read:
    """What one memory read: `weights` `(batch, heads, time, slots)`; a row sums to 1, or to 0 without pairs.

    `memory` is the memory's name in its block; `contextual` says whether the slots are positions of the context, and
    not pairs that training filled.
    """

    memory: str
    layer_index: int
    weights: Tensor
    contextual: bool = True


@dataclass(frozen=True)
class Common:
    """What belongs to the whole model and every memory may use.

    Attributes:
        hidden_size: d.
        bias: whether linear maps have a bias.
        norm_eps: of the norms.
        dropout: probability, in training, on what a step adds.
        rotary_base: of memories that use rotary positions.
        attention_dropout: probability, in training, on the weights of what a memory reads.
        num_layers: blocks of the model.
        state_dtype: in which memories keep pairs between calls, one of `STATE_DTYPES`; None: as they are computed.
    """

    hidden_size: int
    bias: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.0
    rotary_base: float = 500000.0
    attention_dropout: float = 0.0
    num_layers: int = 1
    state_dtype: str | None = None

    def __post_init__(self) -> None:
        check_state_dtype(self.state_dtype)


def check_state_dtype(name: Any) -> None:
    """Raises `ValueError` if `name` is neither one of `STATE_DTYPES` nor None."""
    if name is not None and name not in STATE_DTYPES:
        raise ValueError(f"state_dtype is {name!r}; choose {' or '.join(STATE_DTYPES)}, or leave it out.")


class Memory(nn.Module):
    """One memory: stores key-value pairs in some form and answers a key; owns everything up to its output map.

    Parallel memories are added, so a memory can be taken out without touching the others. A subclass sets `Options`, a
    dataclass of what a config may say of it, and registers itself with `@register("its_type")`. `shared_options` are
    those that a setting without a memory's name sets in all memories that have them; any other has to be qualified
    where memories of different names have it.

    Args:
        options: this memory's `Options`.
        common: what belongs to the whole model.
        layer_index: the block's index, from 0.
    """

    Options: ClassVar[type]
    type: ClassVar[str]
    width_option: ClassVar[str | None] = None  # which option changes the size of the memory linearly, if any does
    shared_options: ClassVar[frozenset[str]] = frozenset({"num_attention_heads", "initializer_range"})

    def __init__(self, options: Any, common: Common, layer_index: int) -> None:
        super().__init__()
        self.options, self.common, self.layer_index = options, common, layer_index
        self.name = getattr(type(self), "type", "")  # in its block; a config may give another

    def initial_state(self) -> State | None:
        """The state before the first token; None for a memory that carries nothing."""
        return None

    def forward(self, x: Tensor, layout: Layout, state: State | None, context: Context) -> tuple[Tensor, State | None]:
        """Answer every position of `x` and store what it brings.

        The result for a sequence does not depend on how it is cut into calls.

        Args:
            x: `(batch, time, d)`, compact rows.
            layout: what each position is.
            state: None when nothing follows this call; else `initial_state()` or what the last call returned, consumed.
            context: what belongs to this pass.

        Returns:
            `(batch, time, d)`, and the state after the last position (None if none was given).
        """
        raise NotImplementedError

    def reset_parameters(self, layer_index: int) -> None:
        """Initialise all parameters as the memory's paper says, with `torch.nn.init`; `layer_index` counts from 0."""
        raise NotImplementedError

    def flops(self, context_length: int) -> float:
        """Operations per token, forward, averaged over a context: two per weight of a linear map, plus the reads."""
        raise NotImplementedError

    def state_bytes(self, context_length: int, element_size: int) -> int:
        """Bytes of decoding state for one sequence of `context_length` tokens with elements of `element_size` bytes."""
        return 0

    def pair_bytes(self, width: int, heads: int, element_size: int) -> int:
        """Bytes of one stored pair whose key and value are `width` wide each in all `heads` together."""
        narrow = self.common.state_dtype
        if narrow is not None:
            element_size = min(element_size, getattr(torch, narrow).itemsize)
        return 2 * (width * element_size + (4 * heads if narrow == "int8" else 0))

    def read_dropout(self) -> float:
        """The dropout of the weights of this pass."""
        return self.common.attention_dropout if self.training else 0.0

    def undecayed_parameters(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: scalars, vectors and norms."""
        return {name for name, parameter in self.named_parameters() if parameter.dim() < 2}


REGISTRY: dict[str, type[Memory]] = {}
LARGEST = 2**31 - 1  # whole number in a config; beyond that the sizes of tensors overflow


def register(name: str) -> Callable[[type[Memory]], type[Memory]]:
    """Make a memory class known under `name`, the `type` that a config gives."""

    def add(memory: type[Memory]) -> type[Memory]:
        memory.type = name
        REGISTRY[name] = memory
        return memory

    return add


def option_names(name: str) -> set[str]:
    """The options that a memory type has.

    Raises:
        ValueError: there is no such type.
    """
    if name not in REGISTRY:
        raise ValueError(f"There is no memory of type {name!r}; {nearest(name, REGISTRY)}")
    return {f.name for f in dataclasses.fields(REGISTRY[name].Options)}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Check that a memory type has these options, that none is missing, and that their values are of the right type.

    Raises:
        ValueError: it is not so.
    """
    valid = option_names(name)
    for option in options:
        if option not in valid:
            raise ValueError(f"A {name} memory has no option {option!r}; {nearest(option, valid)}")
    cls = REGISTRY[name]
    types = get_type_hints(cls.Options)
    for f in dataclasses.fields(cls.Options):
        if f.name not in options:
            if f.default is f.default_factory is dataclasses.MISSING:
                raise ValueError(f"A {name} memory needs the option {f.name!r}; give it a value.")
        elif not _is_a(options[f.name], types[f.name]):
            raise ValueError(
                f"The option {f.name!r} of a {name} memory is {options[f.name]!r}; it has to be of type {f.type}, and "
                f"no number beyond {LARGEST}."
            )


def named(steps: list[list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The memories of a block with their names: that which is given, or else the type (`type-2` for the second)."""
    counts: Counter[str] = Counter()
    found = []
    for memory in (memory for step in steps for memory in step):
        kind = memory["type"]
        counts[kind] += 1
        found.append((memory.get("name") or (kind if counts[kind] == 1 else f"{kind}-{counts[kind]}"), memory))
    return found


def build(name: str, options: dict[str, Any], common: Common, layer_index: int) -> Memory:
    """The memory of a type with its options.

    Raises:
        ValueError: the type or an option is unknown or missing, or a value is out of range.
    """
    check_options(name, options)
    return REGISTRY[name](REGISTRY[name].Options(**options), common, layer_index)


def _is_a(value: Any, kind: Any) -> bool:
    if kinds := get_args(kind):
        if get_origin(kind) is not tuple:  # X | None
            return any(_is_a(value, k) for k in kinds)
        return isinstance(value, tuple | list) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, kind)


def init_clamped_normal(weight: Tensor, std: float) -> None:
    """N(0, std) clamped to three standard deviations: clamped, not drawn again (Memory Mosaics v2, Table 6)."""
    nn.init.normal_(weight, std=std)
    with torch.no_grad():
        weight.clamp_(-3 * std, 3 * std)


def init_map(linear: nn.Linear, layer_index: int, deviation: float | None = None) -> None:
    """A map as Memory Mosaics v2 starts it (Table 6): 1 / sqrt(2 n (l + 1)) for n inputs, clamped; no bias.

    Args:
        linear: the map.
        layer_index: l, from 0.
        deviation: another standard deviation in the place of the table's.
    """
    init_clamped_normal(linear.weight, deviation or 1 / math.sqrt(2 * linear.in_features * (layer_index + 1)))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def check_deviation(deviation: float | None) -> None:
    """Raises `ValueError` if `initializer_range` is given and not above 0."""
    if deviation is not None and deviation <= 0:
        raise ValueError(f"initializer_range is {deviation}; give a number above 0, or null for the paper's.")


def linear_flops(module: nn.Module) -> int:
    """Two operations for each weight of the linear maps below `module`."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def mean_pairs(context_length: int, window: int | None) -> float:
    """How many pairs a position reads, averaged over a causal context."""
    if window is None or context_length <= window:
        return context_length / 2
    return window - window**2 / (2 * context_length)
