"""`compare`: arrangements on equal terms, in every dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from mosaics.experiments.study import Arrangement, Data, Evaluation, Setting, Study

WORLDS = ("recall", "new-knowledge", "in-context-learning")
MULTIPLES = (1, 2, 4, 8)
SHOTS = (1, 2, 3, 4, 8, 16, 32)

WORLD_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
# Tokens that each world is trained at: classes need more of them to be shown at all.
LENGTHS = {"in-context-learning": 256, "mixed": 128}
STEPS = {"in-context-learning": 1000, "mixed": 1000}  # of the other worlds 400
WORLD_TRAINING = {"batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 50, "final_learning_rate_ratio": 1.0}
TEXT_MODEL = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "short_term.window": 64,
    "long_term.delay": 16,
    "long_term.train_delay": [16, 64],
}
TEXT_TRAINING = {"steps": 400, "context_length": 512, "batch_size": 8, "learning_rate": 4e-3, "warmup_steps": 20}
# What `--tune` tries for every arrangement: one after the other, with the best of the others so far.
TUNING: dict[str, tuple[Any, ...]] = {
    "training.learning_rate": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "model.initializer_range": (None, 0.02),
    "training.warmup_steps": (50, 200),
    "training.final_learning_rate_ratio": (1.0, 0.01),
}
ROTARY = {"model.rotary_base": (10000.0, 500000.0)}  # of attention
BEYOND = 3  # factors of 2 by which a rate may go beyond those, while the best is at the edge
TRIED_ON_TEXT = ("training.learning_rate", "model.initializer_range")  # trials there take minutes each
_SETTINGS = "data.settings."  # of a world's episodes
_NAMED_OTHERWISE = ("data.world", "data.corpus", "data.automata", "data.field")
_KEYS = tuple(key for key in Data.model_fields if f"data.{key}" not in _NAMED_OTHERWISE)
_TITLES = {
    "recall": "Recall of pairs",
    "new-knowledge": "Questions about facts of the context",
    "in-context-learning": "Classes that exist only in the prompt",
    "persistent-knowledge": "Facts of the training corpus",
}


def reach(context_length: int) -> dict[str, Any]:
    """Window and delays of the memories of v2, by the length that they are trained at: an eighth of it, and from a 32nd
    to an eighth (in the paper both are half as long: a 16th, and from a 64th to a 16th)."""
    window, delay = max(2, context_length // 8), max(1, context_length // 32)
    return {"short_term.window": window, "long_term.delay": delay, "long_term.train_delay": [delay, window]}


def world_setting(world: str, *, samples: int = 200, changes: dict[str, Any] | None = None, **more: Any) -> Setting:
    """Training in a world, and the questions that go with it; in the world `mixed`, those of all worlds.

    Args:
        world: a task of the worlds, or `mixed`.
        samples: questions for each length or number of shots.
        changes: values by dotted key, as `training.steps` or `data.settings.noise`, in the place of the usual ones.
        more: further fields of `Setting`.
    """
    budget = {"steps": STEPS.get(world, 400), "context_length": LENGTHS.get(world, 64)} | WORLD_TRAINING
    length = (changes or {}).get("training.context_length", budget["context_length"])
    model, training, data = changed(WORLD_MODEL | reach(length), budget, changes)
    tasks = _TITLES if world == "mixed" else [world]
    evaluations = tuple(world_evaluation(task, length, samples) for task in tasks)
    fields = {"name": world, "evaluations": evaluations} | more
    return Setting(data=_data(world=world, **data), model=model, training=training, **fields)


def world_evaluation(
    task: str, length: int, samples: int = 200, multiples: Sequence[int] = MULTIPLES, **more: Any
) -> Evaluation:
    """The questions of one world: at 1 to 8 times the training length, or by shots. Persistent facts are those that
    training asks for."""
    if task not in _TITLES:
        raise ValueError(f"there is no world {task!r}; choose from {', '.join(_TITLES)}, mixed")
    points: dict[str, Any] = {"lengths": [length * times for times in multiples]}
    if task == "in-context-learning":
        points = {"shots": list(SHOTS)}
    if task == "persistent-knowledge":
        points["trained"] = True
    options = {"task": task, "samples": samples} | points | more.pop("options", {})
    return Evaluation(**{"name": task, "title": _TITLES[task], "options": options} | more)


def text_setting(
    corpus: str,
    *,
    samples: int = 16,
    changes: dict[str, Any] | None = None,
    field: str = "text",
    held_out: str | None = None,
    test: str | None = None,
    **more: Any,
) -> Setting:
    """Training on text, and the loss at 1 to 8 times the training length.

    Args:
        corpus: what is trained on, as `mosaics prepare` takes it.
        samples: stretches of text.
        changes: values by dotted key in the place of the usual ones.
        field: of .jsonl records.
        held_out: documents for tuning; None: a share of the corpus.
        test: documents that are asked about; None: those for tuning.
        more: further fields of `Setting`.
    """
    model, training, data = changed(TEXT_MODEL, TEXT_TRAINING, changes)
    loss = Evaluation(
        name="loss",
        title="Loss on held-out text",
        suite="perplexity",
        options={"samples": samples, "multiples": list(MULTIPLES)},
    )
    data |= ({} if held_out is None else {"validation": held_out}) | {"test": test}
    fields = {"name": "text", "evaluations": (loss,)} | more
    return Setting(data=_data(corpus=corpus, field=field, **data), model=model, training=training, **fields)


def _data(**given: Any) -> Data:
    try:
        return Data(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = f"--data.{'.'.join(map(str, first['loc']))}"
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{key} is no key of the data; choose from {', '.join(_KEYS)}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{key} is {first['input']!r}: {message[:1].lower()}{message[1:]}") from None


def changed(model: dict[str, Any], training: dict[str, Any], changes: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Model, training and data after changes by dotted key.

    Raises:
        ValueError: a key is of no such section.
    """
    parts = {"model": dict(model), "training": dict(training), "data": {}}
    for dotted, value in (changes or {}).items():
        section, _, key = dotted.partition(".")
        if section not in parts or not key or dotted in _NAMED_OTHERWISE:
            raise ValueError(f"--{dotted} is nothing that compare can change; it takes --model.… --training.… --data.…")
        if dotted.startswith(_SETTINGS):
            parts["data"].setdefault("settings", {})[dotted.removeprefix(_SETTINGS)] = value
        else:
            parts[section][key] = value
    return list(parts.values())


