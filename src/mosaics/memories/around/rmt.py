"""Segment recurrence: vectors that are read before each segment of a document and written behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaics.memories.contract import Around, Common, Context, Layout, Read, State, register
from mosaics.memories.stack import Stack, StackState


@dataclass
class RecurrentState(State):
    """What the open segment read, or the next is to read, `(batch, memory_tokens, d)`."""

    memory: Tensor | None = None

    def reserved(self, capacity: int) -> State:
        raise ValueError("A recurrent memory begins its blocks' states anew; use a dynamic cache.")


@register("rmt")
class RecurrentMemory(Around):
    r"""\( [\cdot\,; H'_t; M_{t+1}] = f([M_t; H_t; M_t]) \) for the t-th segment \( H_t \) of a document, where f are
    the blocks with the norm behind them, for which a segment is a document of its own: the Recurrent Memory
    Transformer (Bulatov et al., arXiv 2207.06881), docs/memories/rmt.md.

    Raises:
        ValueError: a segment or the memory has no token.
    """

    EXAMPLES = (
        {"memory_tokens": 2, "segment": 16},
        {"memory_tokens": 3, "segment": 5},
    )

    @dataclass(frozen=True)
    class Options:
        """So many `memory_tokens` stand before and behind each `segment` of so many tokens of a document."""

        memory_tokens: int = 10
        segment: int = 128

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        if min(options.memory_tokens, options.segment) < 1:
            raise ValueError(
                f"rmt has {options.memory_tokens} memory tokens and segments of {options.segment}; give at least 1."
            )
        self.memory = nn.Parameter(torch.empty(options.memory_tokens, common.hidden_size))

    def initial_state(self) -> RecurrentState:
        return RecurrentState()

    def forward(
        self,
        stack: Stack,
        x: Tensor,
        layout: Layout,
        state: StackState | None,
        context: Context,
        norm: nn.Module | None = None,
    ) -> tuple[Tensor, StackState | None]:
        batch, time, d = x.shape
        first = self.memory.to(x.dtype).expand(batch, -1, -1)
        memory = first if state is None or state.around.memory is None else state.around.memory
        padded, answers, places, read_of = F.pad(x, (0, 0, 0, 1)), [], [], []
        total = batch * time if layout.length is None else layout.length.sum().clamp(min=1)
        for call, index in layout.calls(self.options.segment, x.device):
            part = _Part.of(call, self.options, state is not None, x.device)
            memory = torch.where(part.begins[:, None, None], first, memory)
            read_of.append((part, memory))
            tokens = padded.gather(1, index[..., None].expand(-1, -1, d))
            given = torch.cat([memory, tokens, memory, padded[:, -1:]], dim=1)
            given = given.gather(1, part.order[..., None].expand(-1, -1, d))
            own = replace(
                context, embeddings=given, layout=part.layout, order=None, auxiliary_losses=[], reads=None, stream={}
            )
            if state is not None and part.fresh:
                state.blocks = stack.initial_state().blocks
            answer, _ = stack.through(given, part.layout, state, own, norm)
            context.auxiliary_losses += [loss * (part.tokens.to(loss) / total) for loss in own.auxiliary_losses]
            answer = F.pad(answer, (0, 0, 0, 1))
            read, written = (answer.gather(1, at[..., None].expand(-1, -1, d)) for at in (part.read, part.written))
            memory = torch.where(part.closes[:, None, None], written, memory)
            answers.append(read)
            places.append(index)
        answer, place = torch.cat(answers, dim=1), torch.cat(places, dim=1)[..., None]
        answer = x.new_zeros(batch, time + 1, d).to(answer.dtype).scatter(1, place.expand_as(answer), answer)[:, :-1]
        if context.reads is not None:
            traces = {
                name: x.new_zeros(batch, shown.shape[1], time + 1).scatter(2, place.mT.expand_as(shown), shown)
                for name, shown in _shown(read_of, [index.shape[1] for index in places]).items()
            }
            context.reads.append(Read(self.name, self.layer_index, traces={n: t[..., :-1] for n, t in traces.items()}))
        if state is not None:
            state.around.memory = memory.contiguous()
        return answer, state

    def reset_parameters(self, layer_index: int) -> None:
        """As embeddings begin if a config says nothing of them, as the paper has it."""
        nn.init.normal_(self.memory, std=(2 * self.common.hidden_size) ** -0.5)

    def reach(self) -> tuple[int, None]:
        """What is asked here lies in an earlier segment, of which there is what is in the memory alone."""
        return self.options.segment + 3, None

    def seen(self, context_length: int) -> int:
        return min(context_length, self.options.segment) + 2 * self.options.memory_tokens

    def open(self, context_length: int) -> int:
        if not context_length:
            return 0
        tokens = 1 + (context_length - 1) % self.options.segment
        return tokens + self.options.memory_tokens * (2 if tokens == self.options.segment else 1)

    def share(self) -> float:
        return 1 + 2 * self.options.memory_tokens / self.options.segment

    def activation_bytes(self, element_size: int) -> float:
        return 4 * 3 * self.share() * self.common.hidden_size

    def state_bytes(self, context_length: int, element_size: int) -> int:
        return self.memory.numel() * element_size if context_length else 0


def _shown(read: list[tuple[_Part, Tensor]], tokens: list[int]) -> dict[str, Tensor]:
    """Of the memory that each token's segment read, the size of its vectors, and how far the segment before moved them:
    `(batch, memory tokens, tokens of all parts)`."""
    sizes, moves, before = [], [], None
    for (part, memory), count in zip(read, tokens, strict=True):
        move = torch.zeros_like(memory[..., 0]) if before is None else before[1]
        if before is not None:
            closed, last = before[0]
            move = torch.where(closed.closes[:, None], (memory - last).norm(dim=-1), move)
        move = move.masked_fill(part.begins[:, None], 0.0)
        before = (part, memory), move
        sizes.append(memory.norm(dim=-1)[..., None].expand(-1, -1, count))
        moves.append(move[..., None].expand(-1, -1, count))
    return {"size of the memory": torch.cat(sizes, dim=2), "moved by the segment before": torch.cat(moves, dim=2)}


@dataclass(frozen=True)
class _Part:
    """The part of a segment that a call has, with what is read before it and written behind it, for each row.

    Attributes:
        layout: of what the blocks read.
        order: `(batch, positions)`, what they read: places in the memory, the tokens, the memory once more, and 0.
        read: `(batch, tokens)`, where of their answer that of each token is; behind its end for none.
        written: `(batch, memory tokens)`, where the next memory is.
        begins: `(batch,)`, whether a document begins.
        closes: `(batch,)`, whether the segment ends.
        fresh: whether one begins in every row.
        tokens: how many there are.
    """

    layout: Layout
    order: Tensor
    read: Tensor
    written: Tensor
    begins: Tensor
    closes: Tensor
    fresh: bool
    tokens: Tensor

    @classmethod
    def of(cls, call: Layout, options: RecurrentMemory.Options, going_on: bool, device: torch.device) -> _Part:
        count, before = options.memory_tokens, -call.start[:, 0]
        tokens = torch.full_like(before, call.time) if call.length is None else call.length
        there, place = tokens > 0, before % options.segment
        opens, closes = there & (place == 0), there & (place + tokens == options.segment)
        memory, own = torch.arange(count, device=device), torch.arange(call.time, device=device)
        mask = torch.cat(
            [opens[:, None].expand(-1, count), own < tokens[:, None], closes[:, None].expand(-1, count)], dim=1
        )
        length = mask.sum(1)
        lengths = length.tolist()
        time = max([1, *lengths])
        place_of = torch.argsort(~mask, dim=1, stable=True)[:, :time]
        order = place_of.masked_fill(torch.arange(time, device=device) >= length[:, None], mask.shape[1])
        head = count * opens[:, None].long()
        read = torch.where(own < tokens[:, None], head + own, time)
        written = torch.where(closes[:, None], head + tokens[:, None] + memory, time)
        fresh, start = not going_on or bool(opens.all()), None
        if not fresh:
            start = torch.where(opens, 0, -(count + place))[:, None].expand(-1, time)
        layout = Layout(call.batch, time, start, None if min(lengths, default=time) == time else length)
        return cls(layout, order, read, written, there & (before == 0), closes, fresh, tokens.sum())
