"""Checkpoints: written whole or not at all, verified when read.

A checkpoint is a folder ``step-00000100`` with

- ``config.json`` and ``model.safetensors``: the model, as `from_pretrained` reads it;
- ``optimizer.safetensors``: the optimizer's tensors, named ``optimizer.<key>.<parameter>``;
- ``state.json``: the step and what else decides the next one;
- ``manifest.json``: SHA-256 and size of each file, the step, versions, and a digest of itself.

It is written to a temporary folder, synced, its manifest last, then renamed. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mosaics._version import __version__

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")


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


def save_checkpoint(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of a step, then drop those that are no longer kept.

    Args:
        root: the folder of checkpoints; made if missing.
        step: optimisation steps done.
        model: a transformers model; its parameters, persistent buffers and config are written.
        optimizer: its state is written by parameter name.
        state: plain data that decides the next step.
        keep: how many of the newest checkpoints stay.
        keep_every: checkpoints whose step is divisible by this stay for good.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: it can't be written; what was there before is untouched.
        ValueError: a parameter is not finite.
    """
    broken = [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter).all()]
    if broken:
        raise ValueError(f"after step {step} parameter {broken[0]} is not finite; no checkpoint was written")
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*-step-*"):  # of a process that was killed while writing or dropping
        shutil.rmtree(leftover)
    temporary, final = root / f".new-step-{step:08d}", checkpoint_folder(root, step)
    temporary.mkdir()
    try:
        model.config.to_json_file(temporary / "config.json", use_diff=False)
        _write_tensors(temporary / "model.safetensors", _model_tensors(model))
        _write_tensors(temporary / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
        _write_json(temporary / "state.json", state)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        manifest = {
            "format": 1,
            "step": step,
            "recipe": state.get("recipe"),
            "versions": {"mosaics": __version__, "torch": torch.__version__},
            "files": files,
        }
        _write_json(temporary / MANIFEST, manifest | {"digest": _digest(manifest)})
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        temporary.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoint_steps(root)[:-keep]:
        if not keep_every or old % keep_every:
            doomed = root / f".old-step-{old:08d}"
            checkpoint_folder(root, old).rename(doomed)
            shutil.rmtree(doomed)
    return final


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The manifest.

    Raises:
        DamagedCheckpoint: with the file and the reason.
    """
    manifest = _read_json(folder / MANIFEST)
    digest = manifest.pop("digest", None)
    if digest != _digest(manifest):
        raise DamagedCheckpoint(f"{folder / MANIFEST} has changed since it was written")
    for name in _FILES:
        if name not in manifest["files"]:
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not list {name}")
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


def newest_checkpoint(root: Path, *, recipe: str | None = None) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest checkpoint that is whole.

    Args:
        root: the folder of checkpoints.
        recipe: digest of the recipe that it must belong to; None takes any.

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
            if recipe is not None and manifest["recipe"] != recipe:
                raise DamagedCheckpoint(f"{folder} was written with another recipe")
            return folder, passed_over
        except DamagedCheckpoint as error:
            passed_over[folder] = str(error)
    if passed_over:
        raise DamagedCheckpoint(f"no checkpoint in {root} can be used: {'; '.join(passed_over.values())}")
    return None, {}


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Load a verified checkpoint into a model and its optimizer, in place.

    Returns:
        The plain data that was saved as `state`.

    Raises:
        DamagedCheckpoint: names or shapes are not the model's.
    """
    tensors = load_file(folder / "model.safetensors")
    own = _model_tensors(model)
    _check_names(folder / "model.safetensors", tensors, own)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    if optimizer is not None:
        saved = load_file(folder / "optimizer.safetensors")
        state: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in saved.items():
            _, kind, name = key.split(".", 2)
            state.setdefault(name, {})[kind] = tensor
        named = dict(model.named_parameters())
        _check_names(folder / "optimizer.safetensors", state, {n: p for n, p in named.items() if p.requires_grad})
        for name, values in state.items():
            device = named[name].device
            optimizer.state[named[name]] = {kind: tensor.to(device) for kind, tensor in values.items()}
    return _read_json(folder / "state.json")


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


def _check_names(path: Path, found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    if odd := sorted(found.keys() ^ expected.keys()):
        what = "lacks" if odd[0] in expected else "has the unknown"
        raise DamagedCheckpoint(f"{path} {what} tensor {odd[0]}")
    for name, tensor in found.items():
        if isinstance(tensor, torch.Tensor) and tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            raise DamagedCheckpoint(f"{path}: {name} has shape {shapes}")


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


def _read_json(path: Path) -> dict[str, Any]:
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