def check_changes(changes: dict[str, Any] | None, taking_part: Sequence[Arrangement]) -> None:
    """Check that every change of a model is one of somebody's who takes part: options that only some have are left out
    of the others.

    Raises:
        ValueError: a change is nobody's.
    """
    from mosaics.models import MosaicConfig

    plain = [MosaicConfig.from_preset(one.preset) for one in taking_part]
    for dotted, value in (changes or {}).items():
        section, _, key = dotted.partition(".")
        if section == "model" and plain and not any(config.has(key) for config in plain):
            MosaicConfig.from_preset(taking_part[0].preset, **{key: value})  # which says what is near


def tried(learning_rates: Sequence[float] = (), tune: bool = False, keys: Sequence[str] = ()) -> dict[str, Any]:
    """What settings say of tuning: the rates alone, or `TUNING`, of which these keys, with them in its place."""
    rates = {"training.learning_rate": tuple(learning_rates)} if learning_rates else {}
    if not tune:
        return {"tuning": rates}
    return {"tuning": {k: v for k, v in (TUNING | rates).items() if not keys or k in keys}, "beyond": BEYOND}


def arrangements(
    presets: Sequence[str], match: Sequence[str] = ("parameters",), tune: bool = False
) -> tuple[Arrangement, ...]:
    """The first preset, and the others matched to it in each of the ways; `tune` tries rotary bases of attention."""
    from mosaics.models import PRESETS, MosaicConfig

    for by in match:
        if by not in ("parameters", "flops"):
            raise ValueError(f"twins are matched by parameters or flops, not by {by!r}")
    if not presets or not match or len(set(presets)) < len(presets):
        raise ValueError("name each arrangement once, and at least one")
    first, *others = presets

    def one(label: str, preset: str, **more: Any) -> Arrangement:
        attends = tune and preset in PRESETS and MosaicConfig.from_preset(preset).has("positions")
        return Arrangement(label=label, preset=preset, tuning=ROTARY if attends else {}, **more)

    found = [one(_label(first), first)]
    for preset in others:
        for by in match:
            label = _label(preset) + (f" (equal {by})" if len(match) > 1 else "")
            found.append(one(label, preset, match=by))
    return tuple(found)


def _label(preset: str) -> str:
    return preset.removesuffix("-tiny")


def study(
    presets: Sequence[str] = ("memory-mosaics-v2-tiny", "transformer-tiny"),
    worlds: Sequence[str] = WORLDS,
    corpus: str | None = "python-stdlib",
    *,
    field: str = "text",
    seeds: Sequence[int] = (0, 1, 2),
    learning_rates: Sequence[float] = (),
    tune: bool = False,
    match: Sequence[str] = ("parameters",),
    samples: int = 200,
    changes: dict[str, Any] | None = None,
) -> Study:
    """The study that `mosaics compare` runs.

    Args:
        presets: of the arrangements; the others are matched to the first.
        worlds: tasks of the synthetic worlds (or `mixed`), a training each.
        corpus: text, as `mosaics prepare` takes it; None for none.
        field: of .jsonl records.
        seeds: of the trainings.
        learning_rates: the tuning trials of every arrangement in every setting.
        tune: try `TUNING`, too, and rotary bases of attention; on text `TRIED_ON_TEXT` of them.
        match: `parameters`, `flops` or both.
        samples: questions for each length or number of shots.
        changes: values by dotted key (`model.…`, `training.…`, `data.…`) for all settings.
    """
    more: dict[str, Any] = {"changes": changes} | tried(learning_rates, tune)
    settings = [world_setting(world, samples=samples, **more) for world in worlds]
    if corpus is not None:
        more |= tried(learning_rates, tune, TRIED_ON_TEXT)
        settings.append(text_setting(corpus, field=field, samples=max(1, samples // 8), **more))
    if not settings:
        raise ValueError("there is nothing to train on; name --worlds or --text")
    taking_part = arrangements(presets, match, tune)
    check_changes(changes, taking_part)
    return Study(
        title=" against ".join(map(_label, presets)),
        arrangements=taking_part,
        settings=tuple(settings),
        seeds=tuple(seeds),
    )
