"""A run is a folder: recipe, prepared data, metrics, checkpoints, exported model, curves.

::

    RUN/recipe.yaml            the resolved recipe
    RUN/data/                  prepared text, unless the recipe names a prepared folder
    RUN/metrics.jsonl          one JSON object per line
    RUN/checkpoints/step-…/    see `mosaics.training.checkpoint`
    RUN/export/                the model as transformers reads it, at the end
    RUN/curves.png             training loss and validation bits per byte, at the end
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from mosaics.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from mosaics.training.draws import seed_step
from mosaics.training.export import export_run
from mosaics.training.loop import NonFinite, optimisation_step
from mosaics.training.metrics import Metrics, last_validation, plot_curves
from mosaics.training.optimizer import make_optimizer
from mosaics.training.progress import Progress
from mosaics.training.recipe import Recipe, differences, load_recipe
from mosaics.training.setup import build_config, build_model, pick_device, pick_precision, prepare_data
from mosaics.training.validation import evaluate


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: the last step done, whether that is the recipe's last, and the newest
    validation figures (keys as in `metrics.jsonl`)."""

    folder: Path
    step: int
    finished: bool
    validation: dict[str, Any] = field(default_factory=dict)


def train(recipe: Recipe, folder: str | Path, *, resume: bool = False) -> Outcome:
    """Start a run, or continue the one that is in the folder.

    SIGINT and SIGTERM let the step end, write a checkpoint and return. A run that is continued gives, on a
    CPU, the same losses and parameters as one that was never stopped, bit for bit.

    Args:
        recipe: what to do.
        folder: the run's folder. A new or empty one starts; one with the same resolved recipe continues.
        resume: insist that there is a checkpoint to continue from.

    Returns:
        The outcome; `finished` is false after a signal.

    Raises:
        ValueError: the folder holds something else, the recipe is impossible, or the loss is not finite.
        OSError: the folder can't be written. Checkpoints that were there stay whole.
    """
    folder = Path(folder)
    build_config(recipe)  # whatever is wrong with the recipe alone is said before anything is written
    device = pick_device(recipe.training)
    _check_folder(folder, recipe, resume)
    with _locked(folder):
        data_folder = data_of(folder, recipe)
        if not (folder / "recipe.yaml").exists():  # a run that has started needs its corpus no more
            prepare_data(recipe, data_folder)
        return _run(recipe, folder, data_folder, device, resume)


