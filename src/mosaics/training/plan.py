"""What a recipe would cost, without running it: `mosaics train --dry-run`."""

import math
from typing import Any

import torch

from mosaics.training.recipe import Recipe
from mosaics.training.setup import build_config, build_model, pick_device, pick_precision


def plan(recipe: Recipe) -> dict[str, Any]:
    """Tokens, steps, parameters, work and memory of a run; the model is built on the meta device.

    Returns:
        `steps`, `tokens_per_step`, `tokens`, `parameters`, `vocabulary`, `training_flops` (forward and
        backward, recomputation included where activations are checkpointed), and `memory_bytes`: what one
        device holds when nothing is sharded, by kind, with `assumptions` in words.

    Raises:
        ValueError: the model can't be built or doesn't fit the recipe.
    """
    training = recipe.training
    config = build_config(recipe)
    model = build_model(config, meta=True)
    described = model.describe(context_length=training.context_length)
    parameters = described["parameters"]["total"]
    tokens = training.steps * recipe.tokens_per_step
    micro = min(training.micro_batch_size or training.batch_size, training.batch_size)
    positions = micro * training.context_length
    layers, width = config.num_hidden_layers, config.hidden_size
    hidden = getattr(config, "intermediate_size", 0)
    half = pick_precision(training, pick_device(training)) == torch.bfloat16
    of_width, of_inner = (104, 10) if half else (132, 12)
    block = positions * (of_width * width + of_inner * hidden)
    boundaries = positions * layers * width * 4
    memory = {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": block + boundaries if training.activation_checkpointing else block * layers,
        "logits": positions * config.vocab_size * (2 if half else 4) + positions * config.vocab_size * 4,
    }
    return {
        "steps": training.steps,
        "tokens_per_step": recipe.tokens_per_step,
        "tokens": tokens,
        "parameters": parameters,
        "parameters_by_kind": described["parameters"]["by_kind"],
        "vocabulary": config.vocab_size,
        "context_length": training.context_length,
        "batch_size": training.batch_size,
        "micro_batches": math.ceil(training.batch_size / micro),
        "training_flops": tokens * described["flops_per_token"] * (4 if training.activation_checkpointing else 3),
        "memory_bytes": memory | {"total": sum(memory.values())},
        "assumptions": [
            "parameters, gradients and AdamW's two averages in float32 (16 bytes a parameter)",
            f"{micro} x {training.context_length} tokens at a time, matrix products in "
            f"{'bfloat16' if half else 'float32'}, the residual stream and the loss in float32",
            "activations are checkpointed: each block's input is kept, one block is recomputed at a time"
            if training.activation_checkpointing
            else "the activations of all blocks are kept",
            f"a block keeps {of_width} bytes a token and unit of width and {of_inner} a unit of the feed-forward "
            "network (measured: what autograd saves for a block of Memory Mosaics v2)",
            "scratch memory of kernels and allocator comes on top",
        ],
    }
