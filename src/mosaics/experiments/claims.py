"""Claims as data: what is trained, what is asked, and what must be greater than what.

`CLAIMS` are those of "Memory Mosaics at scale" (Zhang and Bottou, 2025), whose section, table and figure numbers they
bear; those of version 1 are in `claims_v1`. Definitions were committed before the first full run of each;
docs/reproduction.md lists what was changed later, and why.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mosaics.experiments.compare import (
    LENGTHS,
    MULTIPLES,
    ROTARY,
    SHOTS,
    STEPS,
    TRIED_ON_TEXT,
    WORLD_MODEL,
    WORLD_TRAINING,
    text_setting,
    world_evaluation,
    world_setting,
)
from mosaics.experiments.real_tasks import CLASSES, QUESTIONS, real_tasks
from mosaics.experiments.study import Arrangement, Evaluation, Part, Probe, Setting, Study, digest

V1, V2, TRANSFORMER = "memory-mosaics-v1", "memory-mosaics-v2", "transformer"
LONG_SHORT, FIXED, EQUAL_FLOPS = "transformer-long-short", "v2, fixed delay", "transformer, equal FLOPs"
NO_POSITIONS, ALIBI, WINDOW = "transformer, no positions", "transformer, ALiBi", "transformer, window"
CONVOLVED, CONVOLVED_ALIBI = "transformer, convolution", "transformer, ALiBi, convolution"
CONVOLVED_FLOPS = f"{CONVOLVED_ALIBI}, equal FLOPs"
CONVOLVED_ALONE, CONVOLVED_BASE = f"{NO_POSITIONS}, convolution", f"{CONVOLVED}, rotary base 500,000"
CONVOLVED_ONES = (CONVOLVED, CONVOLVED_ALONE, CONVOLVED_ALIBI)
ARRANGEMENTS = {
    arrangement.label: arrangement
    for arrangement in (
        Arrangement(label=V2, preset="memory-mosaics-v2-tiny"),
        Arrangement(label=TRANSFORMER, preset="transformer-tiny", tuning=ROTARY),
        Arrangement(label=LONG_SHORT, preset="transformer-long-short-tiny", tuning=ROTARY),
        Arrangement(label=FIXED, preset="memory-mosaics-v2-tiny", fixed_delay=True),
        Arrangement(label=EQUAL_FLOPS, preset="transformer-tiny", match="flops", tuning=ROTARY),
        Arrangement(label=NO_POSITIONS, preset="transformer-tiny", overrides={"positions": "none"}),
        Arrangement(label=ALIBI, preset="transformer-tiny", overrides={"positions": "alibi"}),
        Arrangement(label=WINDOW, preset="transformer-tiny", overrides={"window": 64}, tuning=ROTARY),
        Arrangement(label=CONVOLVED, preset="transformer-tiny", overrides={"convolution": 4}, tuning=ROTARY),
        *(
            Arrangement(
                label=label,
                preset="transformer-tiny",
                match=match,
                overrides={"convolution": 4, "positions": "alibi"},
            )
            for label, match in ((CONVOLVED_ALIBI, "parameters"), (CONVOLVED_FLOPS, "flops"))
        ),
        *(
            Arrangement(label=label, preset="transformer-tiny", overrides={"convolution": 4} | other)
            for label, other in ((CONVOLVED_ALONE, {"positions": "none"}), (CONVOLVED_BASE, {"rotary_base": 5e5}))
        ),
        Arrangement(label=V1, preset="memory-mosaics-v1-regbench"),
    )
}
LONG_TERM, SHORT_TERM = ("long_term",), ("short_term",)
FAR = (1, 2, 4, 8, 16, 32)  # times the training length
LONGER = 4  # times the training length, of long fine-tuning
FINE_TUNING_STEPS = 100
LONG, LONGER_TRAINED = "long fine-tuning", "longer training"
LONGER_STEPS = 1000  # of a training that goes on after enough was learnt
ENOUGH = 97.0  # percent of held-out questions at the training length: training stops there
COMPETENT = 90.0  # percent at the training length, without which no failure beyond it can be shown


class Term(Part):
    """A number of a study, for each seed made of the scores of single examples.

    Attributes:
        arrangement, setting, evaluation: whose.
        at: x, counted from the first (0) or the last (-1) point.
        measure: `value` at that point; `fall` is the largest by which a later point lies below an earlier one, `rise`
            the contrary; `spread` the standard deviation over the mean, of the points from `at` on; `steps` those until
            enough was learnt.
    """

    arrangement: str
    setting: str
    evaluation: str
    at: int = -1
    measure: Literal["value", "fall", "rise", "spread", "steps"] = "value"


class Check(Part):
    """`left` must be `relation` `right` + `margin`.

    Attributes:
        kind: a `claim` decides; without a `premise` the claim can't be told; a `control` is reported beside them.
        factor: `right` is multiplied by it first.
        given: a premise of this check alone: where it does not hold, the check is left out.
    """

    says: str
    left: Term
    relation: Literal[">=", "<="]
    right: Term | None = None
    margin: float = 0.0
    factor: float = 1.0
    kind: Literal["claim", "premise", "control"] = "claim"
    given: Check | None = None


class Claim(Part):
    """A claim of the paper in miniature.

    Attributes:
        name: as `mosaics reproduce` takes it.
        paper: what the paper says.
        here: what stands for it here.
        arrangements: labels; the others are matched to the first.
        asks: (setting, evaluation) pairs, settings by the name that they are shown under; none for an experiment that
            is no study of language models.
        only: labels of those that take part in a setting, where not all do.
        checks: what must hold.
        full_scale: recipe, data and hardware of the paper's own experiment.
        curves: settings whose curves of learning are shown.
        alone: it needs a text of its own, so that no group of claims has it.
    """

    name: str
    paper: str
    here: str
    arrangements: tuple[str, ...] = (V2, TRANSFORMER)
    asks: tuple[tuple[str, str], ...]
    only: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    checks: tuple[Check, ...]
    full_scale: str
    curves: tuple[str, ...] = ()
    alone: bool = False

    @property
    def definition(self) -> str:
        """A digest of what decides the verdict: who is asked what, and what must hold."""
        own = {"arrangements", "asks", "only", "checks"}
        return digest(self.model_dump(mode="json", include=own, exclude_defaults=True))


def settings(
    corpus: str = "python-stdlib",
    *,
    field: str = "text",
    held_out: str | None = None,
    test: str | None = None,
    samples: int = 500,
    changes: dict[str, Any] | None = None,
    tuning: dict[str, tuple[Any, ...]] | None = None,
    beyond: int = 0,
    files: dict[str, str] | None = None,
) -> dict[str, Setting]:
    """All settings that claims are about, with all that may be asked in them.

    Args:
        corpus: text, as `mosaics prepare` takes it.
        field: of .jsonl records.
        held_out: documents for tuning; None: a share of the text's.
        test: documents that are asked about; None: those for tuning.
        samples: questions for each length or number of shots.
        changes: values by dotted key for all settings.
        tuning: what is tried for every arrangement, as `Setting.tuning`.
        beyond: as `Setting.beyond`.
        files: of real tasks, as `InContextLearning` and `NewKnowledge` name them; what lacks its files is not asked.
    """
    common: dict[str, Any] = {"changes": changes, "tuning": tuning or {}, "beyond": beyond}
    probe = Probe(every=25, enough=ENOUGH)
    given = {"training.steps": 3000} | (changes or {})
    learnt: dict[str, Any] = common | {"changes": given, "probe": probe, "samples": samples}
    learnt["tuning_steps"] = min(400, given["training.steps"])  # v2 has learnt long before
    documents, recall = (world_setting(world, **learnt) for world in (QA, RECALL))
    length = documents.training["context_length"]

    def asked(task: str, suffix: str = "", at: int = length, **more: Any) -> Evaluation:
        return world_evaluation(task, at, samples, **{"multiples": FAR, "name": f"{task}{suffix}"} | more)

    needle = asked(QA, name="needle", title="One fact in a long text", options={"settings": {"facts": 1}})
    delays = tuple(
        asked(QA, f" with a delay of {delay}", only=(V2, FIXED), changes={"long_term.delay": delay})
        for delay in (1, 4, 8)
    )
    turned = (TRANSFORMER, CONVOLVED, CONVOLVED_BASE)
    stretched = tuple(asked(QA, f", {way}", stretch=way, only=turned) for way in ("linear", "yarn"))
    mixed_length = (changes or {}).get("training.context_length", LENGTHS["mixed"])
    short = {PERSISTENT: {"multiples": (1,)}, QA: {"multiples": MULTIPLES}}
    parted = tuple(
        asked(task, suffix, mixed_length, without=without, **short.get(task, {}))
        for task in (PERSISTENT, QA, ICL)
        for suffix, without in (("", ()), (WITHOUT, LONG_TERM), (WITHOUT_SHORT, SHORT_TERM))
    ) + tuple(asked(task, WITHOUT_LONGEST, mixed_length, **short[task], **_SILENCED) for task in (PERSISTENT, QA))
    given = {"training.steps": 1000} | (changes or {})
    more = common | {"changes": given, "probe": Probe(every=100, rows=32)}
    more |= {"tuning_steps": min(200, given["training.steps"]), "held_out": held_out, "test": test}
    more |= {"tuning": {key: values for key, values in (tuning or {}).items() if key in TRIED_ON_TEXT}}
    text = text_setting(corpus, field=field, samples=max(1, samples // 20), **more)
    look = {"samples": max(1, samples // 10)}
    attention = Evaluation(name="attention", title="What the last position reads", suite="attention", options=look)
    loss = text.evaluations[0]
    losses = tuple(
        loss.model_copy(update={"name": "loss" + suffix, "without": without})
        for suffix, without in (("", ()), (WITHOUT, LONG_TERM), (WITHOUT_SHORT, SHORT_TERM))
    ) + (loss.model_copy(update={"name": "loss" + WITHOUT_LONGEST} | _SILENCED),)
    longer = tuple(
        loss.model_copy(update={"name": f"loss, {way}", "stretch": way, "only": (TRANSFORMER,)})
        for way in ("linear", "yarn")
    )
    found = [
        recall.model_copy(update={"evaluations": (asked(RECALL),)}),
        documents.model_copy(update={"evaluations": (asked(QA), needle, *delays, *stretched)}),
        world_setting("mixed", samples=samples, **common).model_copy(update={"evaluations": parted}),
        *_class_settings(samples, common),
        text.model_copy(update={"evaluations": (*losses, *longer, attention, *real_tasks(files or {}, samples))}),
    ]
    for name, steps, times in (
        ("one long mini-batch", 1, LONGER),
        (LONG, FINE_TUNING_STEPS, LONGER),
        (LONGER_TRAINED, LONGER_STEPS, 1),
    ):
        training = documents.training | {
            "steps": steps,
            "context_length": times * length,
            "batch_size": max(1, documents.training["batch_size"] // times),
            "learning_rate": documents.training["learning_rate"] / 4,
            "warmup_steps": 1,
        }
        more = {
            "name": name,
            "training": training,
            "start": found[1],
            "probe": None,
            "evaluations": (asked(QA), stretched[1]),
        }
        rates = tuple(documents.training["learning_rate"] / by for by in (16, 4, 1))
        tried = {"training.learning_rate": rates} if tuning else {}
        found.append(
            documents.model_copy(update=more | {"tuning": tried, "tuning_steps": 200 if steps > 200 else None})
        )
    return {setting.name: setting for setting in found}


def _class_settings(samples: int, common: dict[str, Any]) -> list[Setting]:
    """Classification: as it is, with labels that mean something, and changed in what may keep v2 from learning it."""
    changes = common["changes"] or {}
    length = changes.get("training.context_length", LENGTHS[ICL])
    more = common | {"probe": Probe(every=100), "tuning_steps": min(300, changes.get("training.steps", STEPS[ICL]))}

    def asked(name: str = ICL, shots: tuple[int, ...] = SHOTS, **settings: Any) -> Evaluation:
        title = f"Classes that exist only in the prompt{name.removeprefix(ICL)}"
        options = {"shots": list(shots)} | ({"settings": settings} if settings else {})
        return world_evaluation(ICL, length, samples, name=name, title=title, options=options)

    def setting(name: str, given: dict[str, Any], *evaluations: Evaluation, **other: Any) -> Setting:
        made = world_setting(ICL, samples=samples, **more | {"changes": changes | given} | other)
        return made.model_copy(update={"name": name, "evaluations": evaluations})

    others = (asked(f"{ICL}, {about}", FEW_SHOTS, **settings) for about, settings in OTHER_CLASSES.items())
    named = asked(NAMED, meaning=True).model_copy(update={"title": "Classes whose labels mean something"})
    wide = {f"model.{key}": 2 * WORLD_MODEL[key] for key in ("hidden_size", "intermediate_size")}
    steps = sum(steps for steps, _ in EASY_CLASSES) + changes.get("training.steps", STEPS[ICL])
    easy = {"data.curriculum": EASY_CLASSES, "training.steps": steps}
    many = {"training.context_length": 4 * length, "training.batch_size": WORLD_TRAINING["batch_size"] // 4}
    return [
        setting(ICL, {}, asked(), *others),
        setting(NAMED, {"data.settings": {"meaning": True}}, named),
        setting(WIDE_HEADS, wide, asked(), tuning={}),
        setting(EASY_FIRST, easy, asked(), tuning={}),
        setting(MANY_SHOTS, many | {"data.settings": {"most_shots": SHOTS[-1]}}, asked(), tuning={}),
    ]


def _of(arrangement: str, evaluation: str, setting: str | None = None, **more: Any) -> Term:
    return Term(arrangement=arrangement, setting=setting or evaluation, evaluation=evaluation, **more)


def _least(says: str, left: Term, margin: float, right: Term | None = None, **more: Any) -> Check:
    return Check(says=says, left=left, relation=">=", right=right, margin=margin, **more)


def _most(says: str, left: Term, margin: float, right: Term | None = None, **more: Any) -> Check:
    return Check(says=says, left=left, relation="<=", right=right, margin=margin, **more)


def _learnt(task: str, *arrangements: str, setting: str | None = None, least: float = COMPETENT) -> tuple[Check, ...]:
    """Premises: who has not learnt a task at the training length can show no failure beyond it."""
    return tuple(
        _least(
            f"{task}: {label} answers {least:g} % at the training length",
            _of(label, task, setting, at=0),
            least,
            kind="premise",
        )
        for label in arrangements
    )


def _slower(task: str, *arrangements: str) -> tuple[Check, ...]:
    """Who takes a multiple of v2's steps until enough was learnt."""
    return tuple(
        _least(
            f"{task}: the {label} takes at least {times} times the steps of v2",
            _of(label, task, measure="steps"),
            0,
            _of(V2, task, measure="steps"),
            factor=times,
            kind=kind,
        )
        for label in arrangements
        for times, kind in ((2, "claim"), (10, "control"))
    )


