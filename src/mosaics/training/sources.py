"""Models by where they lie: a run at any time, one of its checkpoints, an export, another folder, a name on the hub."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mosaics.memories.contract import check_state_dtype, check_tolerance
from mosaics.models import MosaicConfig, MosaicForCausalLM
from mosaics.models.loading import check_tokenizer, load_config, load_model, load_tokenizer, named_folder
from mosaics.models.presets import PRESETS
from mosaics.training.checkpoint import (
    MANIFEST,
    DamagedCheckpoint,
    checkpoint_steps,
    load_checkpoint,
    newest_checkpoint,
    verify_checkpoint,
)
from mosaics.training.recipe import data_of, open_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """A model that was found.

    Attributes:
        name: what it was asked for by.
        place: the folder of config and weights, or a name on the hub.
        tokenizer_place: the same of its tokenizer; None: there is none.
        is_checkpoint: whether the weights are those of a checkpoint, verified.
    """

    name: str
    place: str | Path
    tokenizer_place: str | Path | None
    is_checkpoint: bool = False

    def config(self):
        """Its config; raises as `load_config`."""
        return load_config(self.place)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, or None; raises as `load_config` if it is damaged."""
        return None if self.tokenizer_place is None else load_tokenizer(self.tokenizer_place)

    def model(self, state_dtype: str | None = None, read_tolerance: float | None = None) -> PreTrainedModel:
        """The model, at evaluation; arguments and errors as `mosaics.models.loading.load_model`."""
        if not self.is_checkpoint:
            return load_model(self.place, state_dtype, read_tolerance)
        check_state_dtype(state_dtype)
        check_tolerance(read_tolerance)
        return checkpoint_model(Path(self.place), state_dtype, read_tolerance)


def checkpoint_model(
    folder: Path, state_dtype: str | None = None, read_tolerance: float | None = None
) -> MosaicForCausalLM:
    """The model of a verified checkpoint, however many processes wrote it, at evaluation."""
    config = MosaicConfig.from_pretrained(folder)
    config.state_dtype = state_dtype or config.state_dtype
    config.read_tolerance = read_tolerance or config.read_tolerance
    with torch.device("meta"):
        model = MosaicForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    load_checkpoint(folder, model)
    # As `from_pretrained` would leave them: an evaluation knows a model by its config and weights.
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    return model.eval()


def find_source(name: str | Path) -> Source:
    """Find a model.

    Args:
        name: a run's folder (its newest whole checkpoint, or else its export), a checkpoint's, an exported model's or
            any other that transformers loads, `demo` for the small model that comes with the package, or a name on the
            Hugging Face hub.

    Raises:
        ValueError: a run without a checkpoint, a damaged checkpoint, or a preset, which has no weights.
    """
    if (folder := named_folder(name)) is not None:
        return Source(str(name), folder, folder)
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        return _of_run(path)
    if (path / "state.json").is_file() and (path / MANIFEST).is_file():
        verify_checkpoint(path)
        return Source(str(name), path, _tokenizer_of_run(path.resolve().parents[1]), is_checkpoint=True)
    if str(name) in PRESETS and not path.exists():
        raise ValueError(f"{name} is a preset, which has no weights; name an exported model or a run's folder")
    own = not path.is_dir() or any((path / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json"))
    return Source(str(name), name, name if own else None)


def _of_run(run: Path) -> Source:
    exports = [run / "export", *sorted(run.glob("export-step-*"), reverse=True)]  # see `mosaics.training.run_folder`
    export = next((folder for folder in exports if folder.is_dir()), None)
    while True:
        steps = checkpoint_steps(run / "checkpoints")
        try:
            newest, passed_over = newest_checkpoint(run / "checkpoints")
            break
        except DamagedCheckpoint as error:
            if checkpoint_steps(run / "checkpoints") != steps:
                continue  # the run goes on meanwhile, and has dropped what was looked at
            if export is None:
                raise
            newest, passed_over = None, {run: str(error)}
            break
    if newest is None and export is None:
        raise ValueError(f"{run} has no checkpoint yet; wait for its first one, or train it")
    for reason in passed_over.values():
        print(f"warning: passed over a checkpoint: {reason}; {(newest or export).name} is taken", file=sys.stderr)
    if newest is None:
        return Source(str(run), export, export)
    return Source(str(run), newest, _tokenizer_of_run(run), is_checkpoint=True)


def _tokenizer_of_run(run: Path) -> Path | None:
    if not (run / "recipe.yaml").is_file():
        return None
    places = [data_of(run, open_recipe(run)) / "tokenizer", run / "export"]
    return next((place for place in places if place.is_dir()), None)


def open_source(
    name: str | Path, state_dtype: str | None = None, read_tolerance: float | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, also of a run that is being trained.

    Args:
        name: as for `find_source`.
        state_dtype: in the place of that of a mosaic's config.
        read_tolerance: in the place of that of a mosaic's config.

    Raises:
        ValueError: as `find_source` and `mosaics.models.loading.load_exported`.
        OSError: there is no such model.
    """
    while True:
        source = find_source(name)
        if source.tokenizer_place is None and Path(source.place, "config.json").is_file():
            raise ValueError(f"{name} has no tokenizer; export the run that it came from")
        try:
            model = source.model(state_dtype, read_tolerance)
            break
        except (OSError, DamagedCheckpoint):
            if not source.is_checkpoint or Path(source.place).is_dir():
                raise  # else the run has dropped the checkpoint meanwhile, and has a newer one
    tokenizer = source.tokenizer()
    check_tokenizer(name, model, tokenizer)
    return model, tokenizer
