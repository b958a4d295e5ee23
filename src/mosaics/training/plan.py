"""What a recipe would cost, without running it: `mosaics train --dry-run`."""

import math
from typing import Any

from mosaics.training.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Tokens, steps, parameters, work and memory of a run; the model is built on the meta device.

    Returns:
        `steps`, `tokens_per_step`, `tokens`, `parameters`, `vocabulary`, `training_flops` (forward and
        backward, recomputation included where activations are checkpointed), and `memory_bytes`: what one
        device holds when nothing is sharded, by kind, with `assumptions` in words.

    Raises:
        ValueError: the model can't be built or doesn't fit the recipe.
    """
    from mosaics.training.setup import build_config, build_model

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
    value = 4 if training.precision == "float32" else 2
    # Live in one block between forward and backward: norms, keys, averaged keys, values and reads of two
    # contextual memories, the sums (16 widths), and three inner vectors of the feed-forward network.
    block = positions * (16 * width + 3 * hidden) * value
    boundaries = positions * layers * width * 4
    memory = {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": boundaries + block * (1 if training.activation_checkpointing else layers),
        "logits": positions * config.vocab_size * (value + 4),
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
            f"one micro-batch of {micro} x {training.context_length} tokens at a time, activations "
            f"in {'float32' if value == 4 else 'bfloat16'}, the residual stream and the loss in float32",
            "activations are checkpointed at each block: its input is kept, one block is recomputed at a time"
            if training.activation_checkpointing
            else "activations of all blocks are kept (16 widths and 3 inner vectors a token and block)",
            "an estimate: scratch memory of the kernels and of the allocator comes on top",
        ],
    }