def _run(recipe: Recipe, folder: Path, data_folder: Path, device: torch.device, resume: bool) -> Outcome:
    from mosaics.data import PackedDataset, PreparedCorpus

    training, checkpoints, log = recipe.training, folder / "checkpoints", folder / "metrics.jsonl"
    config = build_config(recipe, PreparedCorpus(data_folder).tokenizer())
    cut = recipe.data.long_documents
    train_data = PackedDataset(data_folder, "train", training.context_length, long_documents=cut, seed=recipe.seed)
    held_out = PackedDataset(data_folder, "validation", training.context_length, long_documents=cut)
    seed_step(recipe.seed, 0)
    model = build_model(config).to(device)
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = make_optimizer(model, training)
    dtype = pick_precision(training, device)
    _write_recipe(folder, recipe)
    identity = {"recipe": _recipe_digest(folder), "data": _data_digest(data_folder)}

    step = tokens = 0
    newest, passed_over = newest_checkpoint(checkpoints, recipe=identity["recipe"])
    for damaged, reason in passed_over.items():
        _set_aside(damaged, reason)
    if newest:
        state = load_checkpoint(newest, model, optimizer)
        if state["data"] != identity["data"]:
            raise ValueError(f"the prepared data in {data_folder} are not those that {folder} was trained on")
        step, tokens = state["step"], state["tokens"]
        if step >= training.steps:
            print(f"{folder} is finished: step {step} of {training.steps}")
            return _finish(recipe, folder, data_folder, step)
        print(f"continuing {folder} after step {step} of {training.steps}")
    elif resume:
        raise ValueError(f"--resume: {folder} has no checkpoint to continue from; leave --resume out to start it")

    def save() -> None:
        state = {"step": step, "tokens": tokens, "sequences": step * training.batch_size} | identity
        keep = {"keep": recipe.checkpoint.keep, "keep_every": recipe.checkpoint.keep_every}
        save_checkpoint(checkpoints, step, model, optimizer, state, **keep)

    def validate() -> None:
        micro = training.micro_batch_size or training.batch_size
        found = evaluate(model, held_out, sequences=recipe.validation.sequences, batch_size=micro, dtype=dtype)
        metrics.write(step, found)
        progress.validation(step, found["validation_bits_per_byte"], found["validation_nats_per_token"])

    metrics = Metrics(log, step, folder / "tensorboard" if recipe.logging.tensorboard else None)
    progress = Progress(training.steps, step, recipe.logging.every)
    try:
        with progress, _stopping() as stop:
            precision = str(dtype).removeprefix("torch.")
            progress.say(
                f"{sum(p.numel() for p in model.parameters()):,} parameters, "
                f"{recipe.tokens_per_step:,} tokens a step, "
                f"{precision} on {device.type} with {torch.get_num_threads()} threads"
            )
            if not newest:
                validate()
            clock, counted = time.monotonic(), tokens
            speed = 0.0
            while step < training.steps and not stop.is_set():
                try:
                    result = optimisation_step(model, optimizer, train_data, recipe, step + 1, dtype)
                except NonFinite as error:
                    names = train_data.document_names(step * training.batch_size, training.batch_size)
                    metrics.write(step + 1, {"error": str(error), "documents": names})
                    raise
                step += 1
                tokens += recipe.tokens_per_step
                last = step == training.steps
                seconds = time.monotonic() - clock
                speed = (tokens - counted) / seconds if seconds else speed
                progress.step(step, result.loss, speed)
                if step % recipe.logging.every == 0 or last:
                    metrics.write(
                        step,
                        {
                            "loss": result.loss,
                            "learning_rate": result.learning_rate,
                            "gradient_norm": result.gradient_norm,
                            "draw": result.draw,
                            "tokens": tokens,
                            "tokens_per_second": round(speed, 1),
                        },
                    )
                    clock, counted = time.monotonic(), tokens
                if step % recipe.validation.every == 0 or last:
                    before = time.monotonic()
                    validate()
                    clock += time.monotonic() - before
                if step % recipe.checkpoint.every == 0 or last or stop.is_set():
                    before = time.monotonic()
                    save()
                    clock += time.monotonic() - before
    finally:
        metrics.close()
    if step < training.steps:
        print(f"stopped after step {step} of {training.steps}, which is saved; the same command continues")
        return Outcome(folder, step, False, last_validation(log))
    return _finish(recipe, folder, data_folder, step)


def _finish(recipe: Recipe, folder: Path, data_folder: Path, step: int) -> Outcome:
    """Whatever is still missing at the end of a run."""
    if not (folder / "curves.png").exists():
        plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    if not (folder / "export").exists():
        export_run(folder, folder / "export")
        print(f"exported to {folder / 'export'}")
    return Outcome(folder, step, True, last_validation(folder / "metrics.jsonl"))


def open_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        ValueError: the folder is no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} is no run folder (it has no recipe.yaml)")
    return load_recipe(folder / "recipe.yaml")


def data_of(folder: Path, recipe: Recipe) -> Path:
    """Where the prepared data of a run lie."""
    return Path(recipe.data.prepared) if recipe.data.prepared is not None else folder / "data"


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run {folder} is a file; name a folder")
    if (folder / "recipe.yaml").is_file():
        if found := differences(load_recipe(folder / "recipe.yaml"), recipe):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ValueError(f"{folder} holds a run of another recipe: {found[0]}{more}; choose another --run")
        return
    if resume:
        raise ValueError(f"--resume: there is no run in {folder} to continue")
    # Left by a start that failed before the recipe was written; anything else is not ours to write beside.
    foreign = [path.name for path in folder.iterdir()] if folder.exists() else []
    foreign = sorted(name for name in foreign if not name.startswith(".") and name != "data")
    if foreign:
        raise ValueError(f"{folder} is not empty ({foreign[0]}) and holds no run; choose another --run")


def _write_recipe(folder: Path, recipe: Recipe) -> None:
    path = folder / "recipe.yaml"
    if not path.exists():
        temporary = folder / ".recipe.yaml.new"
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")
        os.replace(temporary, path)


def _recipe_digest(folder: Path) -> str:
    """SHA-256 of the values in the run's recipe file, so that defaults added later change nothing."""
    values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _data_digest(folder: Path) -> str:
    """SHA-256 of the data's manifest, which holds the sums of all its files."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def _set_aside(checkpoint: Path, reason: str) -> None:
    """Name a checkpoint that can't be used and move it aside, so that its step can be written again."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{number}")
    checkpoint.rename(aside)
    print(f"warning: passed over a checkpoint: {reason}; it is now {aside.name}", flush=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock; the system drops it when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process; wait for it or choose another --run") from None
        yield


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal acts as usual."""
    stop = threading.Event()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        restore()

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