NAMED = "classes with meaning"
RECALL, QA, ICL, PERSISTENT = "recall", "new-knowledge", "in-context-learning", "persistent-knowledge"
WITHOUT, WITHOUT_SHORT = " without long-term memory", " without short-term memory"
WITHOUT_LONGEST = " without the longest heads"
_SILENCED: dict[str, Any] = {"without_longest": 0.5, "only": (TRANSFORMER,)}
WIDE_HEADS, MANY_SHOTS, EASY_FIRST = (f"classes, {how}" for how in ("twice as wide", "many shots", "easy ones first"))
# Steps of other episodes: examples of one word, of more, then as they are but without noise.
EASY_CLASSES = (
    (600, {"words": 1, "noise": 0.0, "most_shots": 8}),
    (400, {"words": 2, "noise": 0.0, "most_shots": 6}),
    (400, {"words": 4, "noise": 0.0, "most_shots": 4}),
    (600, {"noise": 0.0}),
)
FEW_SHOTS = (1, 8, 32)
OTHER_CLASSES = {"16 classes": {"classes": 16}, "20 % noise": {"noise": 0.2}, "60 % noise": {"noise": 0.6}}
_EIGHT = FAR.index(8)
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
_MANY_SHOTS = (
    " Ask: mosaics evaluate RUN --suite in-context-learning with Banking77, GoEmotions and TACRED (licensed by the "
    "LDC; FewRel in its place)."
)


