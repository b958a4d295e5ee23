"""From a recipe to the objects of a run: configuration, model, data, device and precision."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mosaics.system import default_device
from mosaics.training.distribution import Group, shard, spread
from mosaics.training.draws import seed_step
from mosaics.training.recipe import Recipe, TrainingSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mosaics import MosaicConfig, MosaicForCausalLM
    from mosaics.training.sources import Source


def build_config(recipe: Recipe, tokenizer=None, source: "Source | None" = None) -> "MosaicConfig":
    """The model's configuration: the recipe's preset and overrides, fitted to the tokenizer.

    Args:
        recipe: the recipe. `model.vocab_size` defaults to that of the source or else the tokenizer's size,
            `model.max_position_embeddings` to the training context.
        tokenizer: the tokenizer of the data; None before there is one (its size is then what the recipe
            says).
        source: the model that training begins with, whose arrangement a recipe without a preset takes.

    Raises:
        ValueError: an unknown preset or option, or a tokenizer that is larger than the model's vocabulary.
    """
    import mosaics

    overrides = recipe.model.overrides()
    overrides.setdefault("max_position_embeddings", recipe.training.context_length)
    if overrides.get("vocab_size") is None:
        size = recipe.data.vocabulary_size if tokenizer is None else len(tokenizer)
        overrides["vocab_size"] = size if source is None else source.config().vocab_size
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if overrides.get(name) is None and getattr(tokenizer, name) is not None:
                overrides[name] = getattr(tokenizer, name)
    if recipe.model.preset is not None:
        config = mosaics.MosaicConfig.from_preset(recipe.model.preset, **overrides)
    elif source is not None:
        config = source.config().changed(source.name, **overrides)
    else:
        raise ValueError("model.preset is null, which takes the model of training.init_from; set that, or a preset")
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
    model.model.check(context_length)
    return model


def start_source(recipe: Recipe) -> "Source | None":
    """The model that training begins with, if the recipe names one.

    Raises:
        ValueError: it is damaged, or no mosaic.
        OSError: there is none.
    """
    import mosaics
    from mosaics.training.sources import find_source

    if recipe.training.init_from is None:
        return None
    source = find_source(recipe.training.init_from)
    if not isinstance(config := source.config(), mosaics.MosaicConfig):
        raise ValueError(
            f"training.init_from: {source.name} is a {config.model_type}; a Llama becomes a mosaic by "
            f"mosaics convert {source.name} --to mosaic --output FOLDER"
        )
    return source


def check_start(source: "Source", model: "MosaicForCausalLM") -> None:
    """Refuse a model without storage that can't take the weights of the one that training begins with.

    Raises:
        ValueError: they are damaged, or one is missing or of another shape; it says which, and which settings differ.
    """
    theirs = source.model()  # read twice, so that nothing is begun with damaged ones
    there, here = ({name: tuple(p.shape) for name, p in each.named_parameters()} for each in (theirs, model))
    odd = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if odd:
        settings = changed_settings(theirs.config, model.config)
        raise ValueError(
            f"training.init_from: {source.name} does not fit: {odd[0]} is {there.get(odd[0], 'not')} there and "
            f"{here.get(odd[0], 'not')} here ({'; '.join(settings[:4])}); change the recipe's model, or set "
            "model.preset to null and leave out its sizes to take those that are there"
        )


def changed_settings(old: "MosaicConfig", new: "MosaicConfig") -> list[str]:
    """What differs between two configurations, such as ``hidden_size 16 there and 32 here``."""
    there, here = old.settings(), new.settings()
    return [
        f"{key} {there.get(key, 'unset')} there and {here.get(key, 'unset')} here"
        for key in {**there, **here}
        if there.get(key, "unset") != here.get(key, "unset")
    ]


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
    config: "MosaicConfig",
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    group: Group,
    *,
    fresh: bool,
    source: "Source | None" = None,
) -> "MosaicForCausalLM":
    """The model of a run on its device, sharded if there are several processes.

    Args:
        config: the model's configuration.
        seed: decides the fresh parameters, which are the same for any number of processes.
        device: this process's.
        dtype: dtype of the matrix products.
        group: the processes.
        fresh: False leaves the values of a sharded model open, for a checkpoint to fill in.
        source: whose weights the first process gives to a fresh model.
    """
    whole = None
    if group.size == 1 or (fresh and group.rank == 0):  # the first process needs memory for the whole model
        seed_step(seed, 0)
        whole = build_model(config)
        if fresh and source is not None:
            whole.load_state_dict(source.model().state_dict())
    if group.size == 1:
        return whole.to(device)
    model = build_model(config, meta=True)
    shard(model, group, device, dtype)
    if fresh:
        spread(model, whole)
    return model


def known_tokenizer(recipe: Recipe, source: "Source | None" = None) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of the data, if that can be said before the corpus is read; None if it will be trained on it.

    Args:
        recipe: the recipe.
        source: the model that training begins with; its tokenizer is that of the data unless the recipe names another,
            which must be the same.

    Raises:
        ValueError: the model's vocabulary is too small for it, or it is not that of the source.
        OSError: there is none where the recipe says.
    """
    from mosaics.data import PreparedCorpus, load_tokenizer

    own = None if source is None else source.tokenizer()
    if recipe.data.prepared is not None:
        tokenizer = PreparedCorpus(recipe.data.prepared).tokenizer()
    elif recipe.data.tokenizer is not None:
        tokenizer = load_tokenizer(recipe.data.tokenizer)
    elif own is not None:
        tokenizer = own
    elif source is not None:
        raise ValueError(f"training.init_from: {source.name} has no tokenizer; name it with data.tokenizer")
    else:
        largest, given = recipe.data.vocabulary_size, recipe.model.overrides().get("vocab_size")
        _check_vocabulary("data.vocabulary_size asks for", largest, largest if given is None else given)
        return None
    if own is not None and (difference := _tokenizer_difference(own, tokenizer)):
        raise ValueError(
            f"training.init_from: the tokenizer of {source.name} is not that of the data ({difference}); prepare the "
            f"text with it: data.tokenizer {source.tokenizer_place}"
        )
    build_config(recipe, tokenizer, source)
    return tokenizer


def _tokenizer_difference(there, here) -> str | None:
    for name in ("bos_token", "eos_token"):
        if getattr(there, name) != getattr(here, name):
            return f"{name} is {getattr(there, name)!r} there and {getattr(here, name)!r} here"
    if len(there) != len(here):
        return f"{len(there)} tokens there and {len(here)} here"
    theirs, ours = there.get_vocab(), here.get_vocab()
    odd = min((token for token in {**theirs, **ours} if theirs.get(token) != ours.get(token)), default=None)
    return None if odd is None else f"token {odd!r} is number {theirs.get(odd)} there and {ours.get(odd)} here"


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


def pick_device(training: TrainingSection, key: str = "training.device") -> torch.device:
    """The device of a run.

    Raises:
        ValueError: CUDA or MPS is asked for and not there; `key` is what asked.
    """
    name = training.device
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{key} is cuda, but torch sees no CUDA device; use auto or cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{key} is mps, but torch sees no GPU of a Mac; use auto or cpu")
    here = os.environ.get("LOCAL_RANK")  # torchrun gives every process of a machine a GPU of its own
    if name == "auto":
        name = default_device()
        name = "cpu" if name == "mps" and here is not None else name  # its processes can't talk to each other
    return torch.device(name, int(here)) if name == "cuda" and here is not None else torch.device(name)


def pick_precision(training: TrainingSection, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where the processor multiplies it natively."""
    if training.precision != "auto":
        return getattr(torch, training.precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        native = False
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype`, or nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
