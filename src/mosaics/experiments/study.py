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
        tuning: what is tried for this arrangement alone, beside what the setting tries (see `Setting.tuning`); in a
            setting that tries nothing, it has the first of the values.
    """

    label: str
    preset: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    fixed_delay: bool = False
    match: Literal["parameters", "flops"] | None = "parameters"
    tuning: dict[str, tuple[Any, ...]] = Field(default_factory=dict)


class Data(Part):
    """What a model is trained on: a world, text, or the automata of RegBench.

    Attributes:
        world: a task of the synthetic worlds, or `mixed`.
        loss: of a world: `answers` counts the tokens that answer a question, `all` every one.
        settings: further ones of `World.episode`.
        curriculum: of a world: (steps, settings) pairs: other episodes for so many steps each, before those of
            `settings`; `length` among them is the tokens of a row.
        corpus: text, as `mosaics prepare` takes it.
        field: field of .jsonl records.
        vocabulary_size: of the tokenizer that is trained on the text.
        validation: share of documents that is held out, for tuning; or another corpus of such documents.
        test: the corpus that trained models are asked about; None: the documents that are held out for tuning.
        long_documents: whether documents longer than the context are split or truncated.
        automata: of RegBench, a sequence each.
    """

    world: str | None = None
    loss: Literal["answers", "all"] = "answers"
    settings: dict[str, Any] = Field(default_factory=dict)
    curriculum: tuple[tuple[int, dict[str, Any]], ...] = ()
    corpus: str | None = None
    field: str = "text"
    vocabulary_size: int = 2048
    validation: float | str = 0.05
    test: str | None = None
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
        suite: `world` (questions of the test split), `perplexity`, `attention`, on RegBench `regbench` (accuracy) or
            `regbench-variation`; on files of yours `many-shot` (`InContextLearning`) or `documents` (`NewKnowledge`).
        options: of the suite.
        without: memories that are taken out first.
        without_longest: the share of all heads that is silenced first: those that read farthest.
        changes: options of the config that are changed first, such as `long_term.delay`.
        stretch: `linear` or `yarn`: rotary positions are stretched to each length beyond the training length.
        only: labels of the arrangements that are asked; empty: all that have the memories and options named above.
        beside: points (x, y) by label that were published, for the plot and the table; they decide nothing.
    """

    name: str
    title: str = ""
    suite: Literal["world", "perplexity", "attention", "regbench", "regbench-variation", "many-shot", "documents"] = (
        "world"
    )
    options: dict[str, Any] = Field(default_factory=dict)
    without: tuple[str, ...] = ()
    without_longest: float = Field(0.0, ge=0, le=1)
    changes: dict[str, Any] = Field(default_factory=dict)
    stretch: Literal["linear", "yarn"] | None = None
    only: tuple[str, ...] = ()
    beside: dict[str, tuple[tuple[float, float], ...]] = Field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether models are asked as they were trained."""
        return not (self.without or self.without_longest or self.changes or self.stretch)


class Probe(Part):
    """What is measured while a model is trained, and when it has learnt enough.

    Attributes:
        every: optimisation steps.
        rows: new rows of the training side that are asked about: the share of right answers in percent, or on text the
            loss in nats per token.
        enough: training stops when two probes in a row are at least this (on text: at most); None: at its last step.
    """

    every: int = Field(50, ge=1)
    rows: int = Field(64, ge=1)
    enough: float | None = None


class Setting(Part):
    """One task: data, size and budget, the same for all arrangements.

    Attributes:
        name: unique in its study.
        data: what is trained on.
        model: sizes; options of memories (`short_term.window` ...) go to the arrangements that have them.
        training: keys of a recipe's section `training`.
        probe: what is measured meanwhile.
        tuning: what is tried for every arrangement, by dotted key (`training.learning_rate`, `model....`): one key
            after the other with the best values so far, the first of the values to begin with; on the first seed. All
            seeds get the best: that which soonest learnt enough, or else has the lowest loss on held-out rows.
        beyond: by how many factors of 2 learning rates may go beyond these, while the best is the largest or smallest.
        tuning_steps: of the trials; None: as many as the training has.
        evaluations: what the trained models are asked.
        start: another setting, whose trained models this one goes on from.
        series: settings of one series are shown as one: what they are asked has one plot, in which each has its own x.
        only: labels of the arrangements that take part; empty: all.
    """

    name: str
    data: Data
    model: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    probe: Probe | None = None
    tuning: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    beyond: int = 0
    tuning_steps: int | None = None
    evaluations: tuple[Evaluation, ...] = ()
    start: Setting | None = None
    series: str | None = None
    only: tuple[str, ...] = ()

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

    def members(self, setting: Setting) -> tuple[Arrangement, ...]:
        """The arrangements that take part in a setting."""
        return tuple(one for one in self.arrangements if not setting.only or one.label in setting.only)