_WITHIN = 2  # the most shots of `SHOTS` that are no longer than the rows of training


def _told_apart(task: str, arrangement: str, setting: str | None = None) -> Check:
    return _least(
        f"the {arrangement} has learnt something: 5 points above the last words alone, with {_WITHIN} shots",
        _of(arrangement, task, setting, at=SHOTS.index(_WITHIN)),
        5,
        _of("baseline: last_words", task, setting, at=SHOTS.index(_WITHIN)),
        kind="premise",
    )


def _rises(task: str, *twins: str) -> tuple[Check, ...]:
    return (
        _most("v2 does not fall with shots by more than 3 points", _of(V2, task, measure="fall"), 3),
        _least("v2 with most shots is 10 points above one shot", _of(V2, task), 10, _of(V2, task, at=0)),
        *(_least(f"v2 is 10 points above the {x} with most shots", _of(V2, task), 10, _of(x, task)) for x in twins),
        *(_told_apart(task, twin) for twin in twins),
    )


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            name="abstract",
            paper="v2 stores new knowledge and learns in context far better than a Transformer, at any length.",
            here="Recall, facts of the context, classes of the prompt and text, to 32 times the training length.",
            arrangements=(V2, TRANSFORMER, *CONVOLVED_ONES),
            asks=((RECALL, RECALL), (QA, QA), (ICL, ICL), ("text", "loss")),
            only={setting: (V2, TRANSFORMER) for setting in (ICL, "text")},
            checks=(
                *_learnt(RECALL, V2, CONVOLVED_ALIBI),
                *_learnt(QA, V2, CONVOLVED_ALIBI),
                _told_apart(ICL, TRANSFORMER),
                _least("v2 recalls 95 % at 32 times the training length", _of(V2, RECALL), 95),
                _least("v2 answers 95 % at 32 times the training length", _of(V2, QA), 95),
                _most("v2 does not fall with shots by more than 3 points", _of(V2, ICL, measure="fall"), 3),
                _most(
                    "v2's loss on text at 8 times the training length is not above that at once",
                    _of(V2, "loss", "text"),
                    0,
                    _of(V2, "loss", "text", at=0),
                ),
                *(
                    _least(
                        f"{task}: v2 is 10 points above the {label}",
                        _of(V2, task),
                        10,
                        _of(label, task),
                        given=given,
                    )
                    for task, label, given in (
                        *(
                            (task, label, _learnt(task, label)[0])
                            for task in (RECALL, QA)
                            for label in (TRANSFORMER, *CONVOLVED_ONES)
                        ),
                        (ICL, TRANSFORMER, None),
                    )
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
                _least("v2 knows facts (50 %)", _of(V2, PERSISTENT, "mixed"), 50, kind="premise"),
                _least("so does the Transformer", _of(TRANSFORMER, PERSISTENT, "mixed"), 50, kind="premise"),
                _least(
                    "v2 knows not 5 points less",
                    _of(V2, PERSISTENT, "mixed"),
                    -5,
                    _of(TRANSFORMER, PERSISTENT, "mixed"),
                ),
                _most("nor 5 more", _of(V2, PERSISTENT, "mixed"), 5, _of(TRANSFORMER, PERSISTENT, "mixed")),
                _most(
                    "v2's loss on text is not 0.05 nats above",
                    _of(V2, "loss", "text", at=0),
                    0.05,
                    _of(TRANSFORMER, "loss", "text", at=0),
                ),
                _least(
                    "nor 0.05 below",
                    _of(V2, "loss", "text", at=0),
                    -0.05,
                    _of(TRANSFORMER, "loss", "text", at=0),
                ),
            ),
            full_scale=_LARGE + " Ask: mosaics evaluate RUN --suite persistent-knowledge.",
        ),
        Claim(
            name="table2",
            paper="Without long-term memory, v2 keeps its knowledge on 13 benchmarks (56.8 before, 56.6 after).",
            here="Facts of the training corpus, with the long-term memory and without; as controls, without the "
            "short-term memory, and a Transformer without half of its heads, those that read farthest.",
            arrangements=(V2, TRANSFORMER),
            asks=tuple(("mixed", PERSISTENT + suffix) for suffix in ("", WITHOUT, WITHOUT_SHORT, WITHOUT_LONGEST)),
            checks=(
                _least("the facts are known (50 %)", _of(V2, PERSISTENT, "mixed"), 50, kind="premise"),
                _least(
                    "they stay known without long-term memory, within 5 points",
                    _of(V2, PERSISTENT + WITHOUT, "mixed"),
                    -5,
                    _of(V2, PERSISTENT, "mixed"),
                ),
                _most(
                    "without short-term memory, they fall by 10 points or more",
                    _of(V2, PERSISTENT + WITHOUT_SHORT, "mixed"),
                    -10,
                    _of(V2, PERSISTENT, "mixed"),
                    kind="control",
                ),
                _least(
                    "the Transformer keeps them without its longest heads, within 5 points",
                    _of(TRANSFORMER, PERSISTENT + WITHOUT_LONGEST, "mixed"),
                    -5,
                    _of(TRANSFORMER, PERSISTENT, "mixed"),
                    kind="control",
                ),
            ),
            full_scale=_LARGE
            + " Ask: mosaics evaluate RUN --suite persistent-knowledge, and again --without long_term.",
        ),
        Claim(
            name="table9",
            paper="Without long-term memory, v2 loses the 6 benchmarks that need the context (42.1 to 34.9).",
            here="Classes that exist only in the prompt, and the loss at 8 times the training length; as a control, "
            "on text, a Transformer without half of its heads, those that read farthest.",
            arrangements=(V2, TRANSFORMER),
            asks=(
                *(
                    ask
                    for suffix in ("", WITHOUT, WITHOUT_SHORT)
                    for ask in (("mixed", ICL + suffix), ("text", "loss" + suffix))
                ),
                ("text", "loss" + WITHOUT_LONGEST),
            ),
            only={"mixed": (V2,)},
            checks=(
                _least("classes are told apart (30 %)", _of(V2, ICL, "mixed"), 30, kind="premise"),
                _most(
                    "classification falls by 10 points or more at most shots",
                    _of(V2, ICL + WITHOUT, "mixed"),
                    -10,
                    _of(V2, ICL, "mixed"),
                ),
                _least("the loss on text rises", _of(V2, "loss" + WITHOUT, "text"), 0, _of(V2, "loss", "text")),
                _least(
                    "without short-term memory, the loss on text rises more",
                    _of(V2, "loss" + WITHOUT_SHORT, "text"),
                    0,
                    _of(V2, "loss" + WITHOUT, "text"),
                    kind="control",
                ),
                _least(
                    "the Transformer's loss on text rises without its longest heads, at the training length",
                    _of(TRANSFORMER, "loss" + WITHOUT_LONGEST, "text", at=0),
                    0,
                    _of(TRANSFORMER, "loss", "text", at=0),
                    kind="control",
                ),
            ),
            full_scale=_LARGE
            + " Ask: mosaics evaluate RUN --suite persistent-knowledge, and again --without long_term.",
        ),
        Claim(
            name="table10",
            paper="Without long-term memory, v2 cannot answer from long documents (32k: 53.4 to 20.2).",
            here="Facts of the context at 1 to 8 times the training length, with the long-term memory and without; as "
            "a control, a Transformer without half of its heads, those that read farthest.",
            arrangements=(V2, TRANSFORMER),
            asks=tuple(("mixed", QA + suffix) for suffix in ("", WITHOUT, WITHOUT_SHORT, WITHOUT_LONGEST)),
            checks=(
                *_learnt(QA, V2, setting="mixed"),
                *(
                    _most(
                        f"at {times} times the training length, answers fall by 10 points or more",
                        _of(V2, QA + WITHOUT, "mixed", at=index),
                        -10,
                        _of(V2, QA, "mixed", at=index),
                    )
                    for index, times in enumerate(MULTIPLES)
                ),
                _least(
                    "without short-term memory they fall less, at 8 times the length",
                    _of(V2, QA + WITHOUT_SHORT, "mixed"),
                    0,
                    _of(V2, QA + WITHOUT, "mixed"),
                    kind="control",
                ),
                _most(
                    "the Transformer's answers fall by 10 points or more without its longest heads, at its length",
                    _of(TRANSFORMER, QA + WITHOUT_LONGEST, "mixed", at=0),
                    -10,
                    _of(TRANSFORMER, QA, "mixed", at=0),
                    kind="control",
                ),
            ),
            full_scale=_LARGE + _LONG + _RULER + " Once more --without long_term.",
        ),
        Claim(
            name="table3",
            paper="Trained at 4k, v2 answers from documents of 8k to 32k; the Transformer cannot beyond 4k.",
            here="Facts of the context at 1 to 32 times the training length, and the loss on text to 8 times.",
            arrangements=(V2, TRANSFORMER, *CONVOLVED_ONES),
            asks=((QA, QA), ("text", "loss")),
            only={"text": (V2, TRANSFORMER)},
            checks=(
                *_learnt(QA, V2, CONVOLVED_ALIBI),
                _least("v2 answers 95 % at 8 times the training length", _of(V2, QA, at=_EIGHT), 95),
                *(
                    _most(
                        f"the {label} fails at 8 times the training length (below 50 %)",
                        _of(label, QA, at=_EIGHT),
                        50,
                        given=_learnt(QA, label)[0],
                    )
                    for label in (TRANSFORMER, *CONVOLVED_ONES)
                ),
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
            here=f"{FINE_TUNING_STEPS} steps at {LONGER} times the training length; asked at 1 to 32 times.",
            arrangements=(V2, TRANSFORMER, *CONVOLVED_ONES),
            asks=((LONG, QA),),
            checks=(
                *_learnt(QA, V2, CONVOLVED_ALIBI, setting=LONG),
                *(
                    _least(
                        f"v2 is not below the {label} at {times} times the first training length",
                        _of(V2, QA, LONG, at=index),
                        -1,
                        _of(label, QA, LONG, at=index),
                        given=_learnt(QA, label, setting=LONG)[0],
                    )
                    for label in (TRANSFORMER, *CONVOLVED_ONES)
                    for index, times in enumerate(MULTIPLES)
                ),
                _least(
                    "v2 answers 95 % at twice the length it was fine-tuned at",
                    _of(V2, QA, LONG, at=_EIGHT),
                    95,
                ),
            ),
            full_scale=_LARGE + _LONG + _RULER,
        ),
        Claim(
            name="table12",
            paper="A delay drawn in training lets v2 go beyond its training length; a fixed one does not (32k: 31.7 "
            "against 15.9).",
            here="Facts of the context at 8 and 32 times the training length, also with other delays at test time.",
            arrangements=(V2, FIXED),
            asks=((QA, QA), *((QA, f"{QA} with a delay of {delay}") for delay in (1, 4, 8))),
            checks=(
                *_learnt(QA, V2, FIXED),
                _least(
                    "5 points better at 8 times the training length",
                    _of(V2, QA, at=_EIGHT),
                    5,
                    _of(FIXED, QA, at=_EIGHT),
                ),
                _least("5 points better at 32 times", _of(V2, QA), 5, _of(FIXED, QA)),
                *(
                    _least(
                        f"5 points better at 32 times, with a delay of {delay} at test time",
                        _of(V2, f"{QA} with a delay of {delay}", QA),
                        5,
                        _of(FIXED, f"{QA} with a delay of {delay}", QA),
                        kind="control",
                    )
                    for delay in (1, 4, 8)
                ),
            ),
            full_scale=_SMALL + " And once with --model.train_delay [64,64]." + _RULER,
        ),
        Claim(
            name="table13",
            paper="v2 finds a needle at any length up to 32k (100 %); the Transformer nearly (97.8 to 99.4 %).",
            here="One fact in a text of 1 to 32 times the training length.",
            asks=((QA, "needle"),),
            checks=(
                _least("v2 finds 95 % at 32 times the training length", _of(V2, "needle", QA), 95),
                _most(
                    "v2 does not fall with the length by more than 3 points", _of(V2, "needle", QA, measure="fall"), 3
                ),
                _least("v2 is not below the Transformer", _of(V2, "needle", QA), -1, _of(TRANSFORMER, "needle", QA)),
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
            here="Classes of the prompt, half of whose words training connects with their labels, with 1 to 32 shots; "
            "trained with 3 on average.",
            arrangements=(V2, TRANSFORMER, CONVOLVED_ALONE, CONVOLVED_ALIBI),
            asks=((NAMED, NAMED),),
            checks=_rises(NAMED, TRANSFORMER, CONVOLVED_ALONE, CONVOLVED_ALIBI),
            full_scale=_LARGE + _MANY_SHOTS + " --labels semantic",
        ),
        Claim(
            name="figure4",
            paper="With anonymous labels, v2 rises with the shots; Transformers stall or fall, 10 points behind.",
            here="Classes that exist only in the prompt, with 1 to 32 shots, trained with 3 on average.",
            asks=((ICL, ICL),),
            checks=_rises(ICL, TRANSFORMER),
            full_scale=_LARGE + _MANY_SHOTS + " --labels anonymous",
        ),
        Claim(
            name="figure5",
            paper="A Transformer with attention split into long and short does not learn in context as v2 does.",
            here="Classes that exist only in the prompt, with 1 to 32 shots, trained with 3 on average.",
            arrangements=(V2, TRANSFORMER, LONG_SHORT),
            asks=((ICL, ICL),),
            checks=(
                _least(
                    "v2 has learnt something: 20 points above chance with most shots",
                    _of(V2, ICL),
                    12.5 + 20,
                    kind="premise",
                ),
                _told_apart(ICL, TRANSFORMER),
                _least("v2 is 10 points above the split with most shots", _of(V2, ICL), 10, _of(LONG_SHORT, ICL)),
                _most(
                    "the split is not 10 points above the plain Transformer",
                    _of(LONG_SHORT, ICL),
                    10,
                    _of(TRANSFORMER, ICL),
                ),
            ),
            full_scale=_SMALL + " And once more with --model.preset transformer-long-short-small." + _MANY_SHOTS,
        ),
        Claim(
            name="figure8",
            paper="One mini-batch of fine-tuning at 32k brings v2 22 points; the Transformer is behind after 800.",
            here=f"One step, and {FINE_TUNING_STEPS}, at {LONGER} times the training length; facts of the context, at "
            "32 times.",
            arrangements=(V2, TRANSFORMER, *CONVOLVED_ONES),
            asks=((QA, QA), ("one long mini-batch", QA), (LONG, QA)),
            checks=(
                *_learnt(QA, V2, CONVOLVED_ALIBI),
                _most("there is something to improve in v2: below 90 %", _of(V2, QA), 90, kind="premise"),
                _least(
                    "v2 after 1 step is 5 points above v2 before", _of(V2, QA, "one long mini-batch"), 5, _of(V2, QA)
                ),
                *(
                    _least(
                        f"v2 after 1 step is above the {label} after {FINE_TUNING_STEPS}",
                        _of(V2, QA, "one long mini-batch"),
                        0,
                        _of(label, QA, LONG),
                        given=_learnt(QA, label)[0],
                    )
                    for label in (TRANSFORMER, *CONVOLVED_ONES)
                ),
            ),
            full_scale=_LARGE + " Then 1, 2 … 800 steps with --training.context_length 32768." + _RULER,
        ),
        Claim(
            name="figure12",
            paper="v2 is ahead of Transformers of equal parameters, and of equal FLOPs.",
            here="Facts of the context and classes of the prompt, against twins matched in both ways; for the facts "
            "also with a convolution, without positions and with ALiBi, which learn them.",
            arrangements=(V2, TRANSFORMER, EQUAL_FLOPS, CONVOLVED_ALONE, CONVOLVED_ALIBI, CONVOLVED_FLOPS),
            asks=((QA, QA), (ICL, ICL)),
            only={ICL: (V2, TRANSFORMER, EQUAL_FLOPS)},
            checks=(
                *_learnt(QA, V2, CONVOLVED_ALIBI, CONVOLVED_FLOPS),
                *(_told_apart(ICL, twin) for twin in (TRANSFORMER, EQUAL_FLOPS)),
                *(
                    _least(
                        f"{QA}: v2 is above the {twin}, at the {where}",
                        _of(V2, QA, at=at),
                        0,
                        _of(twin, QA, at=at),
                        given=_learnt(QA, twin)[0],
                    )
                    for twin in (TRANSFORMER, EQUAL_FLOPS, CONVOLVED_ALONE, CONVOLVED_ALIBI, CONVOLVED_FLOPS)
                    for at, where in ((0, "training length"), (-1, "longest"))
                ),
                *(
                    _least(f"{ICL}: v2 is above the {twin}, with most shots", _of(V2, ICL), 0, _of(twin, ICL))
                    for twin in (TRANSFORMER, EQUAL_FLOPS)
                ),
            ),
            full_scale=_SMALL + " `mosaics.models.matching.matched` gives the widths of the twins.",
        ),
    )
}


