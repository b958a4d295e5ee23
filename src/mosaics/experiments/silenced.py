"""Models without the heads that read farthest: what taking a long-term memory out is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaics.models import MosaicForCausalLM


@torch.no_grad()
def silence_longest(model: MosaicForCausalLM, input_ids: Tensor, share: float) -> list[tuple[int, str, int]]:
    """Silence the heads that read farthest: what they read adds nothing any more.

    Heads of all blocks are ranked by how many tokens back they read, averaged over the weights of all rows and
    positions; the first token of a row, where attention likes to rest, is left out.

    Args:
        model: its memories that read the context must hand on their heads side by side (`o_proj`); changed in place.
        input_ids: `(batch, time)`, that the heads are ranked by.
        share: of the heads, from 0 to 1.

    Returns:
        Block, memory and number of the heads that are silent now, the farthest first.

    Raises:
        ValueError: a memory has no such map.
    """
    memories = {(memory.layer_index, memory.name): memory for memory in model.model.stack.memories()}
    found = []
    for read in model.read_weights(input_ids):
        if not read.contextual:
            continue
        if not hasattr(memories[read.layer_index, read.memory], "o_proj"):
            raise ValueError(f"The heads of {read.memory!r} can't be silenced alone; it has no map of heads.")
        weights = read.weights[..., 1:].double().sum(0)
        positions = torch.arange(read.slots, device=weights.device)
        back = positions[-weights.shape[1] :, None] - positions[None, 1:]
        mean = (weights * back).sum((-2, -1)) / weights.sum((-2, -1)).clamp_min(1e-12)
        found += [(far, read.layer_index, read.memory, head, len(mean)) for head, far in enumerate(mean.tolist())]
    gone = sorted(found, reverse=True)[: round(share * len(found))]
    for _, block, name, head, heads in gone:
        memories[block, name].o_proj.weight.unflatten(1, (heads, -1))[:, head] = 0
    return [(block, name, head) for _, block, name, head, _ in gone]
