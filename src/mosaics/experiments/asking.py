"""What trained models are asked, once: every answer lies in the cache beside its model, under a digest of all that
decides it; and what simple predictors reach on the same questions."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosaics.experiments.study import Evaluation, digest
from mosaics.experiments.trainings import Source, Training, locked, prepared, say, word_digest, write_json

if TYPE_CHECKING:
    from mosaics.experiments.questions import Asked


_RANKED = 16  # rows that heads are ranked by


def evaluate(job: Training, evaluation: Evaluation, cache: Path) -> list[dict[str, Any]]:
    """Ask a trained model, unless the cache has its answers.

    Returns:
        Rows with `x` (tokens, shots, multiple of the training length ...), `y`, where there is one the interval `low`,
        `high`, and the `scores` of single examples, in an order that is the same for all models; so many after the
        other as `groups` says belong together: questions about one context, or stretches of one document.

    Raises:
        ValueError: the model's training diverged, or it has no such memory to take out.
    """
    if evaluation.stretch is None:
        return _asked(job, evaluation, evaluation.options, evaluation.changes, cache)
    rows, length = [], _length(job)
    points, unit, same = "lengths", length, {}
    if evaluation.suite == "perplexity":  # all of the same text
        points, unit, same = "multiples", 1, {"stretch": max(evaluation.options["multiples"])}
    for point in evaluation.options[points]:
        stretched = {"rotary_scaling": evaluation.stretch, "rotary_factor": float(max(1.0, point / unit))}
        changes = evaluation.changes | stretched | {"rotary_trained_length": length}
        rows += _asked(job, evaluation, evaluation.options | same | {points: [point]}, changes, cache)
    return rows


def _asked(
    job: Training, evaluation: Evaluation, options: dict[str, Any], changes: dict[str, Any], cache: Path
) -> list[dict[str, Any]]:
    from mosaics.experiments.questions import SUITES

    asked = SUITES[evaluation.suite]
    return _points(asked, answers(job, evaluation, cache, options, changes))


def _points(asked: Asked, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `evaluate` from what was answered."""
    parts: dict[Any, dict[str, list[float]]] = {}
    for example in found["examples"] if asked.point else ():
        meta = example["meta"]
        group = example["id"] if asked.group is None else str(meta[asked.group])
        parts.setdefault(meta[asked.point], {}).setdefault(group, []).append(example["score"])
    rows = []
    for row in found["summary"]["tables"][asked.table]:
        rows.append({"x": row[asked.x], "y": row[asked.y]} | {key: row[key] for key in ("low", "high") if key in row})
        if groups := list(parts.get(row[asked.x], {}).values()):
            rows[-1] |= {"scores": [s for group in groups for s in group], "groups": list(map(len, groups))}
    return rows


