"""One optimisation step."""

import math
from dataclasses import dataclass

import torch

from mosaics.training.distribution import Group
from mosaics.training.draws import seed_step
from mosaics.training.optimizer import learning_rate
from mosaics.training.recipe import Recipe
from mosaics.training.setup import autocast


class NonFinite(ValueError):
    """A loss or a gradient that is infinite or not a number."""


@dataclass(frozen=True)
class StepResult:
    """What a step did: `loss` in nats per counted target, the gradient's norm before clipping, the random number
    that the long-term delay follows from, the learning rate and the number of counted targets."""

    loss: float
    gradient_norm: float
    draw: float
    learning_rate: float
    targets: int


def optimisation_step(
    model, optimizer: torch.optim.Optimizer, data, recipe: Recipe, step: int, dtype, group: Group | None = None
) -> StepResult:
    """Do one optimisation step in place.

    The loss is the mean over all counted targets of the step, however it is cut into micro-batches and processes. The
    delay depends on (seed, step) alone and serves all layers, micro-batches and processes; the dropout of a
    micro-batch depends on (seed, step, its first row).

    Args:
        model: a `MosaicForCausalLM` in training mode.
        optimizer: as `make_optimizer` gives.
        data: a `PackedDataset`; the step takes its sequences `(step-1)·batch_size … step·batch_size-1`, of which every
            process reads an equal, contiguous share.
        recipe: the recipe.
        step: counted from 1.
        dtype: dtype of the matrix products.
        group: the processes over which the model is sharded, all of which call this.

    Raises:
        NonFinite: the loss or the gradient is not finite; the parameters are untouched.
        ValueError: there is no target.
    """
    from mosaics.models import laid_out
    from mosaics.models.draws import draw_step

    group = group or Group()
    training = recipe.training
    first, share = (step - 1) * training.batch_size, training.batch_size // group.size
    row, size = group.rank * share, training.micro_batch_size or share  # rows count from the step's first
    batch = data.batch(first + row, share)
    inputs = ("input_ids", "document_ids", "attention_mask", "labels")
    batch = {key: batch[key].to(model.device) for key in inputs if batch[key] is not None}
    starts = range(0, share, size)
    micro_batches = [laid_out(**{key: rows[n : n + size] for key, rows in batch.items()}) for n in starts]
    counts = torch.stack([(rows["shift_labels"] != -100).sum() for rows in micro_batches]).tolist()
    [targets] = group.sum(sum(counts))
    where = f"of step {step} (sequences {first} to {first + training.batch_size - 1} of the stream)"
    if not targets:
        raise ValueError(f"no token {where} can be predicted; the documents are too short")
    draw = draw_step(recipe.seed, step)
    parts = []
    for start, rows, count in zip(starts, micro_batches, counts, strict=True):
        if not count and group.size == 1:  # several processes have to go through the model together
            continue
        seed_step(recipe.seed, step, row + start)
        with autocast(model.device, dtype):
            output = model(**rows, use_cache=False, draw=draw, loss_only=True)
        part = output.loss * (count / targets)
        part.backward()
        parts.append(part.detach())
    loss = 0.0
    for part in torch.stack(parts).tolist():  # the host waits once
        loss += part
    [loss] = group.sum(loss)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        what = f"the gradient's norm {where} is {norm}" if math.isfinite(loss) else f"the loss {where} is {loss}"
        raise NonFinite(f"{what}; lower training.learning_rate or lengthen training.warmup_steps in a new run")
    rate = learning_rate(step, training)
    for options in optimizer.param_groups:
        options["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss, norm, draw, rate, int(targets))
