"""The persistent memory of Memory Mosaics v1: kernel regression over pairs that training fills."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosaics.memories.contract import Common, Context, Layout, Memory, Read, head_width, linear_flops, register
from mosaics.memories.mosaic.common import KeyState, key_state_bytes, widened
from mosaics.memories.mosaic.leaky_contextual import SPEED, LeakyKeys, reset_map
from mosaics.ops.kernel_regression import ALL_PAIRS, kernel_regression, weights_at


@register("kernel_persistent")
class KernelPersistentMemory(Memory):
    """y_t = exp(10 g) Σ_j softmax_j(exp(20 β) k_tᵀ K_j) V_j over learned pairs, the mean over several banks of them
    (Memory Mosaics v1, arXiv 2405.06394, section 6).

    The keys k_t are those of `LeakyKeys`, with a map and decays of their own; the learned keys K_j are not of unit
    norm.

    Raises:
        ValueError: the width is not a multiple of the number of heads, eps is negative, or there are no pairs.
    """

    width_option = "num_pairs"
    shared_options = Memory.shared_options | {"unit_norm_eps"}
    EXAMPLES = (
        {"num_attention_heads": 2, "num_pairs": 11},
        {
            "num_attention_heads": 4,
            "num_pairs": 5,
            "num_banks": 2,
            "max_log_bandwidth": 3.0,
            "unit_norm_eps": 0.1,
            "initializer_range": 0.1,
        },
    )

    @dataclass(frozen=True)
    class Options:
        """`num_banks` sets of `num_pairs` learned pairs for each of `num_attention_heads` heads; the others are those
        of the leaky_contextual memory, but the clamp of the authors' nano version is ln 65535 here.
        """

        num_attention_heads: int
        num_pairs: int
        num_banks: int = 1
        max_log_bandwidth: float = 10.0
        unit_norm_eps: float = 0.0
        initializer_range: float | None = None

    def __init__(self, options: Options, common: Common, layer_index: int) -> None:
        super().__init__(options, common, layer_index)
        heads = options.num_attention_heads
        if options.num_pairs < 1 or options.num_banks < 1:
            raise ValueError(
                f"num_pairs is {options.num_pairs} and num_banks {options.num_banks}; give at least 1 of each."
            )
        width = head_width(common.hidden_size, heads)
        self.key_extractor = LeakyKeys(common, heads, options.unit_norm_eps, options.max_log_bandwidth)
        self.pair_keys = nn.Parameter(torch.empty(options.num_banks, heads, options.num_pairs, width))
        self.pair_values = nn.Parameter(torch.empty(options.num_banks, heads, options.num_pairs, width))
        self.value_scale = nn.Parameter(torch.empty(heads))
        self.out_proj = nn.Linear(common.hidden_size, common.hidden_size, bias=common.bias)

    def initial_state(self) -> KeyState:
        return KeyState()

    def document_store(self, state: KeyState) -> None:
        """None: it keeps no pairs of a document."""

    def forward(
        self, x: Tensor, layout: Layout, state: KeyState | None, context: Context
    ) -> tuple[Tensor, KeyState | None]:
        queries = self.key_extractor(x, layout, state)
        batch, heads, time, width = queries.shape
        # Every position reads the same pairs, so rows are one long row, and banks take the place of rows.
        queries = (
            queries.transpose(0, 1).reshape(1, heads, batch * time, width).expand(self.options.num_banks, -1, -1, -1)
        )
        keys, values = self.pair_keys.to(queries.dtype), self.pair_values.to(queries.dtype)
        bandwidth = self.key_extractor.bandwidth()
        read = kernel_regression(queries, keys, values, bandwidth, ALL_PAIRS, dropout=self.read_dropout()).mean(0)
        length = (SPEED * widened(self.value_scale)).exp().to(read.dtype)[:, None, None]
        if context.reads is not None:
            asked, answer = queries.unflatten(2, (batch, time)), read.unflatten(1, (batch, time)).transpose(0, 1)

            def rows(positions: slice) -> tuple[Tensor, int]:
                some = asked[:, :, :, positions]
                found, _ = weights_at(some.flatten(2, 3), keys, bandwidth, ALL_PAIRS, slice(None))
                found = found / self.options.num_banks
                return found.unflatten(2, some.shape[2:4]).permute(2, 1, 3, 0, 4).flatten(3), 0

            def pull(direction: Tensor, _: slice) -> Tensor:
                split = (direction @ self.out_proj.weight.to(direction.dtype)).unflatten(-1, (heads, -1))
                return length.to(direction.dtype) * split.transpose(1, 2)

            stored = values.transpose(0, 1).flatten(1, 2)[None].expand(batch, -1, -1, -1)
            slots = stored.shape[2]
            context.reads.append(
                Read(
                    self.name,
                    self.layer_index,
                    rows,
                    slots,
                    contextual=False,
                    values=stored,
                    answer=answer,
                    pull=pull,
                    recurrence=self.key_extractor.recurrence(x),
                )
            )
        read = read * length
        return self.out_proj(read.unflatten(1, (batch, time)).permute(1, 2, 0, 3).flatten(2)), state

    def reset_parameters(self, layer_index: int) -> None:
        """As the authors' library, or their nano version where `initializer_range` is set."""
        deviation = self.options.initializer_range
        self.key_extractor.reset_parameters(deviation)
        for pairs in (self.pair_keys, self.pair_values):
            nn.init.normal_(pairs, std=1 / math.sqrt(pairs.shape[-1]))
        nn.init.constant_(self.value_scale, -0.5 / SPEED)
        reset_map(self.out_proj, deviation, self.common.num_layers)

    def reach(self) -> tuple[int, None]:
        """What the keys' averages hold of the past fades."""
        return 3, None

    def flops(self, context_length: int) -> float:
        return linear_flops(self) + 2 * (self.pair_keys.numel() + self.pair_values.numel())

    def state_bytes(self, context_length: int, element_size: int) -> int:
        return key_state_bytes(self.common.hidden_size, self.options.num_attention_heads)
