"""Running a study: tuning trials, then every arrangement in every setting with every seed, then what they are asked."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mosaics.data.worlds import WorldExample
from mosaics.experiments import asking, trainings
from mosaics.experiments.study import Arrangement, Evaluation, Setting, Study
from mosaics.experiments.trainings import Training, say
from mosaics.memories.contract import named
from mosaics.pools import end_with_parent


def run_study(study: Study, cache: Path, jobs: int = 1) -> dict[str, Any]:
    """Do what the cache does not hold yet, and collect everything.

    Args:
        study: what to do.
        cache: where trained models and answers lie; studies may share it. An interrupted study goes on from there.
        jobs: processes that train side by side, each with its share of the cores.

    Returns:
        `study` (plain data), `models` (one for each training, with loss and cost; `trial` marks those of the tuning
        alone), `rows` (arrangement, setting, evaluation, seed, x, y, perhaps low, high and scores), `baselines` (rows
        with setting, evaluation, x and what each simple predictor reaches), `examples` (see `some_examples`) and
        `machine`.

    Raises:
        ValueError: an arrangement or a setting is impossible.
        OSError: there is no such text; nothing was trained then.
    """
    for setting in study.settings:
        trainings.check_data(setting.data)
    plan = Plan(study, cache)
    while trials := plan.trials():  # what is tried next depends on what was found
        run_each(_do, [(job, (), cache) for job in trials], jobs, "tuning trial")
    main = plan.jobs()
    run_each(_do, [(job, asked(job), cache) for job in main], jobs, "model")
    every = {job.digest: job for job in [*main, *plan.tried.values()]}
    kept = {job.digest for job in main}
    return {
        "study": study.model_dump(mode="json"),
        "models": [_model(job, cache) | {"trial": key not in kept} for key, job in every.items()],
        "rows": [
            _labels(job) | {"setting": job.setting.shown_as, "evaluation": evaluation.name} | row
            for job in main
            if job.result(cache)["held_out_loss"] is not None
            for evaluation in asked(job)
            for row in asking.evaluate(job, evaluation, cache)
        ],
        "baselines": [
            {"setting": setting.shown_as, "evaluation": evaluation.name} | row
            for setting in study.settings
            for evaluation in setting.evaluations
            if evaluation.plain
            for row in asking.baselines(plan.job(study.arrangements[0], setting, study.seeds[0]), evaluation, cache)
        ],
        "examples": some_examples(plan, cache),
        "machine": machine(),
    }


def some_examples(plan: Plan, cache: Path) -> list[dict[str, Any]]:
    """A few questions of every evaluation in a world with what each arrangement answered (first seed).

    Returns:
        `setting`, `evaluation`, `x`, `saw` (the context), `question`, `expected`, `at` (the character of the context
        at which the answer stands, or None) and `said`: the answer, and whether it was right, by arrangement.
    """
    from mosaics.experiments.questions import WorldQuestions, telling

    found = []
    for setting in plan.study.settings:
        jobs = [plan.job(arrangement, setting, plan.study.seeds[0]) for arrangement in plan.study.members(setting)]
        for evaluation in setting.evaluations:
            able = [job for job in jobs if job.result(cache)["held_out_loss"] is not None and evaluation in asked(job)]
            if evaluation.suite != "world" or not evaluation.plain or not able:
                continue
            records = {
                job.arrangement.label: {r["id"]: r for r in asking.answers(job, evaluation, cache)["examples"]}
                for job in able
            }
            known = {example.id: (x, example) for x, example in WorldQuestions(**evaluation.options).asked()}
            for name in telling(records, {name: x for name, (x, _) in known.items()}):
                x, example = known[name]
                said = {label: [mine[name]["prediction"], bool(mine[name]["score"])] for label, mine in records.items()}
                found.append(
                    {"setting": setting.shown_as, "evaluation": evaluation.name, "x": x, "saw": example.context}
                    | {"question": example.question, "expected": example.answer, "at": _place(example), "said": said}
                )
    return found


def _place(example: WorldExample) -> int | None:
    """The character of the context at which the answer stands, if it does."""
    words = example.context.split()
    place = -1 if example.distance is None else len(words) + len(example.question.split()) - example.distance
    if not 0 <= place < len(words) or words[place] != example.answer:
        return None
    return sum(len(word) + 1 for word in words[:place])


class Plan:
    """The trainings of a study: first tuning trials, round by round, then all seeds with what was best.

    Attributes:
        tried: the trials that are done, by digest, also those that another study left in the cache.
    """

    def __init__(self, study: Study, cache: Path) -> None:
        self.study, self.cache = study, cache
        from mosaics.training.setup import build_config, check_model

        self.tried: dict[str, Training] = {}
        for setting in study.settings:  # whatever is impossible is said before anything is trained
            for arrangement in study.members(setting):
                recipe = Training(arrangement, study.arrangements[0], setting, study.seeds[0]).recipe
                check_model(build_config(recipe), recipe.training.context_length)

    def trials(self) -> list[Training]:
        """What is to be tried next, in all settings; nothing when the best is known of all."""
        found = []
        for setting in self.study.settings:
            for arrangement in self.study.members(setting):
                missing, _ = self._tuned(arrangement, setting)
                found += [job for job in missing if job.digest not in {other.digest for other in found}]
        return found

    def expected(self) -> tuple[list[Training], list[Training]]:
        """The trials and trainings to come, as far as can be said before the trials."""
        trials = []
        for setting in self.study.settings:
            for arrangement in self.study.members(setting):
                axes, seed = _axes(arrangement, setting), self.study.seeds[0]
                start = None if setting.start is None else self.job(arrangement, setting.start, seed)
                trials += [
                    self._training(
                        arrangement, setting, seed, _first(axes) | {axis: value}, start, setting.tuning_steps
                    )
                    for axis, values in axes.items()
                    for value in values
                ]
        return trials, self.jobs()

    def jobs(self) -> list[Training]:
        """All seeds of all arrangements in all settings, with what was best."""
        return [
            self.job(arrangement, setting, seed)
            for setting in self.study.settings
            for seed in self.study.seeds
            for arrangement in self.study.members(setting)
        ]

    def job(self, arrangement: Arrangement, setting: Setting, seed: int) -> Training:
        """One of them."""
        start = None if setting.start is None else self.job(arrangement, setting.start, seed)
        _, best = self._tuned(arrangement, setting)
        return self._training(arrangement, setting, seed, best, start)

    def _tuned(self, arrangement: Arrangement, setting: Setting) -> tuple[list[Training], dict[str, Any]]:
        """Trials that are missing, and the best variant so far."""
        axes = _axes(arrangement, setting)
        if setting.start is not None:  # the rate of fine-tuning is tuned by itself, on what the first seed began with
            missing, _ = self._tuned(arrangement, setting.start)
            if missing:
                return missing, {}
            start = self.job(arrangement, setting.start, self.study.seeds[0])
            if start.result(self.cache) is None:
                return ([start] if any(len(values) > 1 for values in axes.values()) else []), _first(axes)
        else:
            start = None

        def trial(variant: dict[str, Any]) -> Training:
            return self._training(arrangement, setting, self.study.seeds[0], variant, start, setting.tuning_steps)

        def score(variant: dict[str, Any]) -> tuple[float, ...] | None:
            job = trial(variant)
            result = job.result(self.cache)
            if result is None:
                return None
            self.tried.setdefault(job.digest, job)
            return merit(setting, result)

        missing, best = next_trials(axes, score, setting.beyond)
        return [trial(variant) for variant in missing], best

    def _training(self, arrangement, setting, seed, variant, start=None, steps=None) -> Training:
        return Training(arrangement, self.study.arrangements[0], setting, seed, variant, start, steps)


def _axes(arrangement: Arrangement, setting: Setting) -> dict[str, tuple[Any, ...]]:
    """What is tried for an arrangement: options of memories only where it has them."""
    from mosaics.models import PRESETS, MosaicConfig

    if arrangement.preset not in PRESETS:
        return {}
    plain, axes = MosaicConfig.from_preset(arrangement.preset), setting.tuning | arrangement.tuning
    if not setting.tuning:  # nothing is tried
        axes = {key: values[:1] for key, values in axes.items()}
    return {key: v for key, v in axes.items() if not key.startswith("model.") or plain.has(key.partition(".")[2])}


def _first(axes: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {axis: values[0] for axis, values in axes.items()}


def merit(setting: Setting, result: dict[str, Any]) -> tuple[float, ...]:
    """What trials are ranked by, the lowest first: the steps until enough was learnt; of those that did not, how much
    was (the mean of the last three probes); without probes the loss on held-out rows. One that diverged is the last."""
    loss = result["held_out_loss"]
    if loss is None:
        return (math.inf, math.inf)
    if setting.probe is None or setting.probe.enough is None:
        return (0.0, loss)
    steps = trainings.steps_to_enough(setting, result["probes"])
    if steps is not None:
        return (0.0, steps, loss)
    last = [value for *_, value in result["probes"][-3:]] or [0.0]
    falls = setting.data.corpus is not None
    return (1.0, sum(last) / len(last) * (1 if falls else -1), loss)


def next_trials(
    axes: dict[str, tuple[Any, ...]], score: Callable[[dict[str, Any]], tuple[float, ...] | None], beyond: int = 0
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What is to be tried next, one key after the other, and the best of what is known.

    After the last key, the neighbours of the best of the first are tried once more, with the best of the others; both
    times it goes on while the best is at the edge of what was tried.

    Args:
        axes: values by key; what is not being tried has the best value so far, at first the first one.
        score: of a variant, the lower the better; None if it was not tried.
        beyond: by how many factors of 2 `training.learning_rate` may go beyond its values.

    Returns:
        Variants (nothing when all is known) and the best one.
    """
    best = _first(axes)
    for again in (False, True):
        for axis, values in axes.items():
            if again and axis != next(iter(axes)):
                break
            values, reach = list(values), None
            if axis == "training.learning_rate" and beyond:
                reach = (min(values) * 0.5**beyond, max(values) * 2.0**beyond)
            if again:
                values = sorted({*values, best[axis]}) if reach or all(map(_is_number, values)) else values
                place = values.index(best[axis])
                values = values[max(0, place - 1) : place + 2]
            while True:
                tried = [best | {axis: value} for value in values]
                missing = [variant for variant in tried if score(variant) is None]
                if missing:
                    return missing, best
                top = min(tried, key=score)
                edge = {min(values, key=_rank): 0.5, max(values, key=_rank): 2.0}.get(top[axis])
                if reach is None or edge is None or len(values) < 2 or not reach[0] <= top[axis] * edge <= reach[1]:
                    break
                values.append(top[axis] * edge)
            best = top
    return [], best


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rank(value: Any) -> float:
    return value if _is_number(value) else math.nan


