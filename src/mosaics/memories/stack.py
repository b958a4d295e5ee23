"""Blocks of memories and the stack of blocks, which is a memory itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, Memory, State, build, named


@dataclass
class BlockState(State):
    """The states of a block's memories, in the order of its steps; None for those that carry nothing."""

    memories: list[State | None]


class Step(nn.Module):
    """One residual step: x + the sum of parallel memories behind a norm of their own.

    Args:
        memories: `{"type": ..., "options": {...}}` of each.
        norm: the kind of norm, a module class called with (width, eps).
        common: what belongs to the whole model.
        layer_index: the block's index, from 0.
    """

    def __init__(self, memories: list[dict[str, Any]], norm: type[nn.Module], common: Common, layer_index: int) -> None:
        super().__init__()
        self.dropout = common.dropout
        self.norm = norm(common.hidden_size, common.norm_eps)
        self.memories = nn.ModuleDict()
        for spec in memories:
            self.add(build(spec["type"], spec.get("options", {}), common, layer_index))

    def add(self, memory: Memory) -> None:
        """Put a memory after the others, under its type, with a number if there are others of that type."""
        count = sum(one.type == memory.type for one in self.memories.values())
        self.memories[f"{memory.type}-{count + 1}" if count else memory.type] = memory

    def forward(
        self, x: Tensor, layout: Layout, states: list[State | None] | None, context: Context
    ) -> tuple[Tensor, list[State | None]]:
        """As `Memory.forward`, with one state a memory."""
        if Memory.step_of_one is not None and (done := Memory.step_of_one(self, x, layout, states, context)):
            return done
        inner = self.norm(x)
        answer, after = None, []
        for memory, state in zip(self.memories.values(), states or [None] * len(self.memories), strict=True):
            if memory.left_out(context):
                after.append(state)
                continue
            y, state = memory(inner, layout, state, context)
            answer = y if answer is None else answer + y
            after.append(state)
        if answer is None:
            return x, after
        if self.training:
            answer = F.dropout(answer, self.dropout)
        return x + answer, after


class Block(nn.Module):
    """An ordered list of residual steps; v2 is `[[short_term, long_term], [feed_forward]]`."""

    def __init__(
        self, steps: list[list[dict[str, Any]]], norm: type[nn.Module], common: Common, layer_index: int
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step(memories, norm, common, layer_index) for memories in steps)
        for memory, (name, _) in zip(self.memories(), named(steps), strict=True):
            memory.name = name

    def memories(self) -> Iterator[Memory]:
        """All memories, in order."""
        for step in self.steps:
            yield from step.memories.values()

    def initial_state(self) -> BlockState:
        """The state before the first token."""
        return BlockState([memory.initial_state() for memory in self.memories()])

    def forward(
        self, x: Tensor, layout: Layout, state: BlockState | None, context: Context
    ) -> tuple[Tensor, BlockState | None]:
        """As `Memory.forward`."""
        begin = 0
        for step in self.steps:
            end = begin + len(step.memories)
            states = None if state is None else state.memories[begin:end]
            x, after = step(x, layout, states, context)
            if state is not None:
                state.memories[begin:end] = after
            begin = end
        return x, state

    def remove(self, name: str) -> int:
        """Take out every memory of a name or type with its parameters, and steps that are left empty; returns how many
        went."""
        removed = 0
        for step in self.steps:
            memories, step.memories = list(step.memories.values()), nn.ModuleDict()
            for memory in memories:
                if name in (memory.name, memory.type):
                    removed += 1
                else:
                    step.add(memory)
        self.steps = nn.ModuleList(step for step in self.steps if len(step.memories))
        return removed


@dataclass
class StackState(State):
    """The states of a stack's blocks, and of the memory around them if there is one."""

    blocks: list[BlockState]
    around: State | None = None


