"""Any task of lm-eval (the language model evaluation harness), by name or from a task file."""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from mosaics.evaluation.example import Example, Record
from mosaics.evaluation.results import Suite
from mosaics.extras import how_to_install


class LmEval(Suite):
    """Tasks of lm-eval, with its prompts, shots and metrics.

    Attributes:
        tasks: names that lm-eval knows, or task files (`.yaml`). A task file can name Python functions, which are run.
        samples: questions of each task at most, the first ones.
        fewshot: solved questions in front; a task's own number if not given.
        allow_code: lets tasks that say so execute what the model writes, on this machine.
        seed: of the draws of lm-eval.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    samples: int | None = Field(None, ge=1)
    fewshot: int | None = Field(None, ge=0)
    allow_code: bool = False
    seed: int = 0

    name: ClassVar[str] = "lm-eval"

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if _is_file(task):
                if not Path(task).is_file():
                    raise ValueError(f"there is no file {task}")
            elif task not in (known := task_manager().all_tasks):
                near = get_close_matches(task, known, n=1)
                raise ValueError(
                    f"lm-eval has no task {task}; "
                    + (f"did you mean {near[0]}?" if near else "give a name from its list, or a task file (.yaml)")
                )
        return tasks

    @property
    def block(self) -> int:
        return 1

    def sources(self) -> list[str]:
        return [task for task in self.tasks if _is_file(task)]

    def examples(self, scorer) -> list[Example]:
        return [Example(task, task, []) for task in self.tasks]

    def answer(self, scorer, examples: Sequence[Example]) -> list[Record]:
        options = dict(samples=self.samples, fewshot=self.fewshot, allow_code=self.allow_code, seed=self.seed)
        records = []
        for example in examples:
            found = run_task(scorer, example.id, **options)
            first = next((value for metrics in found["metrics"].values() for value in metrics.values()), None)
            if first is None:
                raise ValueError(f"lm-eval gave no metric for {example.id}; the task has to name one (metric_list)")
            records.append(Record.of(example, None, first, **found))
        return records

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        rows = []
        for record in records:
            for task, metrics in record.meta["metrics"].items():
                for key, value in metrics.items():
                    metric, _, filtered = key.partition(",")
                    row = {"task": task, "metric": metric, "filter": filtered, "value": value}
                    rows.append(row | {"questions": record.meta["questions"].get(task)})
        return {"tables": {"tasks": rows}, "notes": ["Metrics are lm-eval's own, as it reports them."]}


def run_task(
    scorer,
    task: str | dict[str, Any],
    *,
    samples: int | None = None,
    fewshot: int | None = None,
    allow_code: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """One task, or one group of tasks, through lm-eval's `hf` model.

    Args:
        scorer: the model, its batch size and limit.
        task: lm-eval's name, a task file, or a configuration.
        samples: questions at most, the first ones.
        fewshot: solved questions in front; None: as the task says.
        allow_code: lets the task execute what the model writes.
        seed: of lm-eval's draws.

    Returns:
        `questions` (by task), `metrics` (by task, all numbers that lm-eval gives) and `samples` (each question's prompt
        digest, answer, target and metrics).

    Raises:
        ValueError: lm-eval is not installed, the task can't be read, or its data can't be had.
    """
    with _installed():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    # lm-eval cuts what is longer than this; going beyond the training length is no reason to.
    model = HFLM(
        pretrained=scorer.model,
        tokenizer=scorer.tokenizer,
        batch_size=scorer.batch_size,
        max_length=scorer.limit or 1 << 17,
    )
    try:
        results = simple_evaluate(
            model,
            tasks=[task],
            num_fewshot=fewshot,
            limit=samples,
            task_manager=task_manager(index=not _stands_alone(task)),
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=allow_code,
        )
    except Exception as error:  # a task is a program: it can fail in any way
        if "out of memory" in str(error) or isinstance(error, MemoryError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"lm-eval can't run {task} ({reason}); see that the task and its data are there") from error
    return {
        "questions": {name: count["effective"] for name, count in results["n-samples"].items()},
        "metrics": {
            name: {
                key: float(value)
                for key, value in metrics.items()
                if "," in key and isinstance(value, int | float) and math.isfinite(value)
            }
            for name, metrics in results["results"].items()
        },
        "samples": [
            {
                "id": f"{name}/{sample['doc_id']}",
                "prompt_digest": hashlib.sha256(repr(sample["arguments"]).encode()).hexdigest()[:16],
                "prediction": _plain(sample["filtered_resps"]),
                "references": _plain(sample["target"]),
                "score": _plain({key: sample[key] for key in sample["metrics"]}),
            }
            for name, asked in results["samples"].items()
            for sample in asked
        ],
    }


@cache
def task_manager(index: bool = True):
    """lm-eval's index of tasks, which takes half a minute to make; without it, what finds task files alone."""
    with _installed():
        from lm_eval.tasks import TaskManager
    return TaskManager(include_defaults=index)


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"lm-eval is not installed: {how_to_install('eval')}") from error


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _stands_alone(task: str | dict[str, Any]) -> bool:
    """Whether a task is one in a file, and no group, which may name others."""
    if not isinstance(task, str) or not _is_file(task):
        return False
    return not re.search(r"^group\s*:", Path(task).read_text(encoding="utf-8", errors="replace"), re.M)


def _plain(value: Any) -> Any:
    """The same in lists, dictionaries, numbers and text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
