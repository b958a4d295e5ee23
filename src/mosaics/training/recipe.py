"""Recipes: what a run does, as typed YAML with dotted overrides.

A recipe has the sections below. Everything that decides a result is in it; the run folder keeps it resolved,
with every default written out.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_MOST_VALUES = 10_000


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelSection(_Section):
    """A preset's name; every further key is an override that `MosaicConfig.from_preset` checks: `name.option`, or a
    mapping under a memory's name, is about the memories of that name."""

    model_config = ConfigDict(extra="allow")

    preset: str | None = Field("memory-mosaics-v2-tiny", description="null: the arrangement of training.init_from")

    @model_validator(mode="before")
    @classmethod
    def _qualified(cls, values: Any) -> Any:
        """Options of a memory, a mapping under its name, as `name.option`."""
        if not isinstance(values, dict):
            return values
        found: dict[str, Any] = {}
        for key, value in values.items():
            inner = {f"{key}.{option}": v for option, v in value.items()} if isinstance(value, dict) else {key: value}
            found |= inner
        return found

    def overrides(self) -> dict[str, Any]:
        """The keys beside `preset`."""
        return dict(self.model_extra or {})


class DataSection(_Section):
    """The corpus, its tokenizer and how documents are packed."""

    corpus: str = Field("python-stdlib", description="what `mosaics prepare` takes: a name, path, glob or data set id")
    field: str = Field("text", description="the field of a .jsonl record or data set row that holds the text")
    tokenizer: str | None = Field(None, description="path or id; null trains a byte-level BPE on the corpus")
    vocabulary_size: int = Field(4096, ge=260, le=1_000_000, description="size of a tokenizer trained here")
    validation: float = Field(0.05, gt=0, lt=1, description="share of documents that is held out")
    long_documents: Literal["split", "truncate"] = Field("split", description="documents longer than the context")
    prepared: str | None = Field(None, description="a folder made by `mosaics prepare`; null prepares into the run")


class Extension(_Section):
    """More steps for a run that was finished. The learning rate stays where it ended (`constant`), or rises to its peak
    again and falls as it did before (`rewarm`)."""

    steps: int = Field(ge=1)
    schedule: Literal["constant", "rewarm"] = "constant"