# What a reader who trusts Transformers would ask: not of the paper.
PROOF: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            name="learning",
            paper="Asked by us: how many steps does each take to learn what must be looked up in the context?",
            here=f"Steps until {ENOUGH:g} % of new questions at the training length are right, each at its best of all "
            "that was tried; a Transformer that does not get there is counted with all steps it was given.",
            arrangements=(V2, TRANSFORMER, ALIBI),
            asks=((RECALL, RECALL), (QA, QA)),
            curves=(RECALL, QA),
            checks=(*_slower(RECALL, TRANSFORMER, ALIBI), *_slower(QA, TRANSFORMER, ALIBI)),
            full_scale=_SMALL,
        ),
        Claim(
            name="extrapolation",
            paper="Asked by us: of models that have learnt the task, which still know it beyond the training length, "
            "with the known remedies for Transformers?",
            here="Facts of the context at 1 to 32 times the training length; Transformers as trained, with positions "
            "stretched (linear, YaRN), without positions, with ALiBi, with a window, fine-tuned at 4 times.",
            arrangements=(V2, TRANSFORMER, NO_POSITIONS, ALIBI, WINDOW),
            asks=(
                (QA, QA),
                (QA, f"{QA}, linear"),
                (QA, f"{QA}, yarn"),
                (LONG, QA),
                (LONG, f"{QA}, yarn"),
            ),
            checks=(
                *_learnt(QA, V2, ALIBI),
                _least("v2 answers 95 % at 32 times the training length", _of(V2, QA), 95),
                *(
                    _least(
                        f"at {times} times, v2 is 10 points above the {label}{how}",
                        _of(V2, QA, at=FAR.index(times)),
                        10,
                        _of(label, name, setting, at=FAR.index(times)),
                        given=_learnt(QA, label, setting=setting)[0],
                    )
                    for times in (8, 32)
                    for label, name, setting, how in (
                        (TRANSFORMER, QA, QA, ""),
                        (TRANSFORMER, f"{QA}, linear", QA, ", positions interpolated"),
                        (TRANSFORMER, f"{QA}, yarn", QA, " with YaRN"),
                        (TRANSFORMER, QA, LONG, " fine-tuned at 4 times"),
                        (TRANSFORMER, f"{QA}, yarn", LONG, " fine-tuned at 4 times, with YaRN"),
                        (NO_POSITIONS, QA, QA, ""),
                        (ALIBI, QA, QA, ""),
                        (WINDOW, QA, QA, ""),
                    )
                ),
            ),
            full_scale=_SMALL + _LONG + _RULER,
        ),
        Claim(
            name="convolution",
            paper="Asked by us: how much of it is the average in the keys? What does a Transformer with a short "
            "convolution of its queries, keys and values (Primer) lack?",
            here="Facts of the context at 1 to 32 times the training length; Transformers with a convolution over 4 "
            "tokens, with rotary positions, without positions and with ALiBi.",
            arrangements=(V2, *CONVOLVED_ONES),
            asks=((QA, QA),),
            curves=(QA,),
            checks=(
                *_learnt(QA, V2),
                *_slower(QA, *CONVOLVED_ONES),
                *(
                    _least(
                        f"at {times} times the training length, v2 is 10 points above the {label}",
                        _of(V2, QA, at=FAR.index(times)),
                        10,
                        _of(label, QA, at=FAR.index(times)),
                        given=_learnt(QA, label)[0],
                    )
                    for times in (8, 32)
                    for label in CONVOLVED_ONES
                ),
            ),
            full_scale=_SMALL,
        ),
        Claim(
            name="convolution-remedies",
            paper="Asked by us: which remedies take a Transformer that has learnt the task, with a convolution, beyond "
            "its training length?",
            here="Facts of the context at 1 to 32 times the training length; Transformers with a convolution, with "
            "positions stretched (linear, YaRN), with a larger rotary base, without positions, with ALiBi, fine-tuned "
            f"at 4 times, and trained {LONGER_STEPS:,} steps longer than until enough was learnt; beside v2 as it is.",
            arrangements=(V2, CONVOLVED, CONVOLVED_BASE, CONVOLVED_ALONE, CONVOLVED_ALIBI),
            asks=(
                (QA, f"{QA}, linear"),
                *((setting, name) for setting in (QA, LONG, LONGER_TRAINED) for name in (QA, f"{QA}, yarn")),
            ),
            checks=(
                *_learnt(QA, V2),
                *(
                    _least(
                        f"at {times} times, v2 is 10 points above the {label}{how}",
                        _of(V2, QA, at=FAR.index(times)),
                        10,
                        _of(label, name, setting, at=FAR.index(times)),
                        given=_learnt(QA, label)[0],
                    )
                    for times in (8, 32)
                    for setting, after in ((QA, ""), (LONG, ", fine-tuned at 4 times"), (LONGER_TRAINED, ", longer"))
                    for labels, name, how in (
                        ((CONVOLVED, CONVOLVED_BASE, CONVOLVED_ALONE, CONVOLVED_ALIBI), QA, after),
                        ((CONVOLVED, CONVOLVED_BASE), f"{QA}, yarn", f"{after}, with YaRN"),
                        ((CONVOLVED, CONVOLVED_BASE) if setting == QA else (), f"{QA}, linear", ", interpolated"),
                    )
                    for label in labels
                ),
            ),
            full_scale=_SMALL + _LONG + _RULER,
        ),
        Claim(
            name="text",
            paper="Asked by us: is v2 as good on text once both are better than counting, and does more context help?",
            here="Loss on test documents at 1 to 8 times the training length; bigrams and trigrams counted in the same "
            "tokens; the Transformer also with positions stretched.",
            asks=(("text", "loss"), ("text", "loss, linear"), ("text", "loss, yarn"), ("text", "attention")),
            curves=("text",),
            checks=(
                *(
                    _most(
                        f"{label} is 0.1 nats below the {counted}",
                        _of(label, "loss", "text", at=0),
                        -0.1,
                        _of(f"baseline: {counted}", "loss", "text", at=0),
                        kind="premise",
                    )
                    for label in (V2, TRANSFORMER)
                    for counted in ("bigram", "trigram")
                ),
                _most(
                    "v2's loss at the training length is not 0.02 above the Transformer's",
                    _of(V2, "loss", "text", at=0),
                    0.02,
                    _of(TRANSFORMER, "loss", "text", at=0),
                ),
                _most(
                    "v2's loss at 8 times is below that at once",
                    _of(V2, "loss", "text"),
                    0,
                    _of(V2, "loss", "text", at=0),
                ),
                *(
                    _most(
                        f"at {MULTIPLES[at]} times, v2's loss is below that of the {label}{how}",
                        _of(V2, "loss", "text", at=at),
                        0,
                        _of(label, name, "text", at=at),
                        kind="claim" if MULTIPLES[at] == MULTIPLES[-1] else "control",
                    )
                    for label, name, how in (
                        (TRANSFORMER, "loss", ""),
                        (TRANSFORMER, "loss, yarn", " with YaRN"),
                        (TRANSFORMER, "loss, linear", ", positions interpolated"),
                    )
                    for at in range(1, len(MULTIPLES))
                ),
            ),
            full_scale=_SMALL,
        ),
        Claim(
            name="text-remedies",
            paper="Asked by us: on text, do Transformers that are made for longer contexts use them as v2 does?",
            here="Loss on test documents at 1 to 8 times the training length, without positions, also with a "
            "convolution, with ALiBi, with a window.",
            arrangements=(V2, NO_POSITIONS, CONVOLVED_ALONE, ALIBI, WINDOW),
            asks=(("text", "loss"),),
            checks=tuple(
                _most(
                    f"at 8 times, v2's loss is below that of the {label}",
                    _of(V2, "loss", "text"),
                    0,
                    _of(label, "loss", "text"),
                )
                for label in (NO_POSITIONS, CONVOLVED_ALONE, ALIBI, WINDOW)
            ),
            full_scale=_SMALL,
        ),
        Claim(
            name="classification",
            paper="Asked by us: how near does v2 come to what counting words by label can reach?",
            here="Classes that exist only in the prompt, with 1 to 32 shots, also with more classes, less and more "
            "noise; naive Bayes and nearest examples on the same questions.",
            asks=((ICL, ICL), *((ICL, f"{ICL}, {about}") for about in OTHER_CLASSES)),
            curves=(ICL,),
            checks=(
                _most("v2 does not fall with shots by more than 3 points", _of(V2, ICL, measure="fall"), 3),
                *(
                    _least(
                        f"with {shots} shots, v2 is not 5 points below {name.replace('_', ' ')}",
                        _of(V2, ICL, at=SHOTS.index(shots)),
                        -5,
                        _of(f"baseline: {name}", ICL, at=SHOTS.index(shots)),
                        kind="control" if name.startswith("kernel") else "claim",
                    )
                    for name in ("naive_bayes", "nearest_5", "kernel_4x16")
                    for shots in FEW_SHOTS
                ),
            ),
            full_scale=_LARGE + _MANY_SHOTS,
        ),
        Claim(
            name="classification-curriculum",
            paper="Asked by us: what does it take until a Transformer tells classes of the prompt apart, and who is "
            "ahead then?",
            here=f"Before {STEPS[ICL]} steps as they are, {sum(steps for steps, _ in EASY_CLASSES)} with examples of "
            "1, 2, 4 and 8 words and no noise, for both alike; untuned. The Transformer has ALiBi and a convolution.",
            arrangements=(V2, CONVOLVED_ALIBI),
            asks=((EASY_FIRST, ICL),),
            curves=(EASY_FIRST,),
            checks=(
                _told_apart(ICL, CONVOLVED_ALIBI, EASY_FIRST),
                *(
                    _least(
                        f"v2 is 10 points above the {CONVOLVED_ALIBI} with {shots} shots",
                        _of(V2, ICL, EASY_FIRST, at=SHOTS.index(shots)),
                        10,
                        _of(CONVOLVED_ALIBI, ICL, EASY_FIRST, at=SHOTS.index(shots)),
                        kind="claim" if shots in (_WITHIN, SHOTS[-1]) else "control",
                    )
                    for shots in (1, _WITHIN, 8, SHOTS[-1])
                ),
                *(
                    _most(
                        f"the {label} does not fall with shots by more than 3 points",
                        _of(label, ICL, EASY_FIRST, measure="fall"),
                        3,
                        kind=kind,
                    )
                    for label, kind in ((V2, "claim"), (CONVOLVED_ALIBI, "control"))
                ),
            ),
            full_scale=_LARGE + _MANY_SHOTS,
        ),
        Claim(
            name="classification-causes",
            paper="Asked by us: what keeps v2 from what counting words by label reaches: heads of 16 numbers, or that "
            "it is trained with 3 shots on average?",
            here="Classes that exist only in the prompt; trained with twice the width, and with rows of four times the "
            "length and 12 shots on average, both untuned beside the tuned one. Beside it what one read reaches whose "
            "keys are means of random word vectors, as wide as the heads.",
            arrangements=(V2,),
            asks=tuple((setting, ICL) for setting in (ICL, WIDE_HEADS, MANY_SHOTS)),
            checks=tuple(
                _least(
                    f"{how}: 5 points better with {shots} shots",
                    _of(V2, ICL, setting, at=SHOTS.index(shots)),
                    5,
                    _of(V2, ICL, at=SHOTS.index(shots)),
                    kind=kind,
                )
                for how, setting, decides in (
                    ("twice as wide", WIDE_HEADS, 1),
                    ("trained with many shots", MANY_SHOTS, 32),
                )
                for shots, kind in ((n, "claim" if n == decides else "control") for n in FEW_SHOTS)
            ),
            full_scale=_LARGE + _MANY_SHOTS,
        ),
    )
}
_text = PROOF["text"]
PROOF["text-code"] = _text.model_copy(
    update={
        "name": "text-code",
        "alone": True,
        "paper": "Asked by us: is it so on source code, too?",
        "here": f"{_text.here} Beside them Transformers with a convolution, with and without positions. Source code is "
        "to be given as --text, --held-out and --test (`benchmarks/texts.py python`), so it is not among those of "
        "`proof`.",
        "arrangements": (V2, TRANSFORMER, CONVOLVED, CONVOLVED_ALONE),
        "checks": _text.checks
        + tuple(
            _most(
                f"at {MULTIPLES[at]} times, v2's loss is below that of the {label}",
                _of(V2, "loss", "text", at=at),
                0,
                _of(label, "loss", "text", at=at),
                kind="control",
            )
            for label in (CONVOLVED, CONVOLVED_ALONE)
            for at in range(len(MULTIPLES))
        ),
    }
)