class Stack(Memory):
    """Blocks one after the other. It meets the memory contract, so a system that wraps a whole network can hold one.

    Args:
        blocks: the steps of each block.
        norm: the kind of norm, a module class called with (width, eps).
        common: what belongs to the whole model.
        around: the memory around them, as one of a step is given; None: there is none.
    """

    def __init__(
        self, blocks: list[list[list[dict]]], norm: type[nn.Module], common: Common, around: dict | None = None
    ) -> None:
        super().__init__(None, common, 0)
        self.blocks = nn.ModuleList(Block(steps, norm, common, i) for i, steps in enumerate(blocks))
        self.around: Memory | None = None
        if around is not None:
            self.around = build(around["type"], around.get("options", {}), common, 0)
            self.around.name = around.get("name", self.around.type)
        self.gradient_checkpointing = False

    def initial_state(self) -> StackState:
        return StackState([block.initial_state() for block in self.blocks], self.around and self.around.initial_state())

    def forward(self, *given: Any, **more: Any) -> tuple[Tensor, StackState | None]:
        """As `through`, but for what the memory around the blocks makes of it."""
        context: Context = given[3]
        if self.around is None or self.around.left_out(context):
            return self.through(*given, **more)
        return self.around(self, *given, **more)

    def through(
        self,
        x: Tensor,
        layout: Layout,
        state: StackState | None,
        context: Context,
        norm: nn.Module | None = None,
        trace: list[Tensor] | None = None,
    ) -> tuple[Tensor, StackState | None]:
        """As `Memory.forward`, of the blocks; `norm` is behind the last, `trace` collects what enters each."""
        for i, block in enumerate(self.blocks):
            if trace is not None:
                trace.append(x)
            block_state = None if state is None else state.blocks[i]
            if self.gradient_checkpointing and self.training and state is None:
                x = self._recomputed(block, x, layout, context)
            else:
                x, block_state = block(x, layout, block_state, context)
            if state is not None:
                state.blocks[i] = block_state
        return x if norm is None else norm(x), state

    def _recomputed(self, block: Block, x: Tensor, layout: Layout, context: Context) -> Tensor:
        """A block whose activations are not kept: it is computed anew in the backward pass, with the same stream."""
        names: list[str] = []

        def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            own = context.apart()
            own.stream = dict(zip(before, values, strict=True))
            y, _ = block(x, layout, None, own)
            names[:] = own.stream
            return y, *own.stream.values(), *own.auxiliary_losses

        before = list(context.stream)
        x, *left = self._gradient_checkpointing_func(run, x, *context.stream.values())
        context.stream = dict(zip(names, left, strict=False))
        context.auxiliary_losses += left[len(names) :]
        return x

    def memories(self) -> Iterator[Memory]:
        """All memories of all blocks, in order, and the one around them."""
        yield from self._inside()
        if self.around is not None:
            yield self.around

    def kinds(self) -> list[list[str]]:
        """The types of all memories, block by block; at last that of the one around them."""
        around = [] if self.around is None else [[self.around.type]]
        return [[memory.type for memory in block.memories()] for block in self.blocks] + around

    def reset_parameters(self, layer_index: int) -> None:
        """Every memory initialises itself; a stack has no parameters of its own."""

    def check(self, context_length: int) -> None:
        seen = context_length if self.around is None else self.around.seen(context_length)
        for memory in self._inside():
            memory.check(seen)
        if self.around is not None:
            self.around.check(context_length)

    def reach(self) -> tuple[int | None, int | None]:
        return super().reach() if self.around is None else self.around.reach()

    def flops(self, context_length: int) -> float:
        if self.around is None:
            return sum(memory.flops(context_length) for memory in self._inside())
        inside = sum(memory.flops(self.around.seen(context_length)) for memory in self._inside())
        return self.share() * inside + self.around.flops(context_length)

    def activation_bytes(self, element_size: int) -> float:
        inside = self.share() * sum(memory.activation_bytes(element_size) for memory in self._inside())
        return inside + (0.0 if self.around is None else self.around.activation_bytes(element_size))

    def state_bytes(self, context_length: int, element_size: int) -> int:
        around, own = self.around, 0
        if around is not None:
            own, context_length = around.state_bytes(context_length, element_size), around.open(context_length)
        return own + sum(memory.state_bytes(context_length, element_size) for memory in self._inside())

    def share(self) -> float:
        """How many positions the blocks read for each token."""
        return 1.0 if self.around is None else self.around.share()

    def _inside(self) -> Iterator[Memory]:
        for block in self.blocks:
            yield from block.memories()
