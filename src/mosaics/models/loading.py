"""Models with their tokenizers, from an export, a run or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import mosaics.models  # noqa: F401  (registers the architecture)


def load_exported(source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, the way anyone would load them: through transformers' Auto classes.

    Raises:
        ValueError: it has no tokenizer, or is a run that has not been exported.
        OSError: there is no such model.
    """
    folder = Path(source)
    if (folder / "recipe.yaml").is_file():
        folder = folder / "export"
        if not folder.is_dir():
            raise ValueError(f"{source} has no export yet; mosaics export {source} --output FOLDER makes one")
    elif folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{source} is no model (it has no config.json)")
    elif not folder.exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(source)):
        raise ValueError(f"there is no model {source}")
    name = str(folder) if folder.exists() else str(source)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if folder.exists() and not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{source} has no tokenizer; export the run that it came from")
    try:
        model = AutoModelForCausalLM.from_pretrained(name).eval()
    except SafetensorError as error:
        raise ValueError(f"the .safetensors of {source} are damaged ({error}); export it again") from error
    return model, AutoTokenizer.from_pretrained(name)
