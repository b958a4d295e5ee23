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
    from transformers import PreTrainedTokenizerBase

    from mosaics import MosaicConfig, MosaicForCausalLM


def build_config(recipe: Recipe, tokenizer=None) -> "MosaicConfig":
    """The model's configuration: the recipe's preset and overrides, fitted to the tokenizer.

    Args:
        recipe: the recipe. `model.vocab_size` defaults to the tokenizer's size,
            `model.max_position_embeddings` to the training context.
        tokenizer: the tokenizer of the data; None before there is one (its size is then what the recipe
            says).

    Raises:
        ValueError: an unknown preset or option, or a tokenizer that is larger than the model's vocabulary.
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
    if tokenizer is not None:
        _check_vocabulary("the tokenizer has", len(tokenizer), config.vocab_size)
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


def check_model(config: "MosaicConfig", context_length: int) -> "MosaicForCausalLM":
    """The model without any storage, if it can be built and trained at so many tokens.

    Raises:
        ValueError: the sizes are impossible, or a memory makes no sense at that length.
    """
    model = build_model(config, meta=True)
    model.model.stack.check(context_length)
    return model


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


def known_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of the data, if that can be said before the corpus is read; None if it will be trained on it.

    Raises:
        ValueError: the model's vocabulary is too small for it.
        OSError: there is none where the recipe says.
    """
    from mosaics.data import PreparedCorpus, load_tokenizer

    if recipe.data.prepared is not None:
        tokenizer = PreparedCorpus(recipe.data.prepared).tokenizer()
    elif recipe.data.tokenizer is not None:
        tokenizer = load_tokenizer(recipe.data.tokenizer)
    else:
        largest, given = recipe.data.vocabulary_size, recipe.model.overrides().get("vocab_size")
        _check_vocabulary("data.vocabulary_size asks for", largest, largest if given is None else given)
        return None
    build_config(recipe, tokenizer)
    return tokenizer


def _check_vocabulary(whose: str, tokens: int, vocab_size: int) -> None:
    if tokens > vocab_size:
        raise ValueError(
            f"{whose} {tokens} tokens and model.vocab_size is {vocab_size}; set it to at least {tokens}, or to null"
        )


def prepare_data(recipe: Recipe, folder: Path, tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Prepare the recipe's corpus into `folder`, unless the recipe names a prepared folder; `tokenizer` is the known
    one."""
    if recipe.data.prepared is not None:
        return
    from mosaics.data import open_corpus, prepare

    data = recipe.data
    report = prepare(
        open_corpus(data.corpus, field=data.field),
        folder,
        tokenizer=tokenizer,
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
