"""A run is a folder: recipe, prepared data, metrics, checkpoints, exported model, curves.

::

    RUN/recipe.yaml            the resolved recipe
    RUN/data/                  prepared text, unless the recipe names a prepared folder
    RUN/metrics.jsonl          one JSON object per line
    RUN/checkpoints/step-…/    see `mosaics.training.checkpoint`
    RUN/export/                the model as transformers reads it, at the end
    RUN/export-step-…/         the one before, while an extended run goes on
    RUN/curves.png             training loss and validation bits per byte, at the end
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from mosaics.training.checkpoint import (
    MANIFEST,
    clear_leftovers,
    load_checkpoint,
    newest_checkpoint,
    read_json,
    save_checkpoint,
    sync,
    versions,
)
from mosaics.training.distribution import Group, Told, processes
from mosaics.training.export import export_run
from mosaics.training.insight import memory_statistics
from mosaics.training.loop import NonFinite, optimisation_step
from mosaics.training.metrics import Metrics, check_tools, last_validation, plot_curves
from mosaics.training.optimizer import make_optimizer
from mosaics.training.progress import Progress
from mosaics.training.recipe import Extension, Recipe, data_of, differences, load_recipe, make_recipe, open_recipe
from mosaics.training.setup import (
    build_config,
    changed_settings,
    check_model,
    check_sharing,
    check_start,
    known_tokenizer,
    pick_device,
    pick_precision,
    place_model,
    prepare_data,
    start_source,
)
from mosaics.training.validation import evaluate, write_samples

if TYPE_CHECKING:
    from mosaics.data import PackedDataset
    from mosaics.training.sources import Source

# Steps in a row that are skipped, where the recipe says so, before the run stops after all.
MOST_SKIPPED = 10


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: the last step done, whether that is the recipe's last, and the newest
    validation figures (keys as in `metrics.jsonl`)."""

    folder: Path
    step: int
    finished: bool
    validation: dict[str, Any] = field(default_factory=dict)


def train(
    recipe: Recipe | None, folder: str | Path, *, resume: bool = False, extend: Extension | None = None
) -> Outcome:
    """Start a run, or continue the one that is in the folder.

    SIGINT and SIGTERM let the step end, write a checkpoint and return. A run that is continued gives, on a
    CPU, the same losses and parameters as one that was never stopped, bit for bit.

    Args:
        recipe: what to do; None: what the run in the folder does.
        folder: the run's folder. A new or empty one starts; one with the same resolved recipe continues.
        resume: insist that there is a checkpoint to continue from.
        extend: go on with a finished run; this is appended to its recipe. If the last extension is the same and not
            done yet, that goes on.

    Returns:
        The outcome; `finished` is false after a signal.

    Raises:
        ValueError: the folder holds something else, the recipe is impossible, a run that is to be extended is not
            finished, or the loss is not finite.
        OSError: the folder can't be written. Checkpoints that were there stay whole.
    """
    folder = Path(folder)
    recipe = recipe or open_recipe(folder)
    device = pick_device(recipe.training)
    with processes(device) as group, ExitStack() as held:
        data: dict[str, PackedDataset] = {}
        source: Source | None = None  # of the first process, unless there is a checkpoint to go on from

        def begin() -> dict[str, Any]:
            nonlocal recipe, source
            check_sharing(recipe, group.size)
            check_tools(recipe.logging)
            _check_folder(folder, recipe, resume or extend is not None)
            if not (folder / "recipe.yaml").exists():
                source = _check_start(recipe)
            undo = _undo(folder)
            held.enter_context(_locked(folder))
            started = (folder / "recipe.yaml").exists()
            try:
                if started:  # it needs its corpus no more, and may have been extended
                    recipe = open_recipe(folder)
                else:
                    prepare_data(recipe, data_of(folder, recipe), known_tokenizer(recipe, source))
                data.update(_open_data(recipe, folder, verify=True))
                tokenizer = data["train"].prepared.tokenizer()
                if not started:
                    check_model(build_config(recipe, tokenizer, source), recipe.training.context_length)
                    _write_recipe(folder, recipe.to_yaml())
            except BaseException:
                if not started:
                    undo()
                raise
            start = _choose_start(recipe, folder, resume)
            if extend is not None:
                recipe = _extend(folder, recipe, extend, start["step"])
                start["identity"]["recipe"] = _recipe_digests(folder)[-1]
            if start["step"] < recipe.training.last_step:
                _keep_export(folder, recipe)
            if start["checkpoint"]:
                from mosaics.models.loading import load_config

                config = load_config(folder / "checkpoints" / start["checkpoint"])
            else:
                source = source or _check_start(recipe)
                config = build_config(recipe, tokenizer, source)
                if source is not None:
                    changes = "; ".join(changed_settings(source.config(), config))
                    print(f"begins with the weights of {source.name}{changes and ': '}{changes}")
            precision = str(pick_precision(recipe.training, device)).removeprefix("torch.")
            config = config.to_dict() | {"_name_or_path": ""}
            return start | {"recipe": recipe.resolved(), "config": config, "precision": precision}

        def follow() -> None:
            if not data:
                data.update(_open_data(recipe, folder, verify=False))

        start = group.first(begin)
        recipe = make_recipe(start["recipe"])
        last = recipe.training.last_step
        if start["step"] >= last:
            print(f"{folder} is finished: step {start['step']} of {last}")
        else:
            group.each(follow)
            step = _run(recipe, folder, data, device, start, group, source)
            if step < last:
                saved = "which is saved" if step else "nothing was done yet"
                print(f"stopped after step {step} of {last}, {saved}; the same command continues")
                return Outcome(folder, step, False, group.first(lambda: last_validation(folder / "metrics.jsonl")))
        return Outcome(folder, last, True, group.first(lambda: _finish(recipe, folder)))


