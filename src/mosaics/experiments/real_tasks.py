"""What models of text are asked on real data, in the paper's protocols: many-shot classification and questions about
documents."""

from __future__ import annotations

from pathlib import Path

from mosaics.evaluation.files import known_form
from mosaics.evaluation.in_context_learning import LABELS, InContextLearning
from mosaics.evaluation.in_context_learning import READERS as CLASSIFIED
from mosaics.evaluation.new_knowledge import QA_TASKS as QUESTIONS
from mosaics.evaluation.new_knowledge import READERS as DOCUMENTS
from mosaics.experiments.study import Evaluation

SHOTS = {"banking77": (1, 2), "goemotions": (1, 4), "fewrel": (1, 4), "babi": (1, 4, 16)}
CLASSES = tuple(f"{task}, {labels}" for task in SHOTS for labels in LABELS)


def real_tasks(files: dict[str, str], samples: int) -> tuple[Evaluation, ...]:
    """What is asked on real data, by models of text: a twentieth of the questions for each number of shots and
    each length, since each takes long; those tasks whose files are there. They are read, before anything is trained.

    Args:
        files: paths by the names that `InContextLearning` and `NewKnowledge` give them.
        samples: questions for each length or number of shots elsewhere.

    Raises:
        ValueError: a file of another name or form, or some but not all of a task.
        OSError: there is no such file.
    """
    needed = {task: CLASSIFIED[task][0] for task in SHOTS} | {task: (task,) for task in QUESTIONS}
    known = [*(name for names in needed.values() for name in names), "fewrel_names"]
    for name, path in files.items():
        if name not in known:
            raise ValueError(f"--data {name}=… is no file of real tasks; they take {', '.join(known)}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"--data {name}: there is no file {path}")
    for task, names in needed.items():
        if 0 < len(set(names) & files.keys()) < len(names):
            raise ValueError(f"the task {task} needs all of --data {', '.join(f'{name}=PATH' for name in names)}")
    found = []
    for task, shots in SHOTS.items():
        if set(needed[task]) <= files.keys():
            mine = {name: files[name] for name in (*needed[task], f"{task}_names") if name in files}
            options = {"data": mine, "tasks": [task], "strategies": ["newline-shuffled"], "shots": list(shots)}
            options |= {"samples": max(1, samples // 20)}
            if not any(True for _ in InContextLearning(**options).examples(None)):
                raise ValueError(f"{' and '.join(mine.values())} hold no question with a class that is shown")
            found += [
                Evaluation(name=f"{task}, {labels}", suite="many-shot", options=options | {"labels": [labels]})
                for labels in LABELS
            ]
    options = {"lengths": [1024, 2048, 4096], "samples": max(1, samples // 20)}
    for task in QUESTIONS:
        if task in files:
            with known_form(files[task]):
                DOCUMENTS[task](files[task])
            mine = {"data": {task: files[task]}, "tasks": [task]}
            found.append(Evaluation(name=task, suite="documents", options=options | mine))
    return tuple(found)
