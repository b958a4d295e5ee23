"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from mosaics.training.recipe import TrainingSection


def make_optimizer(model: nn.Module, training: TrainingSection) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (Appendix C; scalars, norms and biases are not decayed).

    Args:
        model: offers `undecayed_parameters()`, the names of parameters that are not weight-decayed.
        training: learning rate, betas, eps and weight decay.
    """
    undecayed = model.undecayed_parameters()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name not in undecayed], "weight_decay": training.weight_decay},
        {"params": [p for name, p in named if name in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        fused=True,
    )


def learning_rate(step: int, training: TrainingSection) -> float:
    """The learning rate of a step (counted from 1): linear warm-up, then a cosine to the final ratio; after the steps
    of the recipe itself what its extensions say."""
    begin, rate = 0, 0.0
    for steps, schedule in [(training.steps, "rewarm"), *((e.steps, e.schedule) for e in training.extensions)]:
        if schedule == "rewarm":
            rate = _warmed(min(step - begin, steps), steps, rate, training)
        begin += steps
        if step <= begin:
            break
    return rate


def _warmed(step: int, steps: int, start: float, training: TrainingSection) -> float:
    """From `start` to the peak, then down again until `steps` are done."""
    if step <= training.warmup_steps:
        return start + (training.learning_rate - start) * step / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
    final = training.final_learning_rate_ratio
    return training.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
