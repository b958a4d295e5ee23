"""What a recipe would cost, without running it: `mosaics train --dry-run`."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from mosaics.training.distribution import pretended, shard
from mosaics.training.recipe import Recipe
from mosaics.training.setup import build_config, check_model, check_sharing, pick_device, pick_precision, start_source


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's figures: memory in bytes, and operations a second of matrix products in bfloat16 with
    float32 sums, without sparsity (data sheets quote twice that, with sparsity)."""

    memory: float
    flops: float


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, and DGX B200 (an eighth of its memory and operations).
GPUS = {
    "a100": Gpu(80e9, 312e12),
    "h100": Gpu(80e9, 989e12),
    "h200": Gpu(141e9, 989e12),
    "b200": Gpu(180e9, 2250e12),
}


def plan(
    recipe: Recipe, *, gpu: str | None = None, gpus: int | None = None, utilisation: float = 0.4
) -> dict[str, Any]:
    """Tokens, steps, parameters, work and memory of a run; the model is built (and sharded) on the meta device.

    Args:
        recipe: the recipe.
        gpu: a name in `GPUS`; gives the time.
        gpus: devices over which the model is sharded, one process each; by default 1.
        utilisation: share of the GPUs' peak that is reached, recomputed work included.

    Returns:
        `steps`, `tokens_per_step`, `tokens`, `parameters`, `vocabulary`, `training_flops` (forward and
        backward, recomputation included where activations are checkpointed), `memory_bytes` (what one
        device holds, by kind), with `gpu` also `seconds` and `gpu_memory_bytes`, and `assumptions` in words.

    Raises:
        ValueError: the model can't be built or doesn't fit the recipe, the devices can't share the batch, or the GPU
            is unknown.
    """
    training, devices = recipe.training, 1 if gpus is None else gpus
    if gpu is not None and gpu.lower() not in GPUS:
        raise ValueError(f"--gpu {gpu} is not known; choose one of {', '.join(GPUS)}")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is {utilisation}; give a share of the peak above 0 and up to 1")
    if devices < 1:
        raise ValueError(f"--gpus is {devices}; give 1 or more")
    check_sharing(recipe, devices)
    config = build_config(recipe, source=start_source(recipe))
    half = training.precision == "bfloat16" or (
        training.precision == "auto"
        and (gpu is not None or pick_precision(training, pick_device(training)) == torch.bfloat16)
    )
    dtype = torch.bfloat16 if half else torch.float32
    model = check_model(config, training.context_length)
    described = model.describe(context_length=training.context_length)
    parameters = described["parameters"]["total"]
    held, gathered = parameters, 0
    if devices > 1:
        with pretended(devices) as group:
            units = shard(model, group, torch.device("meta"), dtype)
            held = sum(parameter.to_local().numel() for parameter in model.parameters())
        sizes = [size for _, size in units]
        blocks = len(model.model.stack.blocks)
        inner = sum(size for name, size in units if name.startswith("model.stack.blocks."))
        gathered = sum(sizes) - inner + 2 * inner // blocks + max(sizes)
    tokens = training.last_step * recipe.tokens_per_step
    share = training.batch_size // devices
    micro = min(training.micro_batch_size or share, share)
    positions = micro * training.context_length
    layers, width = config.num_hidden_layers, config.hidden_size
    # What a step keeps beside its memories: what enters and leaves its norm, and the sum, in float32.
    steps = sum(len(block.steps) for block in model.model.stack.blocks)
    of_memories = model.model.stack.activation_bytes(2 if half else 4)
    read = model.model.stack.share()  # positions for each token
    block = positions * (of_memories + read * 3 * 4 * width * steps) / layers
    boundaries = positions * read * layers * width * 4
    memory = {
        "parameters": 4 * held,
        "gradients": 4 * held,
        "optimizer": 8 * held,
    }
    if gathered:
        memory["gathered"] = gathered
    memory |= {
        "activations": block + boundaries if training.activation_checkpointing else block * layers,
        "logits": positions * config.vocab_size * (2 if half else 4) + positions * config.vocab_size * 4,
    }
    flops = tokens * described["flops_per_token"] * (4 if training.activation_checkpointing else 3)
    planned = {
        "steps": training.last_step,
        "tokens_per_step": recipe.tokens_per_step,
        "tokens": tokens,
        "parameters": parameters,
        "parameters_by_kind": described["parameters"]["by_kind"],
        "vocabulary": config.vocab_size,
        "context_length": training.context_length,
        "batch_size": training.batch_size,
        "devices": devices,
        "micro_batches": math.ceil(share / micro),
        "training_flops": flops,
        "memory_bytes": memory | {"total": sum(memory.values())},
        "assumptions": [
            "parameters, gradients and AdamW's two averages in float32 (16 bytes a parameter)",
            f"{micro} x {training.context_length} tokens at a time, matrix products in "
            f"{'bfloat16' if half else 'float32'}, the residual stream and the loss in float32",
            "activations are checkpointed: each block's input is kept, one block is recomputed at a time"
            if training.activation_checkpointing
            else "the activations of all blocks are kept",
            f"a block keeps about {block / positions:,.0f} bytes a token (what enters and leaves maps and norms, and "
            "what its memories add)",
            "scratch memory of kernels and allocator comes on top",
        ],
    }
    if gathered:
        planned["assumptions"].insert(
            1,
            f"fully sharded over {devices} devices; gathered at a time: what lies outside the blocks, two blocks, "
            "and the gradient of the largest unit",
        )
    if gpu is not None:
        peak = GPUS[gpu.lower()]
        planned |= {"seconds": flops / (devices * peak.flops * utilisation), "gpu_memory_bytes": peak.memory}
        planned["assumptions"].append(
            f"{utilisation:.0%} of the {peak.flops / 1e12:,.0f} TFLOP/s (bfloat16, dense) of {gpu.upper()} is reached, "
            "communication, validation and checkpoints included; it has not been measured for this software"
        )
    return planned
