"""Checkpoints: written whole or not at all, verified when read.

A checkpoint is a folder ``step-00000100`` with

- ``config.json`` and ``model.safetensors``: the model, as `from_pretrained` reads it;
- ``optimizer.safetensors``: the optimizer's tensors, named ``optimizer.<key>.<parameter>``;
- in the place of these two, when several processes wrote it, ``shard-…safetensors``: the parts of all tensors that one
  process held, with their offsets (the Hugging Face storage of `torch.distributed.checkpoint`);
- ``state.json``: the step and what else decides the next one;
- ``manifest.json``: SHA-256 and size of each file, the step, versions, and a digest of itself.

It is written to a temporary folder, synced, its manifest last, then renamed. Nothing in it is a pickle. Any number of
processes reads what any number wrote.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Collection
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from mosaics._version import __version__
from mosaics.training.distribution import Group, local

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_FILES = ("config.json", "state.json")
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


class DamagedCheckpoint(ValueError):
    """A checkpoint that is partial, changed since it was written, or not of this run."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies under the folder of checkpoints."""
    return root / f"step-{step:08d}"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a checkpoint (whole or not) under `root`, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for path in root.iterdir() if (match := _STEP.fullmatch(path.name)))


def clear_leftovers(root: Path) -> None:
    """Remove what a process left that was killed while writing or dropping a checkpoint."""
    for leftover in root.glob(".*-step-*"):
        shutil.rmtree(leftover)


def save_checkpoint(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 2,
    keep_every: int | None = None,
    group: Group | None = None,
) -> Path:
    """Write the checkpoint of a step, then drop those that are no longer kept.

    Args:
        root: the folder of checkpoints; made if missing. All processes see it.
        step: optimisation steps done.
        model: a transformers model; its parameters, persistent buffers and config are written.
        optimizer: its state is written by parameter name.
        state: plain data that decides the next step.
        keep: how many of the newest checkpoints stay.
        keep_every: checkpoints whose step is divisible by this stay for good.
        group: the processes over which the model is sharded, all of which call this.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: it can't be written; what was there before is untouched.
        ValueError: a parameter or a moment is not finite.
    """
    group = group or Group()
    tensors, moments = _model_tensors(model), _optimizer_tensors(model, optimizer)
    odd = [name for name, tensor in (tensors | moments).items() if not torch.isfinite(local(tensor)).all()]
    if broken := [name for names in group.each(lambda: odd[:1]) for name in names]:
        raise ValueError(f"after step {step} tensor {broken[0]} is not finite; no checkpoint was written")
    temporary, final = root / f".new-step-{step:08d}", checkpoint_folder(root, step)

    def begin() -> None:
        if not root.is_dir():
            root.mkdir(parents=True)
            sync(root.parent)
        clear_leftovers(root)
        temporary.mkdir()

    def write() -> dict[str, Any]:
        """Write the tensors of this process, and say which files that made."""
        if group.size == 1:
            _write_tensors(temporary / "model.safetensors", tensors)
            paths = [temporary / "model.safetensors"]
            if moments:
                _write_tensors(temporary / "optimizer.safetensors", moments)
                paths.append(temporary / "optimizer.safetensors")
        else:
            _write_shard(temporary, tensors | moments)
            paths = sorted(temporary.glob(f"shard-{group.rank + 1:05d}-*.safetensors"))
        for path in paths:
            sync(path)
        return {path.name: _fingerprint(path) for path in paths}

    def finish(written: dict[str, Any]) -> None:
        if hidden := [name for name in written if not (temporary / name).is_file()]:
            raise OSError(f"{temporary / hidden[0]} is not there: the processes do not share the folder of the run")
        model.config.to_json_file(temporary / "config.json", use_diff=False)
        _write_json(temporary / "state.json", state)
        manifest = {
            "format": 1,
            "step": step,
            "recipe": state.get("recipe"),
            "versions": versions(),
            "files": written | {name: _fingerprint(temporary / name) for name in _FILES},
        }
        _write_json(temporary / MANIFEST, manifest | {"digest": _digest(manifest)})
        for name in (*_FILES, MANIFEST):
            sync(temporary / name)
        sync(temporary)
        temporary.rename(final)
        sync(root)
        for old in checkpoint_steps(root)[:-keep]:
            if not keep_every or old % keep_every:
                doomed = root / f".old-step-{old:08d}"
                checkpoint_folder(root, old).rename(doomed)
                shutil.rmtree(doomed)

    group.first(begin)
    try:
        parts = group.each(write)
        group.first(lambda: finish({name: print_ for part in parts for name, print_ in part.items()}))
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


