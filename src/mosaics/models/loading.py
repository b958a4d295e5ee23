"""Models with their tokenizers, from an export, a run or the hub.

Nothing in such a folder is run: weights are safetensors, pickles and code of the folder's own are not looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mosaics.data.hub import where_to_look
from mosaics.memories.contract import check_state_dtype, check_tolerance
from mosaics.models.configuration_mosaic import MosaicConfig

MANIFEST, FORMAT = "manifest.json", "mosaics-exported-model"
DEMO = "demo"  # the model that comes with the package, unless something of that name lies here


def named_folder(name: str | Path) -> Path | None:
    """The folder of a model that comes with the package, by its name; None for any other."""
    return Path(__file__).parent / DEMO if str(name) == DEMO and not Path(name).exists() else None


def load_exported(
    source: str | Path, state_dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, the way anyone would load them: through transformers' Auto classes.

    Args:
        source: an exported model, a run's folder (its export), `demo` (the one that comes with the package), or a name
            on the Hugging Face hub.
        state_dtype: in the place of that of a mosaic's config.

    Raises:
        ValueError: it has no tokenizer, is a run that has not been exported, or is damaged: tensors are missing, of
            another shape, left over, or not finite; or there is no such state dtype, or the model is no mosaic.
        OSError: there is no such model.
    """
    folder = named_folder(source) or Path(source)
    if (folder / "recipe.yaml").is_file():
        folder = folder / "export"
        if not folder.is_dir():
            raise ValueError(f"{source} has no export yet; mosaics export {source} --output FOLDER makes one")
    if folder.exists() and (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{source} has no tokenizer; export the run that it came from")
    model = load_model(folder if folder.exists() else source, state_dtype)
    tokenizer = load_tokenizer(folder if folder.exists() else source)
    check_tokenizer(source, model, tokenizer)
    return model, tokenizer


def check_tokenizer(source: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` if the tokenizer has tokens that the model has not."""
    if isinstance(model.config, MosaicConfig) and len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and its model {model.config.vocab_size}; "
            "get both from the same export"
        )


def load_config(source: str | Path):
    """The config of a model's folder or of a name on the hub.

    Raises:
        ValueError: it is damaged.
        OSError: there is none.
    """
    return _load(AutoConfig, source)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or of a name on the hub; raises as `load_config`."""
    tokenizer = _load(AutoTokenizer, source)
    with _sentences(source):
        tokenizer.decode(tokenizer("a").input_ids)  # what is wrong with some shows only in use
    return tokenizer


def load_model(
    source: str | Path, state_dtype: str | None = None, read_tolerance: float | None = None
) -> PreTrainedModel:
    """A causal language model, at evaluation, from a folder or the hub; arguments and errors as `load_exported`, and
    `read_tolerance` in the place of that of a mosaic's config.

    Raises:
        ValueError: it is damaged: a file has changed since it was exported, tensors are missing, of another shape,
            left over, or not finite.
        OSError: there is none.
    """
    check_state_dtype(state_dtype)
    options: dict[str, Any] = {} if Path(source).is_dir() else {"adapter_kwargs": where_to_look()}
    check_tolerance(read_tolerance)
    for name, value in (("state_dtype", state_dtype), ("read_tolerance", read_tolerance)):
        if value is None:
            continue
        config = load_config(source)
        if not isinstance(config, MosaicConfig):
            raise ValueError(f"{source} is a {config.model_type}; only a mosaic has a {name}, so leave it out")
        options[name] = value
    for path in Path(source).glob("*.json") if Path(source).is_dir() else ():
        if path.name == "adapter_config.json":
            raise ValueError(f"{source} holds an adapter; merge it into its model first and save that")
        if path.name.endswith(".index.json"):
            _check_index(path)
        if path.name == MANIFEST:
            _check_manifest(path)
    model, found = _load(AutoModelForCausalLM, source, use_safetensors=True, output_loading_info=True, **options)
    own = isinstance(model.config, MosaicConfig)
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has no place for")):
        if found.get(kind) and (own or kind != "unexpected_keys"):
            name = min(map(str, found[kind]))
            raise ValueError(f"{source} {what} the tensor {name}, so weights and config.json differ; export it again")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{source} has a tensor that is not finite, {name}; train or get it again")
    if own:
        _check_special_tokens(source, model)
    return model.eval()


def _check_special_tokens(source: str | Path, model: PreTrainedModel) -> None:
    """Refuse special tokens that are none of the vocabulary; transformers would stumble over them while generating."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(model.generation_config, name)
        for token in given if isinstance(given, list) else [] if given is None else [given]:
            if not isinstance(token, int) or not 0 <= token < model.config.vocab_size:
                raise ValueError(
                    f"{source}: {name} is {given!r} in generation_config.json, which is no token; correct it"
                )


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file of a model's folder but its model card; all is on disk then."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            if path.name != "README.md":  # people add to it
                files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(stream)}
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump({"format": FORMAT, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _check_manifest(path: Path) -> None:
    """Refuse a folder whose files are not those that were exported."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        digest = manifest.pop("digest", None)
        if digest is None and (manifest.keys() != {"format", "files"} or manifest["format"] != FORMAT):
            raise ValueError("its format")
        # That of a checkpoint has a digest of itself.
        if digest is not None and digest != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
            raise ValueError("its digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); export the model again") from None
    for name, (size, digest) in files.items():
        file = path.parent / name
        if Path(name).name != name:
            raise ValueError(f"{path} names {name!r}, which is no file of that folder; don't use it")
        if not file.is_file():
            raise ValueError(f"{file} is missing; export the model again")
        with file.open("rb") as stream:
            if file.stat().st_size != size or _sha256(stream) != digest:
                raise ValueError(
                    f"{file} has changed since it was exported (its SHA-256 differs); export the model again, or "
                    f"remove {MANIFEST} if the change is yours"
                )


def _sha256(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _load(kind: type, source: str | Path, **options: Any):
    folder = Path(source)
    if folder.exists() and kind is not AutoTokenizer and not (folder / "config.json").is_file():
        raise ValueError(f"{source} is no model (it has no config.json)")
    if not folder.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
            raise ValueError(f"there is no model {source}")
        if "/" not in str(source):
            raise ValueError(f"there is no folder {source}; name a model's or a run's folder, or a hub id (owner/name)")
        options |= where_to_look()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with _sentences(source):
        return kind.from_pretrained(str(source), trust_remote_code=False, **options)


@contextmanager
def _sentences(source: str | Path) -> Iterator[None]:
    """Turns what loading `source` may raise into one sentence."""
    try:
        yield
    except OSError as error:
        if str(source) in str(error):
            raise
        raise OSError(f"{source} can't be loaded ({_first_line(error)})") from error
    except Exception as error:  # whatever strange content makes the libraries raise
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            raise
        raise ValueError(
            f"{source} can't be loaded, its files are damaged or foreign ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__


def _check_index(path: Path) -> None:
    """Refuse a list of shards that names files elsewhere."""
    try:
        names = list(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); export the model again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}, which is no .safetensors file of that folder; don't use it")
