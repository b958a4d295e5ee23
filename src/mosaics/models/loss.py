"""The loss of a mosaic: which targets count, what the positions that predict them are, and its sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import slice_logits_to_keep

from mosaics.memories import Context, Layout

_PIECE = 1024  # positions whose logits are held at once where only the loss is asked for


def laid_out(
    input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> dict[str, Any]:
    """The arguments of `MosaicForCausalLM.forward` for a batch whose layout and targets are made once: for who has to
    know what is counted before the pass. `shift_labels` are -100 where nothing is.

    A position predicts the label of the next real token of its document; padding between the two changes nothing.

    Raises:
        ValueError: the arguments are not of one shape.
    """
    for name, x in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if x is not None and x.shape != labels.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)} and labels {tuple(labels.shape)}; give the same.")
    layout, order, _ = Layout.of(*labels.shape, attention_mask, document_ids)
    return {"input_ids": input_ids, "layout": (layout, order), "shift_labels": _targets(labels, layout, order)}


def _targets(labels: Tensor, layout: Layout, order: Tensor | None) -> Tensor:
    """The label that each position of rows predicts, whose layout and compact order are known."""
    if order is not None:
        labels = labels.gather(1, order)
    if (padding := layout.is_padding) is not None:
        labels = labels.masked_fill(padding, -100)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    if (first := layout.is_first) is not None:
        targets = targets.masked_fill(F.pad(first[:, 1:], (0, 1), value=True), -100)
    return targets if order is None else torch.empty_like(targets).scatter_(1, order, targets)


def count_targets(labels: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
    """How many targets the loss counts for a batch; the arguments are those of `MosaicForCausalLM.forward`."""
    return (laid_out(labels, labels, attention_mask, document_ids)["shift_labels"] != -100).sum()


def shifted_targets(labels: Tensor | None, shifted: Tensor | None, hidden: Tensor, context: Context) -> Tensor:
    """The label that each position of `hidden` `(batch, time, d)` predicts: those that are shifted already, or made of
    labels and the layout of the pass.

    Raises:
        ValueError: there is not one integer for each position.
    """
    targets = labels if shifted is None else shifted
    if targets.shape != hidden.shape[:2]:
        given = tuple(hidden.shape[:2])
        raise ValueError(f"labels has shape {tuple(targets.shape)} and the input {given}; give one label a position.")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"labels is {targets.dtype}; give integers.")
    targets = targets.long()
    return _targets(targets, context.layout, context.order) if shifted is None else targets


def total_loss(
    targets: Tensor, logits_to_keep: int | Tensor, logits: Tensor | None, hidden: Tensor, classifier: nn.Module
) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropy of targets `(batch, time)` in nats, and how many of them count.

    Args:
        targets: -100 where none counts.
        logits_to_keep: which positions logits and hidden states are of.
        logits: `(batch, kept, vocabulary)`; None: they are made of the hidden states, some at a time.
        hidden: `(batch, kept, d)`.
        classifier: the linear map from hidden states to logits.

    Raises:
        ValueError: a target is no token.
    """
    kept = slice_logits_to_keep(targets[..., None], logits_to_keep)[..., 0]
    try:
        if logits is None:
            total = _loss_in_pieces(classifier, hidden, kept)
        else:
            wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            total = F.cross_entropy(wide, kept.flatten(), reduction="sum")
    except (IndexError, RuntimeError):
        given, words = targets[targets != -100], classifier.weight.shape[0] if logits is None else logits.shape[-1]
        if not given.numel() or 0 <= given.min() <= given.max() < words:
            raise
        raise ValueError(
            f"labels has tokens from {given.min()} to {given.max()}; give tokens from 0 to {words - 1}, or -100 where "
            "none counts."
        ) from None
    return total, (kept != -100).sum()


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map of `x` is computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def pays_in_pieces(classifier: nn.Module, hidden: Tensor) -> bool:
    """Whether the loss is computed in pieces: with a plain linear map (no adapter, no shard), and not in bfloat16 on a
    CPU, where torch would widen the products to float32."""
    narrow = hidden.device.type == "cpu" and _product_dtype(hidden).itemsize < 4
    return type(classifier) is nn.Linear and not narrow


def _loss_in_pieces(classifier: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropy of `hidden` `(batch, time, d)`, and its gradient, `_PIECE` positions at a time.

    Where few targets count, as of answers alone, the others' positions get no logits. (On a GPU that would wait for
    their number, and in a compiled graph no shape may depend on it.)
    """
    dtype = _product_dtype(hidden)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = (targets != -100).nonzero()[:, 0]
        if 0 < 2 * len(counted) < len(targets):
            hidden, targets = hidden[counted], targets[counted]
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=_PIECE, chunking_method=None)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear_cross_entropy(
            hidden.to(dtype),
            classifier.weight.to(dtype),
            targets,
            reduction="sum",
            options=options,
        ).to(torch.promote_types(dtype, torch.float32))
