"""What the memories of a model do on held-out text, as a few numbers that are logged with the validation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosaics.training.distribution import Group
from mosaics.training.setup import autocast

POSITIONS = 256  # tokens of the row that is looked at: weights over pairs are as many as their square


@torch.no_grad()
def memory_statistics(model, data, dtype=torch.float32, group: Group | None = None) -> list[dict[str, Any]]:
    """Numbers of every memory over the first positions of one held-out row, at evaluation.

    Args:
        model: a causal language model; its mode is put back afterwards.
        data: a `PackedDataset` of the validation split.
        dtype: dtype of the matrix products (autocast unless float32).
        group: the processes over which the model is sharded, all of which call this.

    Returns:
        For each number of each memory `layer` (from 0), `memory`, `number` (its name: `pairs read` is the number of
        pairs that a read spreads over, the exponential of the entropy of its weights; others are what the memory
        shows), and over heads and positions `mean`, `low` and `high` (the tenth and the ninetieth percentile).
    """
    from mosaics.memories.contract import Context

    group, training = group or Group(), model.training
    row = data.batch(0, 1)
    inputs = {
        key: row[key][:, :POSITIONS].to(model.device)
        for key in ("input_ids", "document_ids", "attention_mask")
        if row.get(key) is not None
    }
    context = Context(reads=[])
    model.eval()
    try:
        with autocast(model.device, dtype):
            model(**inputs, use_cache=False, context=context, logits_to_keep=1)
    finally:
        model.train(training)
        if group.size > 1:
            model.reshard()
    found: dict[tuple[int, str, str], dict[str, Any]] = {}
    for read in context.reads:
        numbers = dict(getattr(read, "traces", {}))
        weights = read.weights
        if weights is not None:
            numbers["pairs read"] = pairs_read(weights)
        for name, values in numbers.items():
            about = {"layer": read.layer_index, "memory": read.memory, "number": name}
            if (line := _line(values)) is not None:
                found.setdefault((read.layer_index, read.memory, name), about | line)
    return list(found.values())


def pairs_read(weights: Tensor) -> Tensor:
    """How many pairs each read spreads over, `(batch, heads, time)`, from `weights` `(batch, heads, time, slots)`;
    not a number where there was nothing to read."""
    weights = weights.float()
    total = weights.sum(-1, keepdim=True)
    share = weights / total
    entropy = -torch.special.xlogy(share, share).nan_to_num().sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), torch.nan)


def _line(values: Tensor) -> dict[str, float] | None:
    values = values.float().flatten()
    values = values[values.isfinite()].cpu()
    if not len(values):
        return None
    low, high = values.quantile(torch.tensor([0.1, 0.9])).tolist()
    return {"mean": round(float(values.mean()), 6), "low": round(low, 6), "high": round(high, 6)}
