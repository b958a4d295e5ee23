"""The trainings of studies, done once: every trained model lies in a cache, under a digest of all that decides it.
Studies that share a cache share what they have in common.

CACHE/data/DIGEST/          prepared text
CACHE/models/DIGEST/        training.json (at the end), model/, checkpoints/ (meanwhile), evaluations/DIGEST/ (`asking`)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from mosaics._version import __version__
from mosaics.experiments.study import Arrangement, Data, Setting, digest
from mosaics.training.progress import as_clock

CHECKPOINT_SECONDS = 120
HELD_OUT_ROWS = 64
SPEED = 2e10  # operations a second of a thread, in training of small models, where nothing was trained yet


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


class Training:
    """One model to be trained: an arrangement in a setting, with a seed and a variant.

    Attributes:
        recipe: model, optimisation and seed as the training package takes them.
        digest: of all that decides the trained model.

    Args:
        arrangement: the arrangement.
        first: that of the study that it is matched to.
        setting: the setting.
        seed: of everything.
        variant: values by dotted key, in the place of those of setting and arrangement.
        start: the training that this one goes on from.
        steps: in the place of the setting's.

    Raises:
        ValueError: impossible sizes, or an arrangement that can't be matched.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        first: Arrangement,
        setting: Setting,
        seed: int,
        variant: dict[str, Any] | None = None,
        start: Training | None = None,
        steps: int | None = None,
    ) -> None:
        from mosaics.training import make_recipe

        self.arrangement, self.setting, self.seed, self.start = arrangement, setting, seed, start
        self.variant = variant or {}
        training = setting.training | ({} if steps is None else {"steps": steps})
        training |= {k.partition(".")[2]: v for k, v in self.variant.items() if k.startswith("training.")}
        sizes = _matched_sizes(arrangement, first, setting)
        sizes |= {k.partition(".")[2]: v for k, v in self.variant.items() if k.startswith("model.") and v is not None}
        model = {"preset": arrangement.preset, **sizes}
        self.recipe = make_recipe({"seed": seed, "model": model, "training": training}, setting.name)
        resolved = self.recipe.resolved()
        for key in ("init_from", "extensions"):  # not for studies; caches don't know them
            del resolved["training"][key]
        decides = {key: resolved[key] for key in ("seed", "model", "training")}
        decides |= {"data": setting.data.digest(), "start": None if start is None else start.digest}
        decides |= {"world": word_digest(setting.data.world, setting.data.automata is not None), "version": __version__}
        if setting.probe is not None:
            decides["probe"] = setting.probe.digest()
        if _is_prepared(setting.data):
            decides["prepared"] = digest((Path(setting.data.corpus) / "manifest.json").read_text(encoding="utf-8"))
        self.digest = digest(decides)

    def __str__(self) -> str:
        variant = {"training.learning_rate": self.recipe.training.learning_rate} | self.variant
        about = ", ".join(f"{k.partition('.')[2].replace('_', ' ')} {_brief(v)}" for k, v in variant.items())
        return f"{self.setting.name} · {self.arrangement.label} · seed {self.seed} · {about}"

    def folder(self, cache: Path) -> Path:
        """Where the trained model lies."""
        return cache / "models" / self.digest

    def result(self, cache: Path) -> dict[str, Any] | None:
        """What is known of the finished training; None before its end."""
        path = self.folder(cache) / "training.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "as published" if value is None else str(value)


def _config(arrangement: Arrangement, first: Arrangement, setting: Setting, vocabulary: int):
    """The configuration before matching; options of memories that it does not have are left out, and so is what the
    first arrangement's preset sets and its own does not (the window of v2 is none of the Transformer's)."""
    import mosaics

    plain, other = (mosaics.MosaicConfig.from_preset(one.preset) for one in (arrangement, first))
    reached = {key for key in setting.model if hasattr(plain, key) or (plain.has(key) and not hasattr(other, key))}
    sizes = {key: value for key, value in setting.model.items() if key in reached} | arrangement.overrides
    context = setting.training.get("context_length", 512)
    known = {"vocab_size": vocabulary, "max_position_embeddings": context}
    config = mosaics.MosaicConfig.from_preset(arrangement.preset, **known | sizes)
    if arrangement.fixed_delay:
        sizes["long_term.train_delay"] = [getattr(config, "long_term.delay")] * 2
        config = mosaics.MosaicConfig.from_preset(arrangement.preset, **known | sizes)
    return config, sizes


def _vocabulary(data: Data) -> int:
    from mosaics.data.regbench import RegBenchStream
    from mosaics.data.worlds import WorldStream

    if data.corpus is not None:
        return data.vocabulary_size
    return (RegBenchStream if data.world is None else WorldStream).vocab_size


