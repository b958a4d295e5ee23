"""Claims as data: what is trained, what is asked, and what must be greater than what, for every seed.

`CLAIMS` are those of "Memory Mosaics at scale" (Zhang and Bottou, 2025), whose section, table and figure numbers they
bear; those of version 1 are in `claims_v1`.
"""

from __future__ import annotations

from typing import Any, Literal

from mosaics.experiments.compare import MULTIPLES, text_setting, world_evaluation, world_setting
from mosaics.experiments.study import Arrangement, Evaluation, Part, Setting, Study

V1, V2, TRANSFORMER = "memory-mosaics-v1", "memory-mosaics-v2", "transformer"
LONG_SHORT, FIXED, EQUAL_FLOPS = "transformer-long-short", "v2, fixed delay", "transformer, equal FLOPs"
ARRANGEMENTS = {
    arrangement.label: arrangement
    for arrangement in (
        Arrangement(label=V2, preset="memory-mosaics-v2-tiny"),
        Arrangement(label=TRANSFORMER, preset="transformer-tiny"),
        Arrangement(label=LONG_SHORT, preset="transformer-long-short-tiny"),
        Arrangement(label=FIXED, preset="memory-mosaics-v2-tiny", fixed_delay=True),
        Arrangement(label=EQUAL_FLOPS, preset="transformer-tiny", match="flops"),
        Arrangement(label=V1, preset="memory-mosaics-v1-regbench"),
    )
}
LONG_TERM = ("long_term",)
LONGER = 4  # times the training length, of long fine-tuning
FINE_TUNING_STEPS = 20


class Term(Part):
    """A number of a study, one for each seed.

    Attributes:
        arrangement, setting, evaluation: whose.
        at: x, counted from the first (0) or the last (-1) point.
        measure: `value` at that point; `fall` is the largest by which a later point lies below an earlier one, `rise`
            the contrary; `spread` the standard deviation over the mean, of the points from `at` on.
    """

    arrangement: str
    setting: str
    evaluation: str
    at: int = -1
    measure: Literal["value", "fall", "rise", "spread"] = "value"


class Check(Part):
    """`left` must be `relation` `right` + `margin`, for every seed."""

    says: str
    left: Term
    relation: Literal[">=", "<="]
    right: Term | None = None
    margin: float = 0.0


class Claim(Part):
    """A claim of the paper in miniature.

    Attributes:
        name: as `mosaics reproduce` takes it.
        paper: what the paper says.
        here: what stands for it here.
        arrangements: labels; the others are matched to the first.
        asks: (setting, evaluation) pairs, settings by the name that they are shown under; none for an experiment that
            is no study of language models.
        checks: what must hold.
        full_scale: recipe, data and hardware of the paper's own experiment.
    """

    name: str
    paper: str
    here: str
    arrangements: tuple[str, ...] = (V2, TRANSFORMER)
    asks: tuple[tuple[str, str], ...]
    checks: tuple[Check, ...]
    full_scale: str


