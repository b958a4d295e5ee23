"""What a memory carries from call to call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def growing(dim: int) -> Any:
    """The field of a `State` for a tensor whose length in a dimension follows from how many tokens were read."""
    return field(default=None, metadata={"grows": dim})


def transient(default: Any = None) -> Any:
    """The field of a `State` for what can be made again from the others, or is chosen anew: files don't have it."""
    return field(default=default, metadata={"transient": True})


def shared() -> Any:
    """The field of a `State` for another state, or None, that all rows read alike and no call changes: what is done to
    rows is not done to it."""
    return field(default=None, metadata={"shared": True})


class State:
    """Base of the dataclasses that a memory carries from call to call: tensors (batch first), states, plain values.

    All tensors have the same shape whatever was read, but for dimensions that are declared with `growing`. What is
    declared with `shared` belongs to no row.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the rows, however deep, by `function` of it."""
        for f in dataclasses.fields(self):
            if "shared" not in f.metadata:
                setattr(self, f.name, _mapped(getattr(self, f.name), function))

    def parts(self, shared: bool = True) -> Iterator[State]:
        """This state and all that are in it, however deep; `shared`: also what belongs to no row."""
        yield self
        for f in dataclasses.fields(self):
            value = getattr(self, f.name) if shared or "shared" not in f.metadata else None
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, State):
                    yield from part.parts(shared)

    @property
    def batch(self) -> int | None:
        """The rows; None where there is no tensor yet."""
        held = (x for part in self.parts(shared=False) for x in vars(part).values() if isinstance(x, Tensor))
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
        states, joined = (self, *others), {}
        for f in dataclasses.fields(self):
            values = [getattr(state, f.name) for state in states]
            if "shared" not in f.metadata:
                joined[f.name] = _joined(values)
            elif any(value is not values[0] for value in values):
                raise ValueError(f"The rows read different {f.name}s; keep them apart.")
        return dataclasses.replace(self, **joined)

    def detach(self) -> None:
        """Cut the state off the graph that made it."""
        self.map(Tensor.detach)

    def reserved(self, capacity: int) -> State:
        """The state in the place of this one, from before the first token, that keeps to room for `capacity` tokens:
        after the first call no shape in it depends on what is read, and no plain value changes.

        Raises:
            ValueError: something in it grows and can't keep to a room.
        """
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if "grows" in f.metadata:
                raise ValueError(f"{f.name} of {type(self).__name__} grows and has no fixed room; use a dynamic cache.")
            if isinstance(value, State):
                setattr(self, f.name, value.reserved(capacity))
            elif isinstance(value, list):
                setattr(self, f.name, [v.reserved(capacity) if isinstance(v, State) else v for v in value])
        return self

    def release(self) -> None:
        """Let go of room that is only there to grow into."""

    def adopt(self, other: State) -> None:
        """Take over what was chosen when another state of the same memory was made, as the dtype of what is stored.

        Raises:
            TypeError: it is nothing that can be chosen.
        """

    def check(self) -> None:
        """Raises `TypeError` if its parts can't belong together; it may come from a file."""


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