@cache
def versions() -> dict[str, str]:
    """What wrote a checkpoint: versions of this package, Python and libraries, and a digest of the package's code."""
    package = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    installed = {name: version(name) for name in _LIBRARIES}
    return {"mosaics": __version__, "code": code.hexdigest(), "python": platform.python_version()} | installed


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The manifest.

    Raises:
        DamagedCheckpoint: with the file and the reason.
    """
    manifest = read_json(folder / MANIFEST)
    digest = manifest.pop("digest", None)
    if digest != _digest(manifest):
        raise DamagedCheckpoint(f"{folder / MANIFEST} has changed since it was written")
    for name in _FILES:
        if name not in manifest["files"]:
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not list {name}")
    for name in sorted({path.name for path in folder.iterdir()} - {MANIFEST, *manifest["files"]}):
        if not name.startswith(".") or name.endswith(".safetensors"):  # hidden: of the file system
            raise DamagedCheckpoint(f"{folder / name} does not belong to the checkpoint")
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name:
            raise DamagedCheckpoint(f"{folder / MANIFEST} names {name!r}, which is no plain file name")
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        if _fingerprint(path) != expected:
            raise DamagedCheckpoint(f"{path} has changed since it was written (SHA-256 differs)")
    return manifest


def newest_checkpoint(root: Path, *, recipes: Collection[str] | None = None) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest checkpoint that is whole.

    Args:
        root: the folder of checkpoints.
        recipes: digests of recipes, to one of which it must belong; None takes any.

    Returns:
        Its folder (None when there is no checkpoint at all), and the newer ones that are damaged or foreign,
        each with the reason.

    Raises:
        DamagedCheckpoint: there are checkpoints, and none of them can be used.
    """
    passed_over: dict[Path, str] = {}
    for step in reversed(checkpoint_steps(root)):
        folder = checkpoint_folder(root, step)
        try:
            manifest = verify_checkpoint(folder)
            if manifest["step"] != step:
                raise DamagedCheckpoint(f"{folder} holds step {manifest['step']}")
            if recipes is not None and manifest["recipe"] not in recipes:
                raise DamagedCheckpoint(f"{folder} was written with another recipe")
            return folder, passed_over
        except DamagedCheckpoint as error:
            passed_over[folder] = str(error)
    if passed_over:
        raise DamagedCheckpoint(f"no checkpoint in {root} can be used: {'; '.join(passed_over.values())}")
    return None, {}


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Load a verified checkpoint into a model and its optimizer, in place.

    Args:
        folder: what `save_checkpoint` wrote, with any number of processes.
        model: its parameters are overwritten; sharded or not.
        optimizer: its state is overwritten; None leaves the optimizer's tensors unread.
        group: the processes over which the model is sharded, all of which call this.

    Returns:
        The plain data that was saved as `state`.

    Raises:
        DamagedCheckpoint: names, shapes or dtypes are not the model's, or a part of a tensor is missing.
    """
    from torch.distributed import checkpoint as distributed

    reader, state = distributed.HuggingFaceStorageReader(str(folder)), read_json(folder / "state.json")
    try:
        # From the headers of the safetensors files; never `.metadata`, which is a pickle.
        stored = reader.read_metadata().state_dict_metadata
        moments = {name: stored.pop(name) for name in list(stored) if name.startswith("optimizer.")}
        tensors = _model_tensors(model)
        _check_tensors(folder, stored, tensors)
        if optimizer is not None and (moments or state.get("step")):  # before the first step it has no state
            _open_moments(folder, moments, model, optimizer)
            found = _optimizer_tensors(model, optimizer)
            _check_tensors(folder, moments, found)
            tensors |= found
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            distributed.load(tensors, storage_reader=reader, no_dist=(group or Group()).size == 1)
    except distributed.CheckpointException as error:
        raise DamagedCheckpoint(f"{folder} can't be read: {_cause(error)}") from error
    except (SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder} can't be read: {error}") from error
    return state


def _open_moments(folder: Path, stored: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that a checkpoint has, with zeros for its values."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for key, found in stored.items():
        _, kind, name = key.split(".", 2)
        if name not in named:
            raise DamagedCheckpoint(f"{folder} has the unknown tensor {key}")
        parameter = named[name].detach()
        own = found.size == parameter.shape
        if not own and found.size.numel() > 1:  # one number is the steps done
            raise DamagedCheckpoint(f"{folder}: {key} has shape {tuple(found.size)}")
        options = {"dtype": found.properties.dtype, "device": local(parameter).device}
        optimizer.state[named[name]][kind] = torch.zeros_like(parameter) if own else torch.zeros(found.size, **options)
    kinds = {name: optimizer.state[parameter].keys() for name, parameter in named.items()}
    for name, here in kinds.items():
        if not here or here != kinds[next(iter(named))]:
            raise DamagedCheckpoint(f"{folder} lacks optimizer tensors of {name}")


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; of tied ones the first name alone."""
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: known[name].detach() for name in model.state_dict() if name in known}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _check_tensors(folder: Path, stored: dict[str, Any], wanted: dict[str, torch.Tensor]) -> None:
    """Refuse tensors of other names, shapes or dtypes, and those of which a part is missing or there twice."""
    if odd := sorted(stored.keys() ^ wanted.keys()):
        what = "lacks" if odd[0] in wanted else "has the unknown"
        raise DamagedCheckpoint(f"{folder} {what} tensor {odd[0]}")
    for name, tensor in wanted.items():
        found = stored[name]
        if found.size != tensor.shape:
            shapes = f"{tuple(found.size)} instead of {tuple(tensor.shape)}"
            raise DamagedCheckpoint(f"{folder}: {name} has shape {shapes}")
        if found.properties.dtype != tensor.dtype:
            raise DamagedCheckpoint(f"{folder}: {name} is {found.properties.dtype} instead of {tensor.dtype}")
        if sum(chunk.sizes.numel() for chunk in found.chunks) != tensor.numel():
            raise DamagedCheckpoint(f"{folder}: the parts of {name} do not make a whole")


def _cause(error: BaseException) -> Any:
    """The first error inside of torch.distributed.checkpoint's own."""
    return next(iter(error.failures.values()))[0]


def _write_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the parts of the tensors that this process holds; all processes call it together."""
    from torch.distributed import checkpoint as distributed

    writer = distributed.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        distributed.save(tensors, storage_writer=writer)
    except distributed.CheckpointException as error:
        raise _cause(error) from error


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its own class hides the system's error number
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        DamagedCheckpoint: it is missing, or no such thing.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is not valid JSON") from error
    if not isinstance(data, dict):
        raise DamagedCheckpoint(f"{path} holds no JSON object")
    return data


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to where they outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