# What needs files that nobody else can give.
REAL: dict[str, Claim] = {
    "real-tasks": Claim(
        name="real-tasks",
        paper="Asked by us: what of the paper's dimensions is left on real data, at this size?",
        here="The models of `text`: Banking77, GoEmotions, FewRel (in the place of TACRED) and bAbI's first task with "
        "few and many shots, questions about documents of SQuAD and HotpotQA; all in the paper's and RULER's words.",
        asks=tuple(("text", name) for name in (*CLASSES, *QUESTIONS)),
        checks=(
            *(
                _least(f"{name}: v2 is above the Transformer", _of(V2, name, "text"), 0, _of(TRANSFORMER, name, "text"))
                for name in (*CLASSES, *QUESTIONS)
            ),
            *(
                _least(
                    f"{name}: {label} is above {counted.replace('_', ' ')}",
                    _of(label, name, "text"),
                    0,
                    _of(f"baseline: {counted}", name, "text"),
                    kind="control",
                )
                for name in CLASSES
                for label in (V2, TRANSFORMER)
                for counted in ("chance", "naive_bayes")
            ),
        ),
        full_scale=_LARGE + _MANY_SHOTS + _RULER,
    )
}


def study_of(claims: tuple[Claim, ...], known: dict[str, Setting], seeds: tuple[int, ...], title: str) -> Study:
    """The study that claims need: what they share is done once.

    Raises:
        ValueError: nothing that they ask can be asked.
    """
    asks = {(setting, evaluation) for claim in claims for setting, evaluation in claim.asks}
    chosen = []
    for setting in known.values():
        mine = tuple(e for e in setting.evaluations if (setting.shown_as, e.name) in asks)
        if mine:
            who = [claim for claim in claims if any(name == setting.shown_as for name, _ in claim.asks)]
            only = dict.fromkeys(x for claim in who for x in claim.only.get(setting.shown_as, claim.arrangements))
            some = set(only) != {x for claim in claims for x in claim.arrangements}
            chosen.append(setting.model_copy(update={"evaluations": mine, "only": tuple(only) if some else ()}))
    if not chosen:
        raise ValueError(
            f"{claims[0].name} asks about files of yours; give them as --data NAME=PATH (see docs/reproduction.md)"
        )
    labels = dict.fromkeys(label for claim in claims for label in claim.arrangements)
    return Study(
        title=title,
        arrangements=tuple(ARRANGEMENTS[label] for label in labels),
        settings=tuple(chosen),
        seeds=seeds,
    )
