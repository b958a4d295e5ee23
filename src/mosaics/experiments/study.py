"""A study as plain data: which arrangements are trained on what, for how long, and what they are then asked."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


def digest(values: Any) -> str:
    """16 hexadecimal digits that change with any of the plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def digest(self) -> str:
        """A digest of all values that are not the default."""
        return digest(self.model_dump(mode="json", exclude_defaults=True))


class Arrangement(Part):
    """A preset with changes, and what it has in common with the first arrangement of its study.

    Attributes:
        label: what tables and plots call it.
        preset: as `MosaicConfig.from_preset` takes it.
        overrides: options that differ from the setting's.
        fixed_delay: train with the delay of evaluation, and not with drawn ones.
        match: `parameters` or `flops`: adjust the persistent memory to those of the first arrangement.
    """

    label: str
    preset: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    fixed_delay: bool = False
    match: Literal["parameters", "flops"] | None = "parameters"


class Data(Part):
    """What a model is trained on: a world, text, or the automata of RegBench.

    Attributes:
        world: a task of the synthetic worlds, or `mixed`.
        loss: of a world: `answers` counts the tokens that answer a question, `all` every one.
        named_classes: whether the classes of the world `in-context-learning` have names that mean something.
        settings: further ones of `World.episode`.
        corpus: text, as `mosaics prepare` takes it.
        field: field of .jsonl records.
        vocabulary_size: of the tokenizer that is trained on the text.
        validation: share of documents that is held out.
        long_documents: whether documents longer than the context are split or truncated.
        automata: of RegBench, a sequence each.
    """

    world: str | None = None
    loss: Literal["answers", "all"] = "answers"
    named_classes: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    corpus: str | None = None
    field: str = "text"
    vocabulary_size: int = 2048
    validation: float = 0.05
    long_documents: Literal["split", "truncate"] = "split"
    automata: int | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Data:
        if [self.world, self.corpus, self.automata].count(None) != 2:
            raise ValueError("data is either a world, a corpus or automata; name one of them")
        return self


class Evaluation(Part):
    """What trained models are asked.

    Attributes:
        name: unique in its study.
        title: of the plot.
        suite: `world` (questions of the test split), `perplexity`, `attention`, or on RegBench `regbench` (accuracy) or
            `regbench-variation`.
        options: of the suite.
        without: memories that are taken out first.
        beside: points (x, y) by label that were published, for the plot and the table; they decide nothing.
    """

    name: str
    title: str = ""
    suite: Literal["world", "perplexity", "attention", "regbench", "regbench-variation"] = "world"
    options: dict[str, Any] = Field(default_factory=dict)
    without: tuple[str, ...] = ()
    beside: dict[str, tuple[tuple[float, float], ...]] = Field(default_factory=dict)


class Setting(Part):
    """One task: data, size and budget, the same for all arrangements.

    Attributes:
        name: unique in its study.
        data: what is trained on.
        model: sizes; options of memories (window, delay ...) go to the arrangements that have them.
        training: keys of a recipe's section `training`.
        learning_rates: the tuning trials of every arrangement: each is trained on the first seed with all of them, and
            all seeds with the best on held-out rows. Empty: that of `training`.
        evaluations: what the trained models are asked.
        start: another setting, whose trained models this one goes on from.
        series: settings of one series are shown as one: what they are asked has one plot, in which each has its own x.
    """

    name: str
    data: Data
    model: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    start: Setting | None = None
    series: str | None = None

    @property
    def shown_as(self) -> str:
        """What its answers are filed under."""
        return self.series or self.name


class Study(Part):
    """Arrangements, each trained in every setting with every seed.

    Attributes:
        title: of the report.
        arrangements: the first is the one that others are matched to.
        settings: tasks.
        seeds: of initialisation, data order and draws; data and order are the same for all arrangements.
    """

    title: str
    arrangements: tuple[Arrangement, ...] = Field(min_length=1)
    settings: tuple[Setting, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
