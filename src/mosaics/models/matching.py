"""Twins of equal size: the width of the persistent memory makes up for what the contextual memories differ in."""

from __future__ import annotations

import copy

import torch

from mosaics.memories.contract import memory_class
from mosaics.models.configuration_mosaic import MosaicConfig
from mosaics.models.modeling_mosaic import MosaicForCausalLM


def matched(
    config: MosaicConfig, other: MosaicConfig, by: str = "parameters", context_length: int | None = None
) -> MosaicConfig:
    """`config` with the `width_option` that brings it nearest to `other`.

    Args:
        config: the arrangement to change; its vocabulary and width should be those of `other`.
        other: the size to meet.
        by: `"parameters"`, or `"flops"` per token.
        context_length: for `"flops"`, in tokens; by default the training context of `other`.

    Raises:
        ValueError: `by` is something else, no width of at least 1 meets the size, or there is nothing to widen.
    """
    if by not in ("parameters", "flops"):
        raise ValueError(f"Twins are matched by 'parameters' or 'flops', not by {by!r}.")
    option = width_option(config)
    context_length = context_length or other.max_position_embeddings

    def size(of: MosaicConfig) -> float:
        with torch.device("meta"):
            figures = MosaicForCausalLM(copy.deepcopy(of)).describe(context_length)
        return figures["parameters"]["total"] if by == "parameters" else figures["flops_per_token"]

    def resized(width: int) -> MosaicConfig:
        changed = copy.deepcopy(config)
        setattr(changed, option, width)
        return changed

    base, step = size(resized(1)), size(resized(2)) - size(resized(1))  # linear in the width
    wanted = size(other)
    width = 1 + round((wanted - base) / step)
    if width < 1:
        raise ValueError(
            f"Even without a persistent memory this arrangement has more {by} ({base:,} against {wanted:,}); lower its "
            "number of blocks, or widen the persistent memory of the other."
        )
    return resized(width)


def width_option(config: MosaicConfig) -> str:
    """The option that says how wide the persistent memories of a mosaic are, e.g. `intermediate_size` or `num_pairs`.

    Raises:
        ValueError: there is none, or there are several.
    """
    options = {memory_class(name).width_option for name in config.memory_types()} - {None}
    if len(options) != 1:
        raise ValueError(f"One option has to say how wide the persistent memories are; there are {len(options)}.")
    return options.pop()
