"""How soon a small Memory Mosaics v2 recalls: 50 steps on pairs that exist only in their sequence.

python benchmarks/recall.py [SEED]      # about two minutes on one core

A row holds 24 key-value pairs among 100 keys, then asks for them again until it is full; accuracy is that of the asked
values, at the training length and at eight times that.
"""

import sys

import torch

from mosaics import MosaicConfig, MosaicForCausalLM

KEYS = VALUES = 100
PAIRS, LENGTH, ROWS, STEPS = 24, 256, 32, 50


def rows(count: int, length: int, pairs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels `(count, length)`; only asked values are labelled."""
    ids = torch.zeros(count, length, dtype=torch.long)
    labels = torch.full((count, length), -100)
    for row in range(count):
        keys = torch.randperm(KEYS, generator=generator)[:pairs] + 1
        values = torch.randint(VALUES, (pairs,), generator=generator) + 1 + KEYS
        asked = torch.randint(pairs, (length // 2 - pairs,), generator=generator)
        order = torch.cat([torch.arange(pairs), asked])
        ids[row, 0::2], ids[row, 1::2] = keys[order], values[order]
        labels[row, 2 * pairs + 1 :: 2] = values[asked]
    return ids, labels


@torch.no_grad()
def accuracy(model: MosaicForCausalLM, length: int, pairs: int, generator: torch.Generator) -> float:
    """Share of asked values that are the likeliest token of the whole vocabulary, in 8 rows."""
    ids, labels = rows(8, length, pairs, generator)
    predicted = model.eval()(ids, use_cache=False).logits[:, :-1].argmax(-1)
    model.train()
    counted = labels[:, 1:] != -100
    return (predicted == labels[:, 1:])[counted].double().mean().item()


def train(seed: int, generator: torch.Generator, steps: int = STEPS) -> MosaicForCausalLM:
    """A model after `steps` steps, on rows that `generator` draws."""
    torch.manual_seed(seed)
    config = MosaicConfig.from_preset(
        "memory-mosaics-v2-tiny",
        vocab_size=1 + KEYS + VALUES,
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=256,
        window=32,
        delay=8,
        train_delay=[8, 32],
    )
    model = MosaicForCausalLM(config).train()
    undecayed = model.undecayed_parameters()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in undecayed], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    for _ in range(steps):
        ids, labels = rows(ROWS, LENGTH, PAIRS, generator)
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
    return model


def main(seed: int) -> None:
    """Train and print."""
    generator = torch.Generator().manual_seed(seed)
    model = train(seed, generator)
    print(f"{model.num_parameters():,} parameters, {STEPS} steps, seed {seed}")
    for length, pairs in ((LENGTH, PAIRS), (8 * LENGTH, PAIRS), (8 * LENGTH, 90)):
        print(f"{length:>5} tokens, {pairs} pairs: {accuracy(model, length, pairs, generator):.1%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