_widths: dict[str, int] = {}  # of twins, which take seconds to be found
_sizes: dict[str, dict[str, Any]] = {}  # alike for all trainings of a study but for seeds and rates


def _matched_sizes(arrangement: Arrangement, first: Arrangement, setting: Setting) -> dict[str, Any]:
    arrangements = [one.model_dump(mode="json") for one in (arrangement, first)]
    about = [setting.model, setting.training.get("context_length"), _vocabulary(setting.data)]
    key = digest([*arrangements, *about])
    if key not in _sizes:
        _sizes[key] = _matched(arrangement, first, setting)
    return dict(_sizes[key])


def _matched(arrangement: Arrangement, first: Arrangement, setting: Setting) -> dict[str, Any]:
    config, sizes = _config(arrangement, first, setting, _vocabulary(setting.data))
    if arrangement.match is None or arrangement == first:
        return sizes
    from mosaics.models.matching import matched, width_option

    other, _ = _config(first, first, setting, _vocabulary(setting.data))
    option = width_option(config)
    key = digest([config.to_diff_dict(), other.to_diff_dict(), arrangement.match])
    if key not in _widths:
        try:
            _widths[key] = getattr(matched(config, other, by=arrangement.match), option)
        except ValueError as error:
            raise ValueError(f"{arrangement.label} can't be made as large as {first.label}: {error}") from error
    return sizes | {option: _widths[key]}


@lru_cache
def word_digest(world: str | None, automata: bool) -> str:
    """Changes when the words of a world or of automata change, so that the cache knows old models from new ones."""
    from mosaics.data.regbench import open_regbench
    from mosaics.data.worlds import World

    if automata:
        return digest([open_regbench().sequence("train", number).tolist() for number in range(4)])
    return "" if world is None else digest([World(0).episode(world, number, 256).text() for number in range(4)])


class Source:
    """The rows of a setting: `train` and `held_out` offer `batch(first, count)`; and their tokenizer."""

    def __init__(self, data: Data, context_length: int, seed: int, cache: Path) -> None:
        self._of_step = []
        if data.world is not None:
            from mosaics.data.worlds import World, WorldStream, world_tokenizer

            world = World(0)

            def stream(seed: int, length: int = context_length, **settings: Any) -> WorldStream:
                return WorldStream(world, data.world, length, seed=seed, loss=data.loss, **settings)

            self.train, self.held_out = stream(seed, **data.settings), stream(seed + 1_000_000, **data.settings)
            self.tokenizer = world_tokenizer()
            last = 0
            for steps, settings in data.curriculum:
                last += steps
                self._of_step.append((last, stream(seed, **data.settings | settings)))
            return
        if data.automata is not None:
            from mosaics.data.regbench import HELD_OUT, RegBenchStream, regbench_tokenizer

            self.train = RegBenchStream(data.automata, context_length, seed=seed)
            self.held_out = RegBenchStream(HELD_OUT, context_length, split="validation")
            self.tokenizer = regbench_tokenizer()
            return
        from mosaics.data import PackedDataset, PreparedCorpus

        folder = prepared(data, cache)
        options = {"long_documents": data.long_documents, "verify": False}
        self.train = PackedDataset(folder, "train", context_length, seed=seed, **options)
        self.held_out = PackedDataset(folder, "validation", context_length, **options)
        self.tokenizer = PreparedCorpus(folder).tokenizer()

    def at(self, step: int):
        """The rows that a step, counted from 1, is trained on."""
        return next((rows for last, rows in self._of_step if step <= last), self.train)


def _is_prepared(data: Data) -> bool:
    return data.corpus is not None and (Path(data.corpus) / "manifest.json").is_file()


def check_data(data: Data) -> None:
    """Look for the texts, before anything is trained.

    Raises:
        OSError: one is not there.
        ValueError: one can't be read.
    """
    from mosaics.data import open_corpus

    for corpus in (data.corpus, data.validation, data.test):
        if isinstance(corpus, str) and not (Path(corpus) / "manifest.json").is_file():
            open_corpus(corpus, field=data.field)


def prepared(data: Data, cache: Path) -> Path:
    """The folder of a prepared corpus, which is made unless the corpus is such a folder or the cache has it."""
    from mosaics.data import open_corpus, prepare

    if _is_prepared(data):
        return Path(data.corpus)
    folder = cache / "data" / data.digest()
    with locked(cache / "data" / "locks" / data.digest()):
        if not (folder / "manifest.json").is_file():
            say(f"preparing {data.corpus}")
            corpus = open_corpus(data.corpus, field=data.field)
            held_out = data.validation
            if isinstance(held_out, str):
                held_out = open_corpus(held_out, field=data.field)
            shares = {"vocab_size": data.vocabulary_size, "validation": held_out}
            prepare(corpus, folder, **shares, show_progress=sys.stderr.isatty())
    return folder


