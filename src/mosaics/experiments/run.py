"""Running a study: tuning trials, then every arrangement in every setting with every seed, then what they are asked."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mosaics.experiments import work
from mosaics.experiments.study import Arrangement, Evaluation, Setting, Study
from mosaics.experiments.work import Training, say


def run_study(study: Study, cache: Path, jobs: int = 1) -> dict[str, Any]:
    """Do what the cache does not hold yet, and collect everything.

    Args:
        study: what to do.
        cache: where trained models and answers lie; studies may share it. An interrupted study goes on from there.
        jobs: processes that train side by side, each with its share of the cores.

    Returns:
        `study` (plain data), `models` (one for each training, with loss and cost; `trial` marks those of the tuning
        alone), `rows` (arrangement, setting, evaluation, seed, x, y, perhaps low and high), `baselines` and `machine`.

    Raises:
        ValueError: an arrangement or a setting is impossible.
    """
    plan = _Plan(study, cache)
    trials = list(plan.trials())
    run_each(_do, [(job, (), cache) for job in trials], jobs, "tuning trial")
    main = list(plan.jobs())
    run_each(_do, [(job, _asked(job), cache) for job in main], jobs, "model")
    every = {job.digest: job for job in [*main, *trials]}
    kept = {job.digest for job in main}
    return {
        "study": study.model_dump(mode="json"),
        "models": [_labels(job) | {"trial": key not in kept} | job.result(cache) for key, job in every.items()],
        "rows": [
            _labels(job) | {"setting": job.setting.shown_as, "evaluation": evaluation.name} | row
            for job in main
            if job.result(cache)["held_out_loss"] is not None
            for evaluation in _asked(job)
            for row in work.evaluate(job, evaluation, cache)
        ],
        "baselines": [
            {"setting": setting.name, "evaluation": evaluation.name} | work.baselines(evaluation, cache)
            for setting in study.settings
            for evaluation in setting.evaluations
            if evaluation.suite == "world" and not evaluation.without and not evaluation.options.get("named_classes")
        ],
        "machine": machine(),
    }


class _Plan:
    """The trainings of a study; those after the tuning are known once its trials are in the cache."""

    def __init__(self, study: Study, cache: Path) -> None:
        self.study, self.cache = study, cache
        for arrangement in study.arrangements:  # whatever is impossible is said before anything is trained
            for setting in study.settings:
                Training(arrangement, study.arrangements[0], setting, study.seeds[0])

    def trials(self) -> Iterator[Training]:
        for setting in self.study.settings:
            for arrangement in self.study.arrangements:
                yield from self._trials(arrangement, setting)

    def jobs(self) -> Iterator[Training]:
        for setting in self.study.settings:
            for seed in self.study.seeds:
                for arrangement in self.study.arrangements:
                    yield self._job(arrangement, setting, seed)

    def _trials(self, arrangement: Arrangement, setting: Setting) -> list[Training]:
        if setting.start is not None:  # what goes on from another training is not tuned itself
            return self._trials(arrangement, setting.start)
        rates = setting.learning_rates if len(setting.learning_rates) > 1 else ()
        return [self._training(arrangement, setting, self.study.seeds[0], rate) for rate in rates]

    def _job(self, arrangement: Arrangement, setting: Setting, seed: int) -> Training:
        if setting.start is not None:
            start = self._job(arrangement, setting.start, seed)
            return self._training(arrangement, setting, seed, None, start)
        trials = self._trials(arrangement, setting)
        if trials:
            losses = [trial.result(self.cache)["held_out_loss"] for trial in trials]
            best = min(range(len(trials)), key=lambda i: math.inf if losses[i] is None else losses[i])
            rate = setting.learning_rates[best]
        else:
            rate = next(iter(setting.learning_rates), None)
        return self._training(arrangement, setting, seed, rate)

    def _training(self, arrangement, setting, seed, rate, start=None) -> Training:
        return Training(arrangement, self.study.arrangements[0], setting, seed, rate, start)


def _asked(job: Training) -> tuple[Evaluation, ...]:
    """The evaluations that make sense for an arrangement: memories can only be taken out where they are."""
    from mosaics.models import PRESETS

    blocks = PRESETS[job.arrangement.preset]["blocks"]
    has = {memory["type"] for group in blocks for step in group["steps"] for memory in step}
    return tuple(evaluation for evaluation in job.setting.evaluations if set(evaluation.without) <= has)


def _labels(job: Training) -> dict[str, Any]:
    return {"setting": job.setting.name, "arrangement": job.arrangement.label, "seed": job.seed}


def _do(job: Training, evaluations: tuple[Evaluation, ...], cache: Path) -> str:
    if work.train(job, cache)["held_out_loss"] is not None:
        for evaluation in evaluations:
            work.evaluate(job, evaluation, cache)
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

    torch.set_num_threads(count)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the main process says it


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    import torch

    import mosaics

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"mosaics": mosaics.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"device": device, "cores": os.cpu_count()} | versions