def settings(
    corpus: str = "python-stdlib",
    *,
    field: str = "text",
    samples: int = 200,
    changes: dict[str, Any] | None = None,
    learning_rates: tuple[float, ...] = (),
) -> dict[str, Setting]:
    """All settings that claims are about, with all that may be asked in them.

    Args:
        corpus: text, as `mosaics prepare` takes it.
        field: of .jsonl records.
        samples: questions for each length or number of shots.
        changes: values by dotted key for all settings.
        learning_rates: tuning trials of every arrangement.
    """
    common: dict[str, Any] = {"changes": changes, "learning_rates": learning_rates}
    documents = world_setting("new-knowledge", samples=samples, **common)
    length = documents.training["context_length"]

    def asked(task: str, suffix: str = "", **more: Any) -> Evaluation:
        return world_evaluation(task, length, samples, **{"name": f"{task}{suffix}"} | more)

    def with_and_without(tasks: tuple[str, ...]) -> tuple[Evaluation, ...]:
        """Persistent facts do not depend on the length: asked at the training length only."""
        short = {"persistent-knowledge": {"options": {"lengths": [length]}}}
        return tuple(
            asked(task, " without long-term memory" if without else "", without=without, **short.get(task, {}))
            for task in tasks
            for without in ((), LONG_TERM)
        )

    classes = world_setting("in-context-learning", samples=samples, **common)
    by_name = asked("in-context-learning", name=NAMED, title="Classes with names", options={"named_classes": True})
    data = classes.data.model_copy(update={"named_classes": True})
    named = classes.model_copy(update={"name": NAMED, "data": data, "evaluations": (by_name,)})
    needle = asked("new-knowledge", name="needle", title="One fact in a long text", options={"facts": 1})
    tasks = ("persistent-knowledge", "new-knowledge", "in-context-learning")
    text = text_setting(corpus, field=field, samples=max(1, samples // 8), **common)
    look = {"samples": max(1, samples // 4)}
    attention = Evaluation(name="attention", title="What the last position reads", suite="attention", options=look)
    loss_without = text.evaluations[0].model_copy(
        update={"name": "loss without long-term memory", "without": LONG_TERM}
    )
    found = [
        world_setting("recall", samples=samples, **common),
        documents.model_copy(update={"evaluations": (*documents.evaluations, needle)}),
        world_setting("mixed", samples=samples, **common).model_copy(update={"evaluations": with_and_without(tasks)}),
        classes,
        named,
        text.model_copy(update={"evaluations": (*text.evaluations, loss_without, attention)}),
    ]
    for name, steps in (("one long mini-batch", 1), ("long fine-tuning", FINE_TUNING_STEPS)):
        training = documents.training | {
            "steps": steps,
            "context_length": LONGER * length,
            "batch_size": max(1, documents.training["batch_size"] // LONGER),
            "learning_rate": documents.training["learning_rate"] / 10,
            "warmup_steps": 1,
        }
        found.append(documents.model_copy(update={"name": name, "training": training, "start": documents}))
    return {setting.name: setting for setting in found}


def _of(arrangement: str, evaluation: str, setting: str | None = None, **more: Any) -> Term:
    return Term(arrangement=arrangement, setting=setting or evaluation, evaluation=evaluation, **more)


def _least(says: str, left: Term, margin: float, right: Term | None = None) -> Check:
    return Check(says=says, left=left, relation=">=", right=right, margin=margin)


def _most(says: str, left: Term, margin: float, right: Term | None = None) -> Check:
    return Check(says=says, left=left, relation="<=", right=right, margin=margin)


NAMED = "classes with names"
RECALL, QA, ICL, PERSISTENT = "recall", "new-knowledge", "in-context-learning", "persistent-knowledge"
WITHOUT = " without long-term memory"
_SMALL = (
    "mosaics train memory-mosaics-v2-small (2.04 B parameters), and its twin with --model.preset transformer-small: "
    "200 B tokens at 4096 in place of the paper's own mix, which is not public; some 1500 H100-hours for each."
)
_LARGE = (
    "mosaics train memory-mosaics-v2-large (9.9 B parameters), and its twin with --model.preset transformer-large: "
    "1 T tokens at 4096 in place of the paper's own mix, which is not public; some 40000 H100-hours for each."
)
_LONG = " Then fine-tuning at 32768 tokens (--training.context_length 32768) on long documents."
_RULER = (
    " Ask: mosaics evaluate RUN --suite new-knowledge --data squad=… --data hotpotqa=… --lengths 4096,8192,16384,32768."
)
_SHOTS = (
    " Ask: mosaics evaluate RUN --suite in-context-learning with Banking77, GoEmotions and TACRED (licensed by the "
    "LDC; FewRel in its place)."
)


def _rises(task: str) -> tuple[Check, ...]:
    return (
        _most("v2 does not fall with shots by more than 5 points", _of(V2, task, measure="fall"), 5),
        _least("v2 with most shots is 10 points above one shot", _of(V2, task), 10, _of(V2, task, at=0)),
        _least("v2 is 10 points above the Transformer with most shots", _of(V2, task), 10, _of(TRANSFORMER, task)),
    )


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            name="abstract",
            paper="v2 stores new knowledge and learns in context far better than a Transformer, at any length.",
            here="Recall, facts of the context, classes of the prompt and text, to 8 times the training length.",
            asks=((RECALL, RECALL), (QA, QA), (ICL, ICL), ("text", "loss")),
            checks=(
                _least("v2 recalls 95 % at 8 times the training length", _of(V2, RECALL), 95),
                _least("v2 answers 95 % at 8 times the training length", _of(V2, QA), 95),
                _most("v2 does not fall with shots by more than 5 points", _of(V2, ICL, measure="fall"), 5),
                _most(
                    "v2's loss on text at 8 times the training length is not above that at once",
                    _of(V2, "loss", "text"),
                    0,
                    _of(V2, "loss", "text", at=0),
                ),
                *(
                    _least(f"{task}: v2 is 10 points above the Transformer", _of(V2, task), 10, _of(TRANSFORMER, task))
                    for task in (RECALL, QA, ICL)
                ),
            ),
            full_scale=_LARGE + _RULER,
        ),
        Claim(
            name="table1",
            paper="v2 has as much persistent knowledge as a Transformer (19 benchmarks, 52.2 against 52.2).",
            here="Facts of the training corpus, asked after mixed training; and the loss on held-out text.",
            asks=(("mixed", PERSISTENT), ("text", "loss")),
            checks=(
                _least(
                    "v2 knows the corpus's facts as well, within 5 points",
                    _of(V2, PERSISTENT, "mixed"),
                    -5,
                    _of(TRANSFORMER, PERSISTENT, "mixed"),
                ),
                _most(
                    "v2's loss on text is not above, within 0.05 nats",
                    _of(V2, "loss", "text", at=0),
                    0.05,
                    _of(TRANSFORMER, "loss", "text", at=0),
                ),
            ),
            full_scale=_LARGE + " Ask: mosaics evaluate RUN --suite persistent-knowledge.",
        ),
        Claim(
            name="table2",
            paper="Without long-term memory, v2 keeps its knowledge on 13 benchmarks (56.8 before, 56.6 after).",
            here="Facts of the training corpus, with the long-term memory and without.",
            arrangements=(V2,),
            asks=(("mixed", PERSISTENT), ("mixed", PERSISTENT + WITHOUT)),
            checks=(
                _least("the facts are known (above 50 %)", _of(V2, PERSISTENT, "mixed"), 50),
                _least(
                    "they stay known without long-term memory, within 5 points",
                    _of(V2, PERSISTENT + WITHOUT, "mixed"),
                    -5,
                    _of(V2, PERSISTENT, "mixed"),
                ),
            ),
            full_scale=_LARGE
            + " Ask: mosaics evaluate RUN --suite persistent-knowledge, and again --without long_term.",
        ),
        Claim(
            name="table9",
            paper="Without long-term memory, v2 loses the 6 benchmarks that need the context (42.1 to 34.9).",
            here="Classes that exist only in the prompt, and the loss at 8 times the training length.",
            arrangements=(V2,),
            asks=(("mixed", ICL), ("mixed", ICL + WITHOUT), ("text", "loss"), ("text", "loss" + WITHOUT)),
            checks=(
                _most(
                    "classification falls by 10 points or more at most shots",
                    _of(V2, ICL + WITHOUT, "mixed"),
                    -10,
                    _of(V2, ICL, "mixed"),
                ),
                _least("the loss on text rises", _of(V2, "loss" + WITHOUT, "text"), 0, _of(V2, "loss", "text")),
            ),
            full_scale=_LARGE
            + " Ask: mosaics evaluate RUN --suite persistent-knowledge, and again --without long_term.",
        ),
        Claim(
            name="table10",
            paper="Without long-term memory, v2 cannot answer from long documents (32k: 53.4 to 20.2).",
            here="Facts of the context at 1 to 8 times the training length, with the long-term memory and without.",
            arrangements=(V2,),
            asks=(("mixed", QA), ("mixed", QA + WITHOUT)),
            checks=tuple(
                _most(
                    f"at {times} times the training length, answers fall by 10 points or more",
                    _of(V2, QA + WITHOUT, "mixed", at=index),
                    -10,
                    _of(V2, QA, "mixed", at=index),
                )
                for index, times in enumerate(MULTIPLES)
            ),
            full_scale=_LARGE + _LONG + _RULER + " Once more --without long_term.",
        ),
        Claim(
            name="table3",
            paper="Trained at 4k, v2 answers from documents of 8k to 32k; the Transformer cannot beyond 4k.",
            here="Facts of the context at 1 to 8 times the training length, and the loss on text there.",
            asks=((QA, QA), ("text", "loss")),
            checks=(
                _least("v2 answers 95 % at 8 times the training length", _of(V2, QA), 95),
                _least(
                    "v2 is not below the Transformer at the training length",
                    _of(V2, QA, at=0),
                    0,
                    _of(TRANSFORMER, QA, at=0),
                ),
                _most("the Transformer fails at 8 times the training length (below 50 %)", _of(TRANSFORMER, QA), 50),
                _most(
                    "v2's loss on text does not rise up to 8 times",
                    _of(V2, "loss", "text"),
                    0,
                    _of(V2, "loss", "text", at=0),
                ),
                _least(
                    "the Transformer's loss on text rises",
                    _of(TRANSFORMER, "loss", "text"),
                    0,
                    _of(TRANSFORMER, "loss", "text", at=0),
                ),
            ),
            full_scale=_SMALL + _RULER,
        ),
        Claim(
            name="table4",
            paper="Both fine-tuned at 32k, v2 answers better at 4k to 32k (53.4 against 41.1) and still at 64k.",
            here=f"{FINE_TUNING_STEPS} steps at {LONGER} times the training length; asked at 1 to 8 times.",
            asks=(("long fine-tuning", QA),),
            checks=tuple(
                _least(
                    f"v2 is not below the Transformer at {times} times the first training length",
                    _of(V2, QA, "long fine-tuning", at=index),
                    0,
                    _of(TRANSFORMER, QA, "long fine-tuning", at=index),
                )
                for index, times in enumerate(MULTIPLES)
            )
            + (
                _least("v2 answers 95 % at twice the length it was fine-tuned at", _of(V2, QA, "long fine-tuning"), 95),
            ),
            full_scale=_LARGE + _LONG + _RULER,
        ),
        Claim(
            name="table12",
            paper="A delay drawn in training lets v2 go beyond its training length; a fixed one does not (32k: 31.7 "
            "against 15.9).",
            here="Facts of the context at 8 times the training length.",
            arrangements=(V2, FIXED),
            asks=((QA, QA),),
            checks=(
                _least("as good at the training length, within 5 points", _of(V2, QA, at=0), -5, _of(FIXED, QA, at=0)),
                _least("5 points better at 8 times the training length", _of(V2, QA), 5, _of(FIXED, QA)),
            ),
            full_scale=_SMALL + " And once with --model.train_delay [64,64]." + _RULER,
        ),
        Claim(
            name="table13",
            paper="v2 finds a needle at any length up to 32k (100 %); the Transformer nearly (97.8 to 99.4 %).",
            here="One fact in a text of 1 to 8 times the training length.",
            asks=((QA, "needle"),),
            checks=(
                _least("v2 finds 95 % at 8 times the training length", _of(V2, "needle", QA), 95),
                _most(
                    "v2 does not fall with the length by more than 5 points", _of(V2, "needle", QA, measure="fall"), 5
                ),
                _least("v2 is not below the Transformer", _of(V2, "needle", QA), 0, _of(TRANSFORMER, "needle", QA)),
            ),
            full_scale=_SMALL
            + _LONG
            + " Ask: mosaics evaluate RUN --suite new-knowledge --tasks niah-noise,niah-essays,niah-uuids "
            "--data essays=….",
        ),
        Claim(
            name="figure1",
            paper="Attention with rotary positions goes up and down with the distance; what a memory mosaic reads is "
            "flat beyond the near past.",
            here="What the last of 512 tokens of text reads, in 16 parts by distance, without the first token.",
            asks=(("text", "attention"),),
            checks=(
                _most(
                    "from the third part on, the weights vary less in v2 (standard deviation over mean)",
                    _of(V2, "attention", "text", at=2, measure="spread"),
                    0,
                    _of(TRANSFORMER, "attention", "text", at=2, measure="spread"),
                ),
            ),
            full_scale=_SMALL + " Then model.read_weights on texts of 4096 tokens.",
        ),
        Claim(
            name="figure3",
            paper="With semantic labels, v2 rises with the shots; Transformers stall or fall, 10 points behind.",
            here="Classes of the prompt whose labels are words of theirs, with 1 to 32 shots, trained with at most 3.",
            asks=((NAMED, NAMED),),
            checks=_rises(NAMED),
            full_scale=_LARGE + _SHOTS + " --labels semantic",
        ),
        Claim(
            name="figure4",
            paper="With anonymous labels, v2 rises with the shots; Transformers stall or fall, 10 points behind.",
            here="Classes that exist only in the prompt, with 1 to 32 shots, trained with at most 3.",
            asks=((ICL, ICL),),
            checks=_rises(ICL),
            full_scale=_LARGE + _SHOTS + " --labels anonymous",
        ),
        Claim(
            name="figure5",
            paper="A Transformer with attention split into long and short does not learn in context as v2 does.",
            here="Classes that exist only in the prompt, with 1 to 32 shots, trained with at most 3.",
            arrangements=(V2, TRANSFORMER, LONG_SHORT),
            asks=((ICL, ICL),),
            checks=(
                _least("v2 is 10 points above the split with most shots", _of(V2, ICL), 10, _of(LONG_SHORT, ICL)),
                _most(
                    "the split is not 10 points above the plain Transformer",
                    _of(LONG_SHORT, ICL),
                    10,
                    _of(TRANSFORMER, ICL),
                ),
            ),
            full_scale=_SMALL + " And once more with --model.preset transformer-long-short-small." + _SHOTS,
        ),
        Claim(
            name="figure8",
            paper="One mini-batch of fine-tuning at 32k brings v2 22 points; the Transformer is behind after 800.",
            here=f"One step, and {FINE_TUNING_STEPS}, at {LONGER} times the training length; facts of the context.",
            asks=((QA, QA), ("one long mini-batch", QA), ("long fine-tuning", QA)),
            checks=(
                _least(
                    f"v2 after 1 step is 5 points above the Transformer after {FINE_TUNING_STEPS}, at the longest",
                    _of(V2, QA, "one long mini-batch"),
                    5,
                    _of(TRANSFORMER, QA, "long fine-tuning"),
                ),
                _least(
                    f"v2 after 1 step is within 5 points of {FINE_TUNING_STEPS} steps",
                    _of(V2, QA, "one long mini-batch"),
                    -5,
                    _of(V2, QA, "long fine-tuning"),
                ),
            ),
            full_scale=_LARGE + " Then 1, 2 … 800 steps with --training.context_length 32768." + _RULER,
        ),
        Claim(
            name="figure12",
            paper="v2 is ahead of Transformers of equal parameters, and of equal FLOPs.",
            here="Facts of the context and classes of the prompt, against twins matched in both ways.",
            arrangements=(V2, TRANSFORMER, EQUAL_FLOPS),
            asks=((QA, QA), (ICL, ICL)),
            checks=tuple(
                _least(f"{task}: v2 is above the {twin}, at the longest", _of(V2, task), 0, _of(twin, task))
                for task in (QA, ICL)
                for twin in (TRANSFORMER, EQUAL_FLOPS)
            ),
            full_scale=_SMALL + " `mosaics.models.matching.matched` gives the widths of the twins.",
        ),
    )
}


def study_of(claims: tuple[Claim, ...], known: dict[str, Setting], seeds: tuple[int, ...], title: str) -> Study:
    """The study that claims need: what they share is done once."""
    asks = {(setting, evaluation) for claim in claims for setting, evaluation in claim.asks}
    chosen = []
    for setting in known.values():
        mine = tuple(e for e in setting.evaluations if (setting.shown_as, e.name) in asks)
        if mine:
            chosen.append(setting.model_copy(update={"evaluations": mine}))
    labels = dict.fromkeys(label for claim in claims for label in claim.arrangements)
    return Study(
        title=title,
        arrangements=tuple(ARRANGEMENTS[label] for label in labels),
        settings=tuple(chosen),
        seeds=seeds,
    )