def answers(
    job: Training,
    evaluation: Evaluation,
    cache: Path,
    options: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a trained model said to every example, and its tables, as `mosaics.evaluation.evaluate` writes them; asked
    now unless the cache has it. `options` and `changes` take the place of those of the evaluation."""
    from mosaics.experiments.questions import SUITES

    options = evaluation.options if options is None else options
    changes = evaluation.changes if changes is None else changes
    suite = SUITES[evaluation.suite].suite
    sample = word_digest(options.get("task"), "automata" in suite.model_fields)
    silent = [evaluation.without_longest] if evaluation.without_longest else []
    key = digest([suite.name, options, evaluation.without, changes, job.setting.data.test, sample, *silent])
    if "training_length" in suite.model_fields:  # it asks about text
        text = job.setting.data.test or str(prepared(job.setting.data, cache))
        options = {"data": text, "field": job.setting.data.field, "training_length": _length(job)} | options
    with locked(job.folder(cache) / "evaluations" / key) as folder:
        if not (folder / "results.json").is_file():
            say(f"{job}: asking {evaluation.name}")
            from mosaics.evaluation import evaluate as ask

            scorer = _scorer(job.folder(cache) / "model", evaluation.without, json.dumps(changes))
            if silent:
                from mosaics.experiments.silenced import silence_longest

                rows = Source(job.setting.data, _length(job), 0, cache).held_out.batch(0, _RANKED)["input_ids"]
                silence_longest(scorer.model, rows.to(scorer.model.device), *silent)
                _scorer.cache_clear()  # the model is another one now
            more = {"without": list(evaluation.without)} if evaluation.without else None
            ask(suite(**options), scorer, folder, model=str(job), more_settings=more, with_plot=False)
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _length(job: Training) -> int:
    """The length that text is read at: that of the first training."""
    return job.recipe.training.context_length if job.start is None else _length(job.start)


@lru_cache(maxsize=1)
def _scorer(folder: Path, without: tuple[str, ...], changes: str):
    import transformers

    from mosaics import MosaicConfig, MosaicForCausalLM
    from mosaics.evaluation import Scorer
    from mosaics.models.loading import load_tokenizer
    from mosaics.models.placing import place

    transformers.utils.logging.disable_progress_bar()
    config = MosaicConfig.from_pretrained(folder)
    for key, value in json.loads(changes).items():
        setattr(config, key, value)
    model = place(MosaicForCausalLM.from_pretrained(folder, config=config).eval(), "auto", "float32", without)
    return Scorer(model, load_tokenizer(folder))


def baselines(job: Training, evaluation: Evaluation, cache: Path) -> list[dict[str, Any]]:
    """What simple predictors reach on the same questions, at every point, unless the cache has it.

    Returns:
        For each point `x`, in a world `chance` and the accuracy of each of `mosaics.data.worlds.predictors` in percent;
        on text the nats per token of counted bigrams and trigrams (`KneserNey`), counted in all that the model of `job`
        was trained on, with their `scores` by name and `groups` as in `evaluate`; in many-shot classification chance
        and those of `CountedWords`. Nothing for other suites.
    """
    of = {"world": _world_baselines, "perplexity": _text_baselines, "many-shot": _shown_baselines}.get(evaluation.suite)
    if of is None:
        return []
    data = job.setting.data
    path = cache / "baselines" / f"{digest([evaluation.options, data.model_dump(mode='json'), evaluation.suite])}.json"
    if evaluation.suite == "perplexity":
        path = job.folder(cache) / "baselines" / f"scored-{path.name}"
    if not path.is_file():
        write_json(path, of(job, evaluation, cache))
    return json.loads(path.read_text(encoding="utf-8"))


def _world_baselines(job: Training, evaluation: Evaluation, cache: Path) -> list[dict[str, Any]]:
    from mosaics.data.worlds import World, predictors
    from mosaics.experiments.questions import WorldQuestions

    suite = WorldQuestions(**evaluation.options)
    able = predictors(World(suite.seed), suite.task, **job.setting.data.settings)
    found: dict[Any, dict[str, list[float]]] = {}
    for x, example in suite.asked():
        here = found.setdefault(x, {"chance": []})
        here["chance"].append(1 / len(example.choices))
        for name, predictor in able.items():
            here.setdefault(name, []).append(predictor.predict(example) == example.answer)
    return [
        {"x": x} | {name: round(100 * sum(values) / len(values), 2) for name, values in here.items()}
        for x, here in found.items()
    ]


class _Counts:
    """Stands in for a scorer: counted n-grams."""

    def __init__(self, model, tokenizer, training_length: int) -> None:
        self.model, self.tokenizer, self.training_length = model, tokenizer, training_length
        self.start_id = tokenizer.bos_token_id

    def encode(self, text: str, begin: bool = True) -> list[int]:
        from mosaics.data.tokenizer import encode_pieces

        return ([self.start_id] if begin else []) + encode_pieces(self.tokenizer, [text])[0].tolist()

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids)

    def token_nats(self, rows):
        import torch

        return [torch.from_numpy(self.model.nats(row)) for row in rows]


def _text_baselines(job: Training, evaluation: Evaluation, cache: Path) -> list[dict[str, Any]]:
    import numpy as np

    from mosaics.evaluation import evaluate as ask
    from mosaics.evaluation.kneser_ney import KneserNey
    from mosaics.experiments.questions import SUITES

    asked = SUITES[evaluation.suite]
    training, steps = job.recipe.training, job.result(cache)["steps"]
    source = Source(job.setting.data, training.context_length, job.seed, cache)
    say(f"{job}: counting what it was trained on")
    seen = [source.train.batch(step * training.batch_size, training.batch_size)["input_ids"] for step in range(steps)]
    tokens = np.concatenate([rows.numpy().ravel() for rows in seen])
    found: dict[Any, dict[str, Any]] = {}
    for name, order in (("bigram", 2), ("trigram", 3)):
        scorer = _Counts(KneserNey(tokens, order, len(source.tokenizer)), source.tokenizer, _length(job))
        text = job.setting.data.test or str(prepared(job.setting.data, cache))
        options = {"data": text, "field": job.setting.data.field, "training_length": _length(job)}
        counted = ask(asked.suite(**options | evaluation.options), scorer, None)
        for row in _points(asked, counted):
            here = found.setdefault(row["x"], {"x": row["x"], "scores": {}, "groups": row["groups"]})
            here[name] = round(row["y"], 4)
            here["scores"][name] = row["scores"]
    return list(found.values())


def _shown_baselines(job: Training, evaluation: Evaluation, cache: Path) -> list[dict[str, Any]]:
    """What stands beside the answers of whichever model, since it depends on the demonstrations alone."""
    from mosaics.evaluation.in_context_learning import CountedWords

    table = answers(job, evaluation, cache)["summary"]["tables"]["best strategy"]
    names = ("chance", *CountedWords.NAMES)
    return [
        {"x": row["shots"]} | {name.lower().replace(" ", "_"): round(row[name], 2) for name in names} for row in table
    ]
