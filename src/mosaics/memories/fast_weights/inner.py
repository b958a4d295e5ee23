"""What memories with an inner loop share: their state, the weights that every document begins with, the call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosaics.memories.contract import Context, State
from mosaics.memories.fast_weights.common import FastWeights
from mosaics.ops.inner_loop import InnerState, inner_loop


@dataclass
class MapState(State):
    """Weights of a map `(batch, heads, inputs, outputs)` in float32 or wider: at the start of the open chunk, now, and
    their momentum; of a window's older tokens inputs and errors, `(batch, heads, tokens, inputs or outputs)`."""

    anchor: Tensor | None = None
    current: Tensor | None = None
    momentum: Tensor | None = None
    inputs: Tensor | None = None
    errors: Tensor | None = None


@dataclass
class LearningState(State):
    """The states of the maps, and the last inputs of the convolution `(batch, size - 1, channels)`."""

    maps: list[MapState]
    tail: Tensor | None = None

    def inner(self) -> InnerState | None:
        """As the op takes it."""
        if self.maps[0].anchor is None:
            return None
        fields = ([getattr(m, name) for m in self.maps] for name in InnerState._fields)
        return InnerState(*([x for x in field if x is not None] for field in fields))

    def keep(self, inner: InnerState, tail: Tensor | None) -> None:
        """Take over what the op gave."""
        for name, tensors in inner._asdict().items():
            for own, x in zip(self.maps, tensors, strict=False):
                setattr(own, name, x.contiguous())
        self.tail = tail


class Maps(nn.Module):
    """The weights that every document begins with: `(heads, inputs, outputs)` for each map.

    Args:
        heads: number of heads.
        sizes: of the inputs, between the maps, and of the outputs.
        bias: whether the last row of each is a bias.
        beside: how many lie beside each other in all but the last.
    """

    def __init__(self, heads: int, sizes: list[int], bias: bool, beside: int = 1) -> None:
        super().__init__()
        self.bias = bias
        shapes = [(heads, a + bias, b * beside) for a, b in zip(sizes[:-2], sizes[1:-1], strict=True)]
        shapes.append((heads, sizes[-2] + bias, sizes[-1]))
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])

    def initial_state(self) -> LearningState:
        """The state before the first token."""
        return LearningState([MapState() for _ in self.weights])

    def numbers(self) -> int:
        """Weights of all heads."""
        return sum(w.numel() for w in self.weights)

    def reset_parameters(self, deviation: float | None = None) -> None:
        """Normal, by default with 1 / sqrt(inputs); biases 0."""
        for weight in self.weights:
            rows = weight.shape[1] - self.bias
            nn.init.normal_(weight, std=deviation or 1 / math.sqrt(rows))
            if self.bias:
                with torch.no_grad():
                    weight[:, -1].zero_()


class Learning(FastWeights):
    """A memory whose weights are the `maps` of a network, `inner`, and learn by gradient descent."""

    def initial_state(self) -> LearningState:
        return self.maps.initial_state()

    def learnt(
        self,
        tensors: list[Tensor],
        step: Tensor,
        segments: Any,
        state: LearningState | None,
        tail: Tensor | None,
        context: Context,
        **options: Any,
    ) -> Tensor:
        """What the weights read, `(batch, heads, time, value width)`, while they learn; a state takes that over.

        Args:
            tensors: queries, keys and values.
            step: the step sizes.
            segments: the chunks of the call.
            state: None when nothing follows.
            tail: the last inputs of the convolution.
            context: what belongs to the pass.
            options: of `inner_loop`.
        """
        watched: dict[str, Tensor] | None = None if context.reads is None else {}
        before = None if state is None else state.inner()
        read, after = inner_loop(
            list(self.maps.weights),
            *tensors,
            step,
            segments,
            network=self.inner,
            state=before,
            watched=watched,
            **options,
        )
        if context.reads is not None:
            rates = {"forgotten": options.get("decay"), "momentum": options.get("momentum")}
            self.show(context, {"step": options.get("rate", step)} | rates | watched)
        if state is not None:
            state.keep(after, tail)
        return read

    def pair_flops(self, tokens: int) -> int:
        """Operations for each token with inputs and errors of so many others, for all maps."""
        return 4 * tokens * sum(w.shape[0] * sum(w.shape[1:]) for w in self.maps.weights)

    def numbers(self, context_length: int) -> int:
        return 3 * self.maps.numbers()