class TrainingSection(_Section):
    """Optimisation. Defaults are those of the paper's Appendix C where it names one."""

    steps: int = Field(1000, ge=1)
    context_length: int = Field(512, ge=2, description="tokens in a sequence")
    batch_size: int = Field(16, ge=1, description="sequences in an optimisation step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences at a time and process; null: all it has")
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(100, ge=0)
    final_learning_rate_ratio: float = Field(0.01, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    if_not_finite: Literal["stop", "skip"] = Field("stop", description="a step whose loss or gradient is not finite")
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    activation_checkpointing: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    init_from: str | None = Field(None, description="a model's folder, a run or a checkpoint to begin with")
    extensions: tuple[Extension, ...] = Field(
        (), description="what `mosaics train --run FOLDER --extend STEPS` appends"
    )

    @model_validator(mode="after")
    def _long_enough(self) -> "TrainingSection":
        for extension in self.extensions:
            if extension.schedule == "rewarm" and extension.steps <= self.warmup_steps:
                raise ValueError(
                    f"an extension of {extension.steps} steps ends before it has warmed up again, which takes "
                    f"{self.warmup_steps} (training.warmup_steps); give more steps, or the schedule constant"
                )
        return self

    @property
    def ends(self) -> list[int]:
        """The last step of the recipe as it began, and that of each extension."""
        return list(accumulate([self.steps, *(extension.steps for extension in self.extensions)]))

    @property
    def last_step(self) -> int:
        """The last step of all."""
        return self.ends[-1]


class ValidationSection(_Section):
    """When and on how much held-out text the loss is measured."""

    every: int = Field(100, ge=1, description="optimisation steps; also before the first and after the last")
    sequences: int | None = Field(64, ge=1, description="evenly spaced over the held-out text; null: all")
    samples: int = Field(0, ge=0, description="beginnings of held-out text that the model goes on from, each time")


class CheckpointSection(_Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(200, ge=1, description="optimisation steps; also after the last")
    keep: int = Field(2, ge=2, description="the newest ones")
    keep_every: int | None = Field(None, ge=1, description="steps divisible by this are kept for good")
    if_damaged: Literal["previous", "stop"] = Field("previous", description="what a run continues from then")


class LoggingSection(_Section):
    """What is written while training."""

    every: int = Field(10, ge=1, description="optimisation steps between lines of metrics.jsonl")
    tensorboard: bool = False
    tracker: str | None = Field(None, description="wandb, mlflow or what else accelerate knows")
    tracker_options: dict[str, Any] = Field({}, description="of the tracker, as accelerate's class takes them")


class ExportSection(_Section):
    """What the exported model says of itself."""

    license: str = Field("unknown", description="licence of the weights, as the Hugging Face hub names it")


class Recipe(_Section):
    """A whole run. `load_recipe` makes one from YAML and overrides."""

    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    export: ExportSection = ExportSection()

    @property
    def tokens_per_step(self) -> int:
        """Positions in one optimisation step, padding included."""
        return self.training.batch_size * self.training.context_length

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain data."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key."""

        def below(values: dict[str, Any], prefix: str) -> dict[str, Any]:
            parts = (below(v, f"{k}.") if isinstance(v, dict) else {k: v} for k, v in values.items())
            return {f"{prefix}{key}": value for part in parts for key, value in part.items()}

        return below(self.resolved(), "")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, sections in their order."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def load_recipe(source: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file, or the name of a recipe that comes with the package (`shipped_recipes`).
        overrides: values by dotted key, such as ``{"training.steps": 100}``; they replace what the file says.

    Returns:
        The resolved recipe.

    Raises:
        ValueError: not a recipe, an unknown key (the nearest valid one is named) or an impossible value.
        OSError: the file can't be read.
    """
    path = find_recipe(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}), so it is no recipe") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: impossible dates, endless numbers
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, but a recipe is a mapping of sections")
    _check_size(values, str(path))
    for dotted, value in (overrides or {}).items():
        *sections, key = dotted.split(".")
        place = values
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ValueError(f"--{dotted}: {section} is a value, not a section, in {path}")
        place[key] = value
    return make_recipe(values, str(path))


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


def make_recipe(values: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check plain values and make a `Recipe`; `name` is where they came from, for error messages.

    Raises:
        ValueError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
        dotted = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            text = f"unknown key {dotted}{_did_you_mean(dotted, recipe_keys())}"
        elif first["type"] == "value_error":  # about several keys
            text = first["msg"].removeprefix("Value error, ")
        else:
            text = f"{dotted} = {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        more = f" (and {len(others)} more)" if others else ""
        raise ValueError(f"{name}: {text}{more}") from error


def _check_size(values: Any, name: str) -> None:
    """Refuse what grows or goes on for ever when its YAML aliases are followed."""
    queue, seen = [values], 0
    while queue:
        value = queue.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise ValueError(f"{name} holds more than {_MOST_VALUES} values, so it is no recipe")
        if isinstance(value, dict | list):
            queue += value.values() if isinstance(value, dict) else value


def recipe_keys() -> list[str]:
    """All dotted keys of a recipe, sections first."""
    keys = list(Recipe.model_fields)
    for section, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{section}.{key}" for key in field.annotation.model_fields]
    return keys


_PREPARED = {f"data.{key}" for key in ("corpus", "field", "tokenizer", "vocabulary_size", "validation")}


def parse_overrides(words: Sequence[str], options: Iterable[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Split words of a command line into dotted overrides and the rest.

    ``--training.steps 100`` and ``--training.steps=100`` are the same; values are read as YAML scalars and
    lists (``null``, ``true``, ``1e-3``, ``[8, 32]``), anything else is text. Of a key that is given twice the last
    value counts.

    Args:
        words: the words.
        options: names of other options, for the hint in an error message.

    Returns:
        Values by dotted key, and the words that belong to no override.

    Raises:
        ValueError: an unknown option or a missing value.
    """
    overrides: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("-") or word == "-":
            rest.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.split(".")[0] not in Recipe.model_fields:
            hint = _did_you_mean(word.partition("=")[0], [*options, *(f"--{key}" for key in recipe_keys())])
            raise ValueError(f"unknown option {word.partition('=')[0]}{hint}")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ValueError(f"--{name} needs a value, as in --{name} VALUE")
            value = queue.pop(0)
        if name == "data.corpus" and name in overrides:
            raise ValueError("--data.corpus is given twice; give one, or mosaics prepare --corpus A --corpus B first")
        overrides[name] = _read_value(value)
    made = [name for name in overrides if name in _PREPARED]
    if made and overrides.get("data.prepared") is not None:
        raise ValueError(f"--{made[0]} says nothing beside --data.prepared, whose text is tokenised; leave one out")
    return overrides, rest


def _read_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    return value if value is None or isinstance(value, bool | int | float | list) else text


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    packaged = Path(str(resources.files("mosaics"))) / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        ValueError: there is neither; the nearest name is in the message.
    """
    path, shipped = Path(source), shipped_recipes()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    hint = _did_you_mean(path.stem, list(shipped))
    raise ValueError(f"no recipe {source}{hint}; give a YAML file or one of {', '.join(shipped)}")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Sentences such as ``training.steps is 100 there and 200 here``, one for each key that differs."""
    there, here = old.flat(), new.flat()
    return [
        f"{key} is {there.get(key, 'unset')!r} there and {here.get(key, 'unset')!r} here"
        for key in {**there, **here}
        if there.get(key, "unset") != here.get(key, "unset")
    ]


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint with the nearest of the names; for a dotted key without one, the keys of its section."""
    names = list(names)
    section, _, last = name.rpartition(".")
    near = {other.rpartition(".")[2]: other for other in names if other.rpartition(".")[0] == section}
    nearest = (
        [near[key] for key in get_close_matches(last, near, n=1, cutoff=0.7)]
        or [other for other in names if other.rpartition(".")[2] == last.removeprefix("--")]  # in another section
        or get_close_matches(name, names, n=1, cutoff=0.7)
    )
    if section and near and (not nearest or nearest[0] not in near.values()):
        return f" ({section} has {', '.join(near)})"
    return f" (did you mean {nearest[0]}?)" if nearest else ""