def train(job: Training, cache: Path) -> dict[str, Any]:
    """Train a model unless the cache has it; an interrupted training goes on from its last checkpoint.

    Returns:
        `parameters`, `flops_per_token`, `learning_rate`, `variant`, `steps`, `tokens`, `seconds` (of training),
        `held_out_loss` (nats per counted target at the training length; None if the training diverged, with the reason
        in `error`), `curve` (step, loss) and `probes` (step, seconds of training, what was measured).
    """
    if job.start is not None:
        train(job.start, cache)
    with locked(job.folder(cache)) as folder:
        return job.result(cache) or _train(job, folder, cache)


def adopt(job: Training, run: Path, cache: Path) -> None:
    """Take the finished run of `mosaics train` in the folder `run` for a training of the same recipe and data."""
    from mosaics.models.loading import load_exported
    from mosaics.training.metrics import read_metrics
    from mosaics.training.recipe import open_recipe
    from mosaics.training.setup import pick_device, pick_precision

    recipe, training = open_recipe(run), job.recipe.training
    assert (recipe.seed, recipe.model, recipe.training) == (job.recipe.seed, job.recipe.model, training), "other recipe"
    with locked(job.folder(cache)) as folder:
        if job.result(cache) is not None:
            return
        model, tokenizer = load_exported(run)
        device = pick_device(training)
        dtype = pick_precision(training, device)
        source = Source(job.setting.data, training.context_length, job.seed, cache)
        result = _figures(job, model, device, dtype)
        result["held_out_loss"] = _held_out_loss(model.to(device), source.held_out, training.batch_size, dtype)
        steps = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        before = [0, *(line["tokens"] for line in steps)]
        seconds = ((line["tokens"] - b) / line["tokens_per_second"] for line, b in zip(steps, before, strict=False))
        curve = [[line["step"], round(line["loss"], 4)] for line in steps]
        _keep(folder, model, tokenizer)
        result |= {"seconds": round(sum(seconds), 1), "curve": curve, "probes": []}
        write_json(folder / "training.json", result)


