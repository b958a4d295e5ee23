"""The mixer of GAM: a short convolution and a bank that training fills, each behind a gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaics.memories.contract import (
    Common,
    Context,
    Layout,
    Memory,
    Read,
    State,
    check_deviation,
    init_map,
    linear_flops,
    register,
)
from mosaics.memories.fast_weights.common import ShortConvolution
from mosaics.ops.kernel_regression import ALL_PAIRS, Bandwidth, kernel_regression, weights_at


@dataclass
class GAMState(State):
    """The last inputs of the convolution, `(batch, size - 1, d)`."""

    tail: Tensor | None = None


@register("gam")
class GAMMemory(Memory):
    r"""\( y_t = \sigma(a_t) \odot l_t + \sigma(b_t) \odot \sum_j \mathrm{softmax}_j(\beta x_t^\top m_j)\, m_j \), where
    \( l \) is a causal convolution of each channel and \( [a_t, b_t] = W x_t + c \) (Gated Associative Memory, arXiv
    2509.00605); docs/memories/gam.md.

    The bank \( m \) holds parameters and nothing of the context, which flows through the convolution alone.

    Raises:
        ValueError: there is no slot, the convolution is over no token, or the bandwidth is not above 0.
    """

    EXAMPLES = (
        {"slots": 11},
        {"slots": 5, "convolution": 4, "bandwidth": 0.5, "initializer_range": 0.1},
        {"slots": 6, "convolution": 1},
    )

    @dataclass(frozen=True)
    class Options:
        """The bank has `slots` rows, each key and value at once; scores are multiplied by `bandwidth` (the paper's 1).
        `convolution` is over so many tokens. `initializer_range` is the standard deviation of the map of the gates at
        the start (None: that of Memory Mosaics v2)."""

        slots: int = 512
        convolution: int = 3
        bandwidth: float = 1.0
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        if options.slots < 1 or options.convolution < 1:
            raise ValueError(
                f"slots is {options.slots} and convolution {options.convolution}; give at least 1 of each."
            )
        if options.bandwidth <= 0:
            raise ValueError(f"bandwidth is {options.bandwidth}; give a number above 0.")
        check_deviation(options.initializer_range)
        d = common.hidden_size
        self.convolution = ShortConvolution(d, options.convolution, bias=True)
        self.bank = nn.Parameter(torch.empty(options.slots, d))
        self.gate_proj = nn.Linear(d, 2 * d, bias=True)

    def initial_state(self) -> GAMState:
        return GAMState()

    def forward(
        self, x: Tensor, layout: Layout, state: GAMState | None, context: Context
    ) -> tuple[Tensor, GAMState | None]:
        near, tail = self.convolution(x, layout, None if state is None else state.tail)
        if state is not None:
            state.tail = tail
        # Every position reads the same slots, so rows are one long row.
        queries, bank = x.flatten(0, 1)[None, None], self.bank.to(x.dtype)[None, None]
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = Bandwidth(torch.full((1,), self.options.bandwidth, dtype=wide, device=x.device))
        read = kernel_regression(queries, bank, bank, scale, ALL_PAIRS, dropout=self.read_dropout())
        gates = self.gate_proj(x).sigmoid().chunk(2, dim=-1)
        if context.reads is not None:

            def rows(positions: slice) -> tuple[Tensor, int]:
                some = x[:, positions]
                found, _ = weights_at(some.flatten(0, 1)[None, None], bank, scale, ALL_PAIRS, slice(None))
                return found[0, 0].unflatten(0, some.shape[:2])[:, None], 0

            context.reads.append(
                Read(
                    self.name,
                    self.layer_index,
                    rows,
                    self.options.slots,
                    contextual=False,
                    values=bank.expand(x.shape[0], -1, -1, -1),
                    answer=read[0, 0].unflatten(0, x.shape[:2])[:, None],
                    pull=lambda direction, positions: (gates[1][:, positions] * direction)[:, None],
                    traces={
                        "gate of the convolution": gates[0].mean(-1)[:, None],
                        "gate of the bank": gates[1].mean(-1)[:, None],
                    },
                )
            )
        return gates[0] * near + gates[1] * read[0, 0].unflatten(0, x.shape[:2]), state

    def reset_parameters(self, layer_index: int) -> None:
        """The bank and the convolution as in the authors' code, the gates' map as those of Memory Mosaics v2."""
        self.convolution.reset_parameters()
        nn.init.xavier_uniform_(self.bank)
        init_map(self.gate_proj, layer_index, self.options.initializer_range)

    def reach(self) -> tuple[int, int]:
        """That of the convolution: the bank answers from the token alone."""
        return self.options.convolution - 1, self.options.convolution - 1

    def flops(self, context_length: int) -> float:
        return linear_flops(self) + self.convolution.flops() + 4 * self.bank.numel()

    def activation_bytes(self, element_size: int) -> float:
        """The input twice, once behind the tail; both paths and both gates. The weights of the slots are not kept."""
        return element_size * 6 * self.common.hidden_size

    def state_bytes(self, context_length: int, element_size: int) -> int:
        return (self.options.convolution - 1) * self.common.hidden_size * element_size if context_length else 0