def _run(
    recipe: Recipe,
    folder: Path,
    data: "dict[str, PackedDataset]",
    device: torch.device,
    start: dict[str, Any],
    group: Group,
    source: "Source | None",
) -> int:
    """Train from where `begin` says to the end, or to a signal; the last step done, which is saved."""
    from mosaics import MosaicConfig

    training, checkpoints, log = recipe.training, folder / "checkpoints", folder / "metrics.jsonl"
    dtype, identity, step = getattr(torch, start["precision"]), start["identity"], start["step"]
    config, fresh = MosaicConfig.from_dict(start["config"]), not start["checkpoint"]
    model = place_model(config, recipe.seed, device, dtype, group, fresh=fresh, source=source)
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = make_optimizer(model, training)
    tokens = skipped = 0
    if start["checkpoint"]:
        state = load_checkpoint(checkpoints / start["checkpoint"], model, optimizer, group)
        tokens, skipped = state["tokens"], state.get("skipped", 0)
        print(f"continuing {folder} after step {step} of {training.last_step}")
    metrics: list[Metrics] = []  # of the first process

    def record(number: int, values: dict[str, Any]) -> None:
        for log in metrics:
            log.write(number, values)

    def save() -> None:
        for log in metrics:
            log.sync()
        state = {"step": step, "tokens": tokens, "sequences": step * training.batch_size, "skipped": skipped} | identity
        keep = {"keep": recipe.checkpoint.keep, "keep_every": recipe.checkpoint.keep_every}
        save_checkpoint(checkpoints, step, model, optimizer, state, **keep, group=group)

    def validate() -> None:
        found = evaluate(
            model,
            data["validation"],
            sequences=recipe.validation.sequences,
            batch_size=training.micro_batch_size or training.batch_size // group.size,
            dtype=dtype,
            group=group,
        )
        if recipe.validation.samples:
            found["samples"] = write_samples(
                model,
                data["validation"],
                tokenizer,
                recipe.validation.samples,
                seed=recipe.seed,
                step=step,
                dtype=dtype,
                group=group,
            )
        found["memories"] = memory_statistics(model, data["validation"], dtype, group)
        record(step, found)
        progress.validation(step, found["validation_bits_per_byte"], found["validation_nats_per_token"])
        for text in found.get("samples", []):
            progress.sample(text)

    tokenizer = data["validation"].prepared.tokenizer()
    group.first(lambda: metrics.append(Metrics(log, step, recipe)))
    progress = Progress(training.last_step, step, recipe.logging.every)
    try:
        with progress, _stopping(once=group.size == 1) as stop:
            progress.say(
                f"{sum(p.numel() for p in model.parameters()):,} parameters, "
                f"{recipe.tokens_per_step:,} tokens a step, {start['precision']} on {device.type} with "
                + (f"{group.size} processes of " if group.size > 1 else "")
                + f"{torch.get_num_threads()} threads"
            )
            if (words := data["train"].tokens) < recipe.tokens_per_step:
                progress.say(
                    f"warning: the training text has {words:,} tokens, fewer than a step takes; it will be learnt by "
                    "heart, so give more text"
                )
            if fresh and training.init_from is not None:
                save()  # from here on the run needs the model no more that it began with
            if step == 0:
                validate()
            clock, counted = time.monotonic(), tokens
            speed = 0.0
            halt = group.any(stop.is_set())
            while step < training.last_step and not halt:
                result = None
                try:
                    result = optimisation_step(model, optimizer, data["train"], recipe, step + 1, dtype, group)
                    skipped = 0
                except NonFinite as error:
                    skipped += 1
                    skip = training.if_not_finite == "skip" and skipped < MOST_SKIPPED
                    if metrics:
                        names = data["train"].document_names(step * training.batch_size, training.batch_size)
                        record(step + 1, {"error": str(error), "skipped": skip, "documents": names})
                    if not skip:
                        raise (Told(str(error)) if group.rank else error) from None
                    progress.say(f"warning: {error}; skipped, its documents are in {log}")
                step += 1
                tokens += recipe.tokens_per_step
                last = step in training.ends
                halt = group.any(stop.is_set())
                seconds = time.monotonic() - clock
                speed = (tokens - counted) / seconds if seconds else speed
                if result:
                    progress.step(step, result.loss, speed)
                if result and (step % recipe.logging.every == 0 or last):
                    record(
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
                if step % recipe.checkpoint.every == 0 or last or halt:
                    before = time.monotonic()
                    save()
                    clock += time.monotonic() - before
    finally:
        for open_log in metrics:
            open_log.close()
    return step


def _check_start(recipe: Recipe) -> "Source | None":
    """The model that training begins with, if the recipe names one; whatever is wrong with the recipe alone is said
    before anything is read or written."""
    source = start_source(recipe)
    model = check_model(build_config(recipe, source=source), recipe.training.context_length)
    if source is not None:
        check_start(source, model)
    return source


def _choose_start(recipe: Recipe, folder: Path, resume: bool) -> dict[str, Any]:
    """The newest checkpoint that can be used (None to begin), its step, and what recipe and data are.

    Raises:
        ValueError: no checkpoint can be used, one is damaged and the recipe says to stop then, or the data differ.
    """
    data_folder = data_of(folder, recipe)
    digests = _recipe_digests(folder)
    identity = {"recipe": digests[-1], "data": _data_digest(data_folder)}
    newest, passed_over = newest_checkpoint(folder / "checkpoints", recipes=digests)
    for damaged, reason in passed_over.items():
        if recipe.checkpoint.if_damaged == "stop":
            raise ValueError(
                f"{reason}; checkpoint.if_damaged is stop, so move {damaged.name} away to continue from the one before"
            )
        _set_aside(damaged, reason)
    if newest is None:
        if resume:
            raise ValueError(f"--resume: {folder} has no checkpoint to continue from; leave --resume out to start it")
        return {"checkpoint": None, "step": 0, "identity": identity}
    manifest, state = read_json(newest / MANIFEST), read_json(newest / "state.json")
    if state["data"] != identity["data"]:
        raise ValueError(f"the prepared data in {data_folder} are not those that {folder} was trained on")
    if changed := {key: value for key, value in versions().items() if manifest["versions"].get(key) != value}:
        names = ", ".join("the code of mosaics" if key == "code" else f"{key} ({changed[key]})" for key in changed)
        print(f"note: {newest.name} was written with other versions: {names}; figures may differ from one run's")
    return {"checkpoint": newest.name, "step": state["step"], "identity": identity}


def _finish(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Whatever is still missing at the end of a run; its last validation."""
    clear_leftovers(folder / "checkpoints")
    exported = (folder / "export").exists()
    if not (exported and (folder / "curves.png").exists()):  # there may be those from before an extension
        plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    if not exported:
        export_run(folder, folder / "export")
        print(f"exported to {folder / 'export'}")
    for before in folder.glob("export-step-*"):
        shutil.rmtree(before)
    return last_validation(folder / "metrics.jsonl")


def _open_data(recipe: Recipe, folder: Path, *, verify: bool) -> "dict[str, PackedDataset]":
    from mosaics.data import PackedDataset

    options = {"long_documents": recipe.data.long_documents, "verify": verify}
    return {
        split: PackedDataset(data_of(folder, recipe), split, recipe.training.context_length, seed=seed, **options)
        for split, seed in (("train", recipe.seed), ("validation", 0))
    }


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--run {folder} is a file; name a folder")
    if (folder / "recipe.yaml").is_file():
        there = load_recipe(folder / "recipe.yaml")
        extended, own = there.training.extensions, recipe.training.extensions
        # What it was started with is the same run still, after it has been extended.
        training = recipe.training.model_copy(update={"extensions": own or extended})
        if found := differences(there, recipe.model_copy(update={"training": training})):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            advice = "choose another --run"
            if not more and found[0].startswith(("training.steps ", "training.extensions ")):
                advice = f"a finished run goes on by mosaics train --run {folder} --extend STEPS"
            raise ValueError(f"{folder} holds a run of another recipe: {found[0]}{more}; {advice}")
        return
    if resume:
        raise ValueError(f"there is no run in {folder} to go on with")
    # Left by a start that failed before the recipe was written; anything else is not ours to write beside.
    foreign = [path.name for path in folder.iterdir()] if folder.exists() else []
    foreign = sorted(name for name in foreign if not name.startswith(".") and name != "data")
    if foreign:
        raise ValueError(f"{folder} is not empty ({foreign[0]}) and holds no run; choose another --run")


def _undo(folder: Path) -> Callable[[], None]:
    """What takes away again all that comes into a folder from now on, and the folder itself if it is not there yet."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    there = set(folder.iterdir()) if folder.exists() else set()

    def undo() -> None:
        for path in set(folder.iterdir()) - there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in new:
            with suppress(OSError):  # others have come into it
                path.rmdir()

    return undo


def _write_recipe(folder: Path, text: str) -> None:
    temporary = folder / ".recipe.yaml.new"
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder / "recipe.yaml")
    sync(folder)


def _extend(folder: Path, recipe: Recipe, extension: Extension, step: int) -> Recipe:
    """Append to the recipe of a run that is finished at `step`, and return it whole.

    Raises:
        ValueError: the run is not finished, nor within the same extension.
    """
    training = recipe.training
    if step < training.last_step or not (folder / "export").is_dir():
        if training.extensions[-1:] == (extension,):
            print(f"the extension by {extension.steps} steps that was begun goes on")
            return recipe
        raise ValueError(
            f"{folder} is not finished (step {step} of {training.last_step}); mosaics train --run {folder} goes on to "
            "the end, and then it can be extended"
        )
    values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    before = values["training"].get("extensions") or []
    values["training"]["extensions"] = [*before, extension.model_dump(mode="json")]
    recipe = make_recipe(values)
    _write_recipe(folder, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    print(f"extended to step {recipe.training.last_step} by {extension.steps} steps ({extension.schedule})")
    return recipe


def _keep_export(folder: Path, recipe: Recipe) -> None:
    """Keep what an extended run exported before under its step, until there is the new one."""
    if recipe.training.extensions and (folder / "export").is_dir():
        (folder / "export").rename(_free(folder / f"export-step-{recipe.training.ends[-2]:08d}"))


def _recipe_digests(folder: Path) -> list[str]:
    """SHA-256 of the values in the run's recipe file (so that defaults added later change nothing), without extensions,
    with the first, and so on to all of them."""
    values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    history = values.get("training", {}).pop("extensions", None) or []
    found = []
    for number in range(len(history) + 1):
        if number:
            values["training"]["extensions"] = history[:number]
        found.append(hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest())
    return found


def _data_digest(folder: Path) -> str:
    """SHA-256 of the data's manifest, which holds the sums of all its files."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def _set_aside(checkpoint: Path, reason: str) -> None:
    """Name a checkpoint that can't be used and move it aside, so that its step can be written again."""
    aside = checkpoint.rename(_free(checkpoint.with_name(f"damaged-{checkpoint.name}")))
    print(f"warning: passed over a checkpoint: {reason}; it is now {aside.name}", flush=True)


def _free(path: Path) -> Path:
    """The path, with a number if that is taken."""
    names = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


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
def _stopping(once: bool) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set.

    Args:
        once: a second signal acts as usual. Not so under torchrun, which passes on what the process may have had from
            the terminal, and sends SIGTERM when another process ended, before this one has said what that means.
    """
    stop = threading.Event()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        if once:
            restore()

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except BaseException:
        if once:
            restore()
        raise
    restore()
