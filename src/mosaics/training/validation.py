"""The loss on held-out text, and how the model goes on from its beginnings."""

import math
from typing import Any

import torch
from torch.nn import functional as F

from mosaics.ops import widest
from mosaics.training.distribution import Group
from mosaics.training.draws import seed_step
from mosaics.training.setup import autocast

PROMPT, WRITTEN = 16, 64  # tokens of a sample: given, and written at most


@torch.no_grad()
def evaluate(
    model,
    data,
    *,
    sequences: int | None = None,
    batch_size: int = 8,
    dtype=torch.float32,
    group: Group | None = None,
) -> dict[str, Any]:
    """Measure the loss on held-out text with the model's evaluation delay.

    Bits per byte are the nats of all predicted text tokens / ln 2 / the UTF-8 bytes of those tokens, which
    does not depend on the tokenizer. End-of-text targets are no text: they are counted apart.

    Args:
        model: a causal language model; its mode is put back afterwards.
        data: a `PackedDataset` of the validation split.
        sequences: how many sequences (drawn without replacement by the data's seed); None takes all.
        batch_size: sequences at a time.
        dtype: dtype of the matrix products (autocast unless float32).
        group: the processes over which the model is sharded, all of which call this; each takes its batches.

    Returns:
        `validation_nats_per_token`, `validation_bits_per_byte`, `validation_end_of_text_nats` (per
        end-of-text target, None without one), `validation_tokens` and `validation_bytes` (both of predicted
        text).

    Raises:
        ValueError: the held-out text has no token to predict.
    """
    group = group or Group()
    count = len(data) if sequences is None else min(sequences, len(data))
    text_nats = end_nats = 0.0
    text_tokens = end_tokens = text_bytes = 0
    training = model.training
    model.eval()
    try:
        for start in range(0, count, batch_size * group.size):
            first = start + group.rank * batch_size
            left_over = first >= count  # the others need this process to go through the model with them
            batch = data.batch(0, 1) if left_over else data.batch(first, min(batch_size, count - first))
            batch = {key: value.to(model.device) for key, value in batch.items() if value is not None}
            inputs = {key: batch[key] for key in ("input_ids", "document_ids", "attention_mask") if key in batch}
            with autocast(model.device, dtype):
                logits = model(**inputs, use_cache=False).logits
            if left_over:
                continue
            targets, is_text, is_end = (batch[k][:, 1:] for k in ("input_ids", "text_targets", "end_targets"))
            nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
            nats = nats.to(widest(nats))
            text_nats += float(nats[is_text].sum())
            end_nats += float(nats[is_end].sum())
            text_tokens += int(is_text.sum())
            end_tokens += int(is_end.sum())
            text_bytes += int(batch["text_bytes"].sum())
    finally:
        model.train(training)
        if group.size > 1:
            model.reshard()  # what lies outside the blocks stays gathered after a forward pass, for a backward pass
    text_nats, end_nats = group.sum(text_nats, end_nats)
    text_tokens, end_tokens, text_bytes = map(int, group.sum(text_tokens, end_tokens, text_bytes))
    if not text_bytes:
        raise ValueError("the held-out text has no token to predict; give a larger corpus or a larger data.validation")
    return {
        "validation_bits_per_byte": text_nats / math.log(2) / text_bytes,
        "validation_nats_per_token": text_nats / text_tokens,
        "validation_end_of_text_nats": end_nats / end_tokens if end_tokens else None,
        "validation_tokens": text_tokens,
        "validation_bytes": text_bytes,
    }


@torch.no_grad()
def write_samples(
    model, data, tokenizer, count: int, *, seed: int, step: int, dtype=torch.float32, group: Group | None = None
) -> list[str]:
    """Let the model go on from the beginnings of held-out documents; nothing that training draws is changed.

    Args:
        model: a causal language model; its mode is put back afterwards.
        data: a `PackedDataset` of the validation split.
        tokenizer: that of the data.
        count: how many samples; each time from the same documents.
        seed: of the run.
        step: of training; what is drawn depends on both alone.
        dtype: dtype of the matrix products (autocast unless float32).
        group: the processes over which the model is sharded, all of which call this.

    Returns:
        Texts, each with its beginning.
    """
    group, training, texts = group or Group(), model.training, []
    model.eval()
    try:
        for number in range(count):
            row = data.batch(number, 1)
            prompt = row["input_ids"][(row["document_ids"] == 0) & ~row["end_targets"]][None, :PROMPT].to(model.device)
            seed_step(seed, step, number)
            with autocast(model.device, dtype):
                ids = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    pad_token_id=tokenizer.eos_token_id,
                    max_new_tokens=WRITTEN,
                    do_sample=True,
                    temperature=0.8,
                    top_p=0.95,
                    top_k=0,
                    synced_gpus=group.size > 1,
                )
            texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    finally:
        model.train(training)
        if group.size > 1:
            model.reshard()
    return texts