def _train(job: Training, folder: Path, cache: Path) -> dict[str, Any]:
    import transformers

    from mosaics.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
    from mosaics.training.draws import seed_step
    from mosaics.training.loop import NonFinite, optimisation_step
    from mosaics.training.optimizer import make_optimizer
    from mosaics.training.setup import build_config, build_model, pick_device, pick_precision

    transformers.utils.logging.disable_progress_bar()
    recipe, training = job.recipe, job.recipe.training
    source = Source(job.setting.data, training.context_length, job.seed, cache)
    device = pick_device(training)
    dtype = pick_precision(training, device)
    seed_step(recipe.seed, 0)
    model = build_model(build_config(recipe, source.tokenizer)).to(device)
    lost = job.start is not None and job.start.result(cache)["held_out_loss"] is None
    if job.start is not None and not lost:
        from safetensors.torch import load_model

        load_model(model, job.start.folder(cache) / "model" / "model.safetensors", device=str(device))
    optimizer = make_optimizer(model.train(), training)
    newest, _ = newest_checkpoint(folder / "checkpoints")
    fresh = {"step": 0, "seconds": 0.0, "curve": [], "probes": []}
    state = load_checkpoint(newest, model, optimizer) if newest else fresh
    result = _figures(job, model, device, dtype)
    saved = told = time.monotonic()
    try:
        if lost:
            raise NonFinite("the training that this one goes on from diverged")
        while state["step"] < training.steps and not _knows_enough(job, state["probes"]):
            clock, step = time.monotonic(), state["step"] + 1
            done = optimisation_step(model, optimizer, source.at(step), recipe, step, dtype)
            now = time.monotonic()
            state["step"], state["seconds"] = step, state["seconds"] + now - clock
            state["curve"].append([step, round(done.loss, 4)])
            if job.setting.probe is not None and step % job.setting.probe.every == 0:
                found = _probe(model, source.held_out, job, dtype)
                state["probes"].append([step, round(state["seconds"], 2), found])
            if now - told > 10 or step == training.steps:
                left = state["seconds"] / step * (training.steps - step)
                known = f", {state['probes'][-1][2]:.3g}" if state["probes"] else ""
                say(f"{job}: step {step}/{training.steps}, loss {done.loss:.3f}{known}, {as_clock(left)} left")
                told = now
            if now - saved > CHECKPOINT_SECONDS and step < training.steps:
                save_checkpoint(folder / "checkpoints", step, model, optimizer, state)
                saved = now
        result["held_out_loss"] = _held_out_loss(model, source.held_out, training.batch_size, dtype)
        _keep(folder, model, source.tokenizer)
    except NonFinite as error:
        say(f"{job}: {error}")
        result |= {"held_out_loss": None, "error": str(error)}
    every = max(1, len(state["curve"]) // 200)
    lengths = [source.at(step).context_length for step in range(1, state["step"] + 1)]
    result |= {"steps": state["step"], "tokens": training.batch_size * sum(lengths), "probes": state["probes"]}
    result |= {"seconds": round(state["seconds"], 1), "curve": state["curve"][::every]}
    write_json(folder / "training.json", result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


_flops: dict[str, float] = {}


def pace(cache: Path) -> float:
    """Operations a second of a thread: the median of the trainings that a cache has."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (cache / "models").glob("*/training.json")]
    paces = [3 * one["flops_per_token"] * one["tokens"] / one["seconds"] for one in found if one["seconds"]]
    return statistics.median(paces) if paces else SPEED


def seconds_expected(job: Training, pace: float = SPEED) -> float:
    """How long a training of all its steps takes on one thread, roughly, at so many operations a second."""
    import torch

    from mosaics import MosaicForCausalLM
    from mosaics.training.setup import build_config

    config = build_config(job.recipe)
    config.vocab_size = _vocabulary(job.setting.data)
    key = digest([config.to_diff_dict(), job.recipe.training.context_length])
    if key not in _flops:
        with torch.device("meta"):
            model = MosaicForCausalLM(config)
        _flops[key] = model.describe(job.recipe.training.context_length)["flops_per_token"]
    return 3 * _flops[key] * job.recipe.training.steps * job.recipe.tokens_per_step / pace


def _figures(job: Training, model, device, dtype) -> dict[str, Any]:
    import torch

    training, figures = job.recipe.training, model.describe(job.recipe.training.context_length)
    return {
        "parameters": figures["parameters"]["total"],
        "flops_per_token": figures["flops_per_token"],
        "learning_rate": training.learning_rate,
        "variant": job.variant,
        "steps": training.steps,
        "tokens": training.steps * job.recipe.tokens_per_step,
        "hardware": f"{device.type}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}",
    }


def _keep(folder: Path, model, tokenizer) -> None:
    temporary = folder / "model.new"
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder / "model", ignore_errors=True)
    temporary.rename(folder / "model")


def _held_out_loss(
    model, data, batch_size: int, dtype, count_rows: int = HELD_OUT_ROWS, training: bool = False
) -> float:
    import torch

    from mosaics.models import laid_out
    from mosaics.training.setup import autocast

    total = count = 0.0
    model.eval()
    inputs = ("input_ids", "document_ids", "attention_mask", "labels")
    for first in range(0, count_rows, batch_size):
        rows = data.batch(first, min(batch_size, count_rows - first))
        rows = laid_out(**{key: rows[key].to(model.device) for key in inputs if rows[key] is not None})
        targets = int((rows["shift_labels"] != -100).sum())
        with torch.no_grad(), autocast(model.device, dtype):
            total += float(model(**rows, use_cache=False).loss) * targets
        count += targets
    model.train(training)
    loss = total / max(count, 1)
    return loss if math.isfinite(loss) else None


def _probe(model, data, job: Training, dtype) -> float:
    """The share of right answers in percent on held-out rows, or on text the loss in nats per token."""
    import torch

    from mosaics.training.setup import autocast

    probe, size = job.setting.probe, job.recipe.training.batch_size
    if job.setting.data.corpus is not None:
        return round(_held_out_loss(model, data, size, dtype, probe.rows, training=True) or math.inf, 4)
    right = asked = 0
    model.eval()
    for first in range(0, probe.rows, size):
        rows = data.batch(first, min(size, probe.rows - first))
        ids, where = rows["input_ids"].to(model.device), rows["answers"][:, 1:]
        with torch.no_grad(), autocast(model.device, dtype):
            said = model(ids, use_cache=False).logits[:, :-1].argmax(-1).cpu()
        right += int((said == rows["input_ids"][:, 1:])[where].sum())
        asked += int(where.sum())
    model.train()
    return round(100 * right / asked, 2)


def _knows_enough(job: Training, probes: list[list[float]]) -> bool:
    return steps_to_enough(job.setting, probes) is not None


def steps_to_enough(setting: Setting, probes: list[list[float]]) -> int | None:
    """The step of the first of two probes in a row that are good enough; None if there are none."""
    probe = setting.probe
    if probe is None or probe.enough is None:
        return None
    falls = setting.data.corpus is not None
    good = [value <= probe.enough if falls else value >= probe.enough for _, _, value in probes]
    return next((probes[i][0] for i in range(len(good) - 1) if good[i] and good[i + 1]), None)


def write_json(path: Path, values: Any, text: str | None = None) -> None:
    """Write a JSON file whole or not at all; `text` is another form of the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text or json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Holds a folder; another process that wants the same waits, and then finds the work done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # no such locks on this system
            pass
        yield folder
