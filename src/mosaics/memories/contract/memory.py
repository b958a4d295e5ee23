"""The contract of a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mosaics.memories.contract.context import Context, Read
from mosaics.memories.contract.layout import Layout
from mosaics.memories.contract.pairs import Pairs, check_state_dtype, check_tolerance
from mosaics.memories.contract.state import State
from mosaics.memories.contract.store import Store


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
        read_tolerance: the largest error of what is read of many pairs at one position, as a share of the length of the
            longest value; None: there is none.
    """

    hidden_size: int
    bias: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.0
    rotary_base: float = 500000.0
    attention_dropout: float = 0.0
    num_layers: int = 1
    state_dtype: str | None = None
    read_tolerance: float | None = None

    def __post_init__(self) -> None:
        check_state_dtype(self.state_dtype)
        check_tolerance(self.read_tolerance)


class Memory(nn.Module):
    """One memory: stores key-value pairs in some form and answers a key; owns everything up to its output map.

    Parallel memories are added, so a memory can be taken out without touching the others. A subclass sets `Options`, a
    dataclass of what a config may say of it, and registers itself with `@register("its_type")`. `shared_options` are
    those that a setting without a memory's name sets in all memories that have them; any other has to be qualified
    where memories of different names have it. `adapted` are the maps that adapters change if nobody says which.
    `EXAMPLES` are options at a width of 16 with which `mosaics.testing` tries it: each option with two values at least.

    Args:
        options: this memory's `Options`.
        common: what belongs to the whole model.
        layer_index: the block's index, from 0.
    """

    Options: ClassVar[type]
    type: ClassVar[str]
    surrounds: ClassVar[bool] = False  # the blocks of a model, as an `Around` does
    width_option: ClassVar[str | None] = None  # which option changes the size of the memory linearly, if any does
    shared_options: ClassVar[frozenset[str]] = frozenset({"num_attention_heads", "initializer_range"})
    adapted: ClassVar[tuple[str, ...]] = ()
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = ()
    step_of_one: ClassVar[Callable | None] = None  # of `one_token`, which does not go with exported code

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

    def one_token(self, x: Tensor, layout: Layout, state: State | None, context: Context) -> Any:
        """What a call for one position needs of this memory that computes all of a step on a processor.

        Args:
            x: `(batch, 1, d)`, what enters the step, in the dtype of the call.
            layout: without padding and without borders of documents.
            state: not to be changed yet, but for room that is made in it.
            context: what belongs to this pass.

        Returns:
            Its `contract.one_token.Part`; None: this memory, and so the step, is computed as always.
            `contract.one_token.Unfit` may be raised as well.
        """
        return None

    def no_pairs(self, limit: int | None = None) -> Pairs:
        """A store without pairs yet, which keeps the newest `limit` (None: all) as the model does."""
        common = self.common
        if common.read_tolerance is None or limit is not None or Pairs.sketched is None:
            return Pairs(limit=limit, dtype=common.state_dtype)
        return Pairs.sketched(dtype=common.state_dtype, tolerance=common.read_tolerance)

    def left_out(self, context: Context) -> bool:
        """Whether the pass is to be as if this memory were removed."""
        return not context.without.isdisjoint((self.name, self.type))

    def show(self, context: Context, traces: dict[str, Tensor | None]) -> None:
        """Declare numbers over time, `(batch, heads, time)` or with channels `(batch, heads, time, channels)`, of which
        the mean is shown, to who looks into this pass. None is left out."""
        found = {name: x if x.dim() == 3 else x.mean(-1) for name, x in traces.items() if x is not None}
        if found and context.reads is not None:
            context.reads.append(Read(self.name, self.layer_index, traces=found))

    def document_store(self, state: State | None) -> Store | None:
        """What of a document can be read beside that of other documents, by a question that continues none of them.

        Args:
            state: of one row, after the document and the end-of-text that closes it.

        Returns:
            A fixed set of pairs; None for a memory in which a question begins as at the border of a document.

        Raises:
            ValueError: what the memory keeps of a document can't be read beside that of others.
        """
        if self.initial_state() is not None:
            raise ValueError(
                f"what the memory {self.name!r} keeps of a document can't be united with that of others; continue one "
                "document with save_memory (generate --save-memory) instead"
            )

    def united_state(self, stores: Sequence[Store]) -> State | None:
        """The state before the first token of a question that reads all of the stores, each of `document_store`."""
        return self.initial_state()

    def reset_parameters(self, layer_index: int) -> None:
        """Initialise all parameters as the memory's paper says, with `torch.nn.init`; `layer_index` counts from 0."""
        raise NotImplementedError

    def flops(self, context_length: int) -> float:
        """Operations per token, forward, averaged over a context: two per weight of a linear map, plus the reads."""
        raise NotImplementedError

    def check(self, context_length: int) -> None:
        """Raises `ValueError` if the memory makes no sense in training at a context of so many tokens."""

    def reach(self) -> tuple[int | None, int | None]:
        """How many tokens back this memory alone finds what it was trained to find, and beyond how many it never does:
        0 is the position's own token, None no limit. What fades names a number beyond its convolution."""
        return None, None

    def activation_bytes(self, element_size: int) -> float:
        """Bytes per token that training keeps of this memory for the backward pass, about: what enters and leaves its
        linear maps, with matrix products in elements of `element_size` bytes."""
        linear = [m for m in self.modules() if isinstance(m, nn.Linear)]
        return element_size * sum(m.in_features + m.out_features for m in linear)

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


class Around(Memory):
    """A memory around the whole stack of blocks, which it calls itself: a config names it in `around`.

    Its own state is `state.around` of a `StackState`, whose `blocks` are those of what the stack has open.
    """

    surrounds = True

    def forward(
        self, stack: Any, x: Tensor, layout: Layout, state: Any, context: Context, norm: nn.Module | None = None
    ) -> tuple[Tensor, Any]:
        """As `Memory.forward`, of the whole stack.

        Args:
            stack: the `Stack`, whose blocks are asked by `stack.through`, any number of times.
            x: `(batch, time, d)`, compact rows.
            layout: what each position is.
            state: a `StackState`, or None when nothing follows.
            context: what belongs to this pass.
            norm: what is behind the last block; for `stack.through`.
        """
        raise NotImplementedError

    def flops(self, context_length: int) -> float:
        """Operations per token beside those of the blocks."""
        return 0.0

    def seen(self, context_length: int) -> int:
        """The most positions that the blocks read together."""
        raise NotImplementedError

    def open(self, context_length: int) -> int:
        """The positions that the blocks' states are of after so many tokens."""
        raise NotImplementedError

    def share(self) -> float:
        """How many positions the blocks read for each token."""
        return 1.0
