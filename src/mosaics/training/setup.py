"""From a recipe to the objects of a run: configuration, model, data, device and precision."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mosaics.training.distribution import Group, shard, spread
from mosaics.training.draws import seed_step
from mosaics.training.recipe import Recipe, TrainingSection

if TYPE_CHECKING:
    from mosaics import MosaicConfig, MosaicForCausalLM


def build_config(recipe: Recipe, tokenizer=None) -> "MosaicConfig":
    """The model's configuration: the recipe's preset and overrides, fitted to the tokenizer.

    Args:
        recipe: the recipe. `model.vocab_size` defaults to the tokenizer's size,
            `model.max_position_embeddings` to the training context.
        tokenizer: the tokenizer of the data; None before there is one (its size is then what the recipe
            says).

    Raises:
        ValueError: an unknown preset or option, a tokenizer that is larger than the model's vocabulary, or a
            training context that is not longer than the long-term delay.
    """
    import mosaics

    overrides = recipe.model.overrides()
    overrides.setdefault("max_position_embeddings", recipe.training.context_length)
    if overrides.get("vocab_size") is None:
        overrides["vocab_size"] = recipe.data.vocabulary_size if tokenizer is None else len(tokenizer)
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if overrides.get(name) is None and getattr(tokenizer, name) is not None:
                overrides[name] = getattr(tokenizer, name)
    config = mosaics.MosaicConfig.from_preset(recipe.model.preset, **overrides)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and model.vocab_size is {config.vocab_size}; set it "
            f"to at least {len(tokenizer)}, or to null"
        )
    delays = [getattr(config, "delay", 0), *getattr(config, "train_delay", ())]
    if recipe.training.context_length <= max(delays):
        raise ValueError(
            f"training.context_length is {recipe.training.context_length}, not longer than the long-term "
            f"delay of up to {max(delays)}, so that memory would stay empty; make it longer or lower "
            "model.train_delay and model.delay"
        )
    return config


def build_model(config: "MosaicConfig", *, meta: bool = False) -> "MosaicForCausalLM":
    """A model with fresh parameters, or without any storage on the meta device.

    Raises:
        ValueError: the sizes are impossible.
    """
    import mosaics

    try:
        with torch.device("meta") if meta else nullcontext():
            return mosaics.MosaicForCausalLM(config)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(f"no tensor can be as large as the model's sizes say ({error}); lower them") from None


def check_sharing(recipe: Recipe, processes: int) -> None:
    """Refuse a number of processes that can't share a batch equally.

    Raises:
        ValueError: it is so.
    """
    if recipe.training.batch_size % processes:
        raise ValueError(
            f"training.batch_size is {recipe.training.batch_size}, which {processes} processes can't share equally; "
            "take as many as divide it"
        )


def place_model(
    config: "MosaicConfig", seed: int, device: torch.device, dtype: torch.dtype, group: Group, *, fresh: bool
) -> "MosaicForCausalLM":
    """The model of a run on its device, sharded if there are several processes.

    Args:
        config: the model's configuration.
        seed: decides the fresh parameters, which are the same for any number of processes.
        device: this process's.
        dtype: dtype of the matrix products.
        group: the processes.
        fresh: False leaves the values of a sharded model open, for a checkpoint to fill in.
    """
    whole = None
    if group.size == 1 or (fresh and group.rank == 0):  # the first process needs memory for the whole model
        seed_step(seed, 0)
        whole = build_model(config)
    if group.size == 1:
        return whole.to(device)
    model = build_model(config, meta=True)
    shard(model, group, device, dtype)
    if fresh:
        spread(model, whole)
    return model


def prepare_data(recipe: Recipe, folder: Path) -> None:
    """Prepare the recipe's corpus into `folder`, unless the recipe names a prepared folder."""
    if recipe.data.prepared is not None:
        return
    from mosaics.data import open_corpus, prepare

    data = recipe.data
    report = prepare(
        open_corpus(data.corpus, field=data.field),
        folder,
        tokenizer=data.tokenizer,
        vocab_size=data.vocabulary_size,
        validation=data.validation,
        seed=recipe.seed,
        show_progress=sys.stderr.isatty(),
    )
    print(report, flush=True)


def pick_device(training: TrainingSection) -> torch.device:
    """The device of a run.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if training.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("training.device is cuda, but torch sees no CUDA device; use auto or cpu")
    if training.device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        name = training.device
    here = os.environ.get("LOCAL_RANK")  # torchrun gives every process of a machine a GPU of its own
    return torch.device(name, int(here)) if name == "cuda" and here is not None else torch.device(name)


def pick_precision(training: TrainingSection, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where the processor multiplies it natively."""
    if training.precision != "auto":
        return getattr(torch, training.precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype`, or nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