def asked(job: Training) -> tuple[Evaluation, ...]:
    """The evaluations that make sense for an arrangement: memories and options are only taken out or changed where they
    are."""
    from mosaics.models import MosaicConfig

    plain = MosaicConfig.from_preset(job.arrangement.preset)
    names = {name for steps in plain.block_steps() for name, _ in named(steps)}
    return tuple(
        evaluation
        for evaluation in job.setting.evaluations
        if set(evaluation.without) <= names
        and all(map(plain.has, evaluation.changes))
        and (evaluation.stretch is None or plain.has("rotary_scaling"))
        and (not evaluation.only or job.arrangement.label in evaluation.only)
    )


def _model(job: Training, cache: Path) -> dict[str, Any]:
    """What is known of a trained model; `enough_at` is the step at which it had learnt enough, if it ever did."""
    result = job.result(cache)
    return _labels(job) | result | {"enough_at": trainings.steps_to_enough(job.setting, result["probes"])}


def _labels(job: Training) -> dict[str, Any]:
    return {"setting": job.setting.name, "arrangement": job.arrangement.label, "seed": job.seed}


def _do(job: Training, evaluations: tuple[Evaluation, ...], cache: Path) -> str:
    if trainings.train(job, cache)["held_out_loss"] is not None:
        for evaluation in evaluations:
            asking.evaluate(job, evaluation, cache)
    return str(job)


def run_each(function: Callable[..., str], tasks: list[tuple], jobs: int, what: str) -> None:
    """Calls a function with each of the arguments, in order or side by side."""

    def told(number: int, name: str) -> None:
        say(f"[{what} {number} of {len(tasks)}] {name}")

    if jobs == 1:
        for number, task in enumerate(tasks, 1):
            told(number, function(*task))
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, use_threads, (threads,)) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                told(number, future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def use_threads(count: int) -> None:
    """Set up a process of a pool."""
    import torch

    end_with_parent()
    torch.set_num_threads(count)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the main process says it


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    import mosaics

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"mosaics": mosaics.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"device": device, "cores": os.cpu_count()} | versions
