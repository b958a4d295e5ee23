"""The numbers of docs/reproduction.md are those of results/: each sentence is made anew and must stand there."""

from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path

import pytest

from mosaics.experiments.claims import (
    ALIBI,
    CLAIMS,
    CONVOLVED,
    CONVOLVED_ALIBI,
    CONVOLVED_ALONE,
    CONVOLVED_BASE,
    EASY_FIRST,
    ICL,
    LONG,
    LONGER_TRAINED,
    NAMED,
    NO_POSITIONS,
    PERSISTENT,
    PROOF,
    QA,
    RECALL,
    TRANSFORMER,
    V1,
    V2,
    WINDOW,
    WITHOUT,
    WITHOUT_LONGEST,
    WITHOUT_SHORT,
)
from mosaics.experiments.claims_v1 import PUBLISHED, PUBLISHED_AT
from mosaics.experiments.evidence import OPEN
from mosaics.experiments.records import read_record

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")


@cache
def kept(name):
    return read_record(ROOT / "results" / f"{name}.json")


def mean(name, arrangement, evaluation, x, setting=None, seed=None):
    wanted = (arrangement, setting or evaluation, evaluation, x)
    found = [
        row["y"]
        for row in kept(name)["rows"]
        if (row["arrangement"], row["setting"], row["evaluation"], row["x"]) == wanted and seed in (None, row["seed"])
    ]
    assert found, wanted
    return sum(found) / len(found)


def counted(name, predictor, evaluation, x, setting=None):
    wanted = (setting or evaluation, evaluation, x)
    [row] = [row for row in kept(name)["baselines"] if (row["setting"], row["evaluation"], row["x"]) == wanted]
    return row[predictor]


def rounded(value, digits=0):
    """As one rounds by hand: halves up."""
    return str(Decimal(f"{value:.6f}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def learnt(name, arrangement, setting=QA):
    models = [m for m in kept(name)["models"] if (m["arrangement"], m["setting"]) == (arrangement, setting)]
    return sorted(m["enough_at"] for m in models if not m["trial"])


def span(values):
    return f"{values[0]:,} to {values[-1]:,}" if values[0] != values[-1] else f"{values[0]:,}"


def points(name, arrangement, evaluation, xs, setting=None, seed=None):
    return ", ".join(f"{rounded(mean(name, arrangement, evaluation, x, setting, seed))}" for x in xs)


def percent(*arguments, **keywords):
    return points(*arguments, **keywords).replace(",", " %,") + " %"


def naive(name, evaluation, shots, setting=None):
    return ", ".join(f"{rounded(counted(name, 'naive_bayes', evaluation, x, setting))}" for x in shots)


FAR, SHOTS = (512, 2048), (1, 8, 32)


def test_tally_of_verdicts():
    told = Counter(kept(name)["verdict"]["verdict"] for name in CLAIMS)
    assert (
        f"Of the {len(CLAIMS)} claims of the v2 paper {told['holds']} hold, {told['does not hold']} do not and "
        f"{told[OPEN]} can't be told" in PAGE
    )


def test_trials_of_each():
    """Of what is trained from the start; those on text are fewer."""
    counts = {}
    for record in map(read_record, (ROOT / "results").glob("*.json")):
        tried = [m for m in record["models"] if m.get("trial")] if record["name"] in CLAIMS | PROOF else []
        for number in {(m["setting"], m["arrangement"]) for m in tried}:
            if number[0] in (RECALL, QA, ICL, NAMED, "mixed", "text"):
                kind = ("text" if number[0] == "text" else "", number[1].startswith(("memory-mosaics-v2", "v2")))
                many = sum((m["setting"], m["arrangement"]) == number for m in tried)
                counts.setdefault(kind, set()).add(many)
    least, most = ({kind: of(found) for kind, found in counts.items()} for of in (min, max))
    assert f"the best of its own {least['', False]} to {most['', False]} trials" in PAGE
    of_v2 = f"v2 of {least['', True]} to {most['', True]}"
    assert f"{of_v2}; on text the Transformer of {least['text', False]} to {most['text', False]} and" in PAGE
    assert f"v2 of {most['text', True]}, of learning rate" in PAGE and least["text", True] == most["text", True]


def test_steps_until_facts_are_learnt():
    assert {*learnt("extrapolation", V2), *learnt("learning", V2), *learnt("convolution", V2)} == {50}
    assert (
        f"with ALiBi {span(learnt('learning', ALIBI))} where the rate falls within 3,000 steps, "
        f"{span(learnt('extrapolation', ALIBI))} within 8,000" in PAGE
    )
    assert (
        f"with rotary positions {span(learnt('convolution', CONVOLVED))}, "
        f"with ALiBi {span(learnt('convolution', CONVOLVED_ALIBI))} |" in PAGE
    )
    never = [mean("extrapolation", label, QA, 64) for label in (TRANSFORMER, NO_POSITIONS, WINDOW)]
    assert f"{rounded(min(never))} to {rounded(max(never))} % with new names" in PAGE
    assert f"counting words reaches ({rounded(counted('extrapolation', 'word_counts', QA, 64))} %)" in PAGE


def test_facts_beyond_the_length_of_training():
    runs = sorted(mean(name, V2, QA, 2048) for name in ("extrapolation", "table12", "learning"))
    assert f"| {rounded(mean('extrapolation', V2, QA, 512))} %, {int(runs[0])} to {rounded(runs[-1])} % |" in PAGE
    assert (
        f"ALiBi {percent('extrapolation', ALIBI, QA, FAR)}; "
        f"ALiBi and a convolution {percent('convolution', CONVOLVED_ALIBI, QA, FAR)}; "
        f"rotary positions and a convolution {percent('convolution', CONVOLVED, QA, FAR)}; "
        f"no positions and a convolution {percent('convolution', CONVOLVED_ALONE, QA, FAR)} |" in PAGE
    )
    after = {label: percent("table4", label, QA, FAR, LONG) for label in (V2, CONVOLVED, CONVOLVED_ALIBI)}
    assert (
        f"| {after[V2]} | rotary positions and a convolution {after[CONVOLVED]}; "
        f"ALiBi and a convolution {after[CONVOLVED_ALIBI]}; ALiBi {percent('extrapolation', ALIBI, QA, FAR, LONG)}"
        in PAGE
    )
    needle = [mean("table13", label, "needle", 2048, QA) for label in (V2, TRANSFORMER)]
    assert (
        f"| {rounded(needle[0])} % | rotary positions {rounded(needle[1])} % (100 % at the length of training) |"
        in PAGE
    )


def test_free_recall():
    def said(label):
        return f"{span(learnt('abstract', label, RECALL))}, then {percent('abstract', label, RECALL, FAR)}"

    assert f"{said(V2).replace(', then', ';')} | rotary positions or ALiBi never in 3,000 " in PAGE
    assert f"rotary positions and a convolution {said(CONVOLVED)}; " in PAGE
    assert (
        f"ALiBi and a convolution {said(CONVOLVED_ALIBI)}; no positions and a convolution {said(CONVOLVED_ALONE)} |"
        in PAGE
    )
    none = {f"{rounded(mean('learning', label, RECALL, 64))}" for label in (TRANSFORMER, ALIBI)}
    assert none == {"14"} and "(14 % right)" in PAGE


def test_text():
    half = [f"{rounded(mean('table3', label, 'loss', 1, 'text'), 2)}" for label in (V2, TRANSFORMER)]
    full = [f"{rounded(mean('text', label, 'loss', 1, 'text'), 2)}" for label in (V2, TRANSFORMER)]
    trigram = [f"{rounded(counted(name, 'trigram', 'loss', 1, 'text'), 2)}" for name in ("table3", "text")]
    assert f"(a counted trigram: {', '.join(trigram)}) | {half[0]}, {full[0]} | {half[1]}, {full[1]} |" in PAGE
    longest = [f"{rounded(mean('text', label, 'loss', 8, 'text'), 2)}" for label in (V2, TRANSFORMER)]
    yarn = mean("text", TRANSFORMER, "loss, yarn", 8, "text")
    assert f"| {longest[0]} | {longest[1]}, with YaRN {rounded(yarn, 2)} |" in PAGE
    bigram, trigram = (rounded(counted("text-code", name, "loss", 1, "text"), 2) for name in ("bigram", "trigram"))
    labels = (V2, TRANSFORMER, CONVOLVED, CONVOLVED_ALONE)
    near, far = ([rounded(mean("text-code", label, "loss", x, "text"), 2) for label in labels] for x in (1, 8))
    yarn = rounded(mean("text-code", TRANSFORMER, "loss, yarn", 8, "text"), 2)
    assert f"bigram: {bigram}, trigram: {trigram}) | {near[0]} | {near[1]}, with a convolution {near[2]}, " in PAGE
    assert f"with a convolution {near[2]}, with that and no positions {near[3]} |" in PAGE
    assert f"| {far[0]} | {far[1]}, with YaRN {yarn}, with a convolution {far[2]}, " in PAGE
    assert f"with a convolution {far[2]}, with that and no positions {far[3]} |" in PAGE
    assert f"at the length of training ({near[2]} against {near[0]} nats, one seed)" in PAGE
    found = {check["says"]: check for check in kept("text-code")["verdict"]["checks"]}

    def by(label, times):
        return found[f"at {times} times, v2's loss is below that of the {label}"]

    least, most = (rounded(-by(CONVOLVED, 1)[end], 2) for end in ("high", "low"))
    ahead, *behind = (rounded(by(CONVOLVED, times)["estimate"], 2).strip("-") for times in (1, 2, 8))
    assert f"ahead of v2 by {ahead} ({least} to {most}) at the length of training, and behind" in PAGE
    assert f"behind it by {behind[0]} at twice and {behind[1]} at 8 times the length" in PAGE
    alone = [rounded(by(CONVOLVED_ALONE, times)["estimate"], 2) for times in (1, 8)]
    assert f"no positions it is behind by {alone[0]}, and by {alone[1]} at 8 times" in PAGE


def test_classes():
    assert (
        f"(naive Bayes {naive('classification', ICL, SHOTS)} %) | {percent('classification', V2, ICL, SHOTS)} | "
        f"{percent('figure12', TRANSFORMER, ICL, SHOTS)}: it does not learn" in PAGE
    )
    for line, evaluation in (("40 % noise", ICL), *((more, f"{ICL}, {more}") for more in ("16 classes", "20 % noise"))):
        own = points("classification", V2, evaluation, SHOTS, ICL)
        read = ", ".join(f"{rounded(counted('classification', 'kernel_4x16', evaluation, x, ICL))}" for x in SHOTS)
        bayes = naive("classification", evaluation, SHOTS, ICL)
        assert f"| {line} | {own} % | {bayes} % | {read} % |" in PAGE
    seeds = [
        points("classification-curriculum", CONVOLVED_ALIBI, ICL, SHOTS, EASY_FIRST, seed)
        for seed in (0, 1, 2)
        if mean("classification-curriculum", CONVOLVED_ALIBI, ICL, 1, EASY_FIRST, seed) > 20
    ]
    assert (
        f"| {percent('classification-curriculum', V2, ICL, SHOTS, EASY_FIRST)} | with ALiBi and a convolution "
        f"{' % and '.join(seeds)} % with two seeds" in PAGE
    )


def test_classes_with_a_meaning():
    first, last = (mean("figure3", V2, NAMED, x) for x in (1, 32))
    ahead = last - mean("figure3", CONVOLVED_ALIBI, NAMED, 32)
    assert f"v2 gains by more examples ({rounded(first)} to {rounded(last)} %)" in PAGE
    assert (
        f"v2 rises by {rounded(last - first)} points with the shots, where 10 were asked, and is {rounded(ahead)} ahead"
        in PAGE
    )
    shots = (2, 4, 8, 32)
    bayes = naive("figure3", NAMED, shots)
    assert (
        f"(naive Bayes {bayes} %; the last words alone {rounded(counted('figure3', 'last_words', NAMED, 2))} %) | "
        f"{percent('figure3', V2, NAMED, shots)} | rotary positions {points('figure3', TRANSFORMER, NAMED, shots)} %; "
        in PAGE
    )


@pytest.mark.parametrize(
    ("evaluation", "x", "name"), ((PERSISTENT, 128, "table2"), (QA, 1024, "table10"), (ICL, 32, "table9"))
)
def test_without_a_memory(evaluation, x, name):
    whole, less = (mean(name, V2, evaluation + suffix, x, "mixed") for suffix in ("", WITHOUT))
    if evaluation == ICL:
        bayes = counted(name, "naive_bayes", evaluation, x, "mixed")
        assert f"| {rounded(whole)} % (naive Bayes {rounded(bayes)} %), without {rounded(less)} % (chance" in PAGE
        return
    short = mean(name, V2, evaluation + WITHOUT_SHORT, x, "mixed")
    digits = 1 if evaluation == PERSISTENT else 0
    assert (
        f"| {rounded(whole, digits)} %, without its long-term memory {rounded(less, digits)} % "
        f"(without the short-term one {rounded(short)} %) |" in PAGE
    )


def test_remedies():
    name, yarn = "convolution-remedies", f"{QA}, yarn"

    def line(said, label, turned):
        cells = [said, span(learnt(name, label))]
        for setting in (QA, LONGER_TRAINED, LONG):
            stretched = f" (YaRN {points(name, label, yarn, FAR, setting)})" if turned else ""
            cells.append(f"{points(name, label, QA, FAR, setting)} %{stretched}")
        return f"| {' | '.join(cells)} |"

    for said, label, turned in (
        ("v2", V2, False),
        ("a Transformer with a convolution and rotary positions", CONVOLVED, True),
        ("the same, rotary base 500,000", CONVOLVED_BASE, True),
        ("the same, ALiBi", CONVOLVED_ALIBI, False),
        ("the same, no positions", CONVOLVED_ALONE, False),
    ):
        assert line(said, label, turned) in PAGE, line(said, label, turned)


def test_transformers_trained_on_all_worlds():
    knows = mean("table1", TRANSFORMER, PERSISTENT, 128, "mixed")
    less = mean("table2", TRANSFORMER, PERSISTENT + WITHOUT_LONGEST, 128, "mixed")
    assert f"| {rounded(knows, 1)} %, without half of its heads, those that read farthest, {rounded(less)} % (" in PAGE
    at = [rounded(mean("table10", TRANSFORMER, QA, x, "mixed")) for x in (128, 1024)]
    assert f"| rotary positions {at[1]} % ({at[0]} % at the length of training) |" in PAGE
    assert f"the Transformer answers {at[0]} % about facts of the context" in PAGE


def test_three_moons():
    """Of docs/memory-mosaics-v1.md."""
    for line in three_moons_lines():
        assert line in V1_PAGE, line


V1_PAGE = (ROOT / "docs" / "memory-mosaics-v1.md").read_text(encoding="utf-8")
OF_V1 = (("v1", V1), ("Transformer", TRANSFORMER), ("v2", V2))


def test_stories_of_v1():
    name = "babistories"
    losses = {label: [mean(name, label, "loss", x, "stories") for x in (1, 2)] for _, label in OF_V1}
    for said, label in OF_V1:
        assert f"| {said} | {' | '.join(rounded(loss, 2) for loss in losses[label])} |" in V1_PAGE
    bigram = " | ".join(rounded(counted(name, "bigram", "loss", x, "stories"), 2) for x in (1, 2))
    assert f"| counted bigram | {bigram} |" in V1_PAGE
    behind, ahead = (losses[TRANSFORMER][1] - losses[label][1] for label in (V1, V2))
    assert f"v1 is {rounded(-behind, 2)} nats behind the Transformer, and v2 {rounded(ahead, 2)} ahead of it" in V1_PAGE
    trials = [sum(m["trial"] and m["arrangement"] == label for m in kept(name)["models"]) for _, label in OF_V1]
    assert f"({trials[0]} of v1, {trials[1]} of the Transformer, {trials[2]} of v2:" in V1_PAGE


def test_attention_of_v1():
    [check] = kept("v1-figure1")["verdict"]["checks"]
    assert (
        f"{rounded(check['left'], 3)} for v1 and {rounded(check['right'], 3)} for the Transformer, "
        f"{rounded(check['estimate'], 3)} apart (−{rounded(-check['low'], 3)} to {rounded(check['high'], 3)})"
        in V1_PAGE
    )
    near, far = ([mean("v1-figure1", label, "attention", x, "stories") for _, label in OF_V1[:2]] for x in (16, 495.5))
    assert f"reads {rounded(near[1], 1)} times its even share and v1 {rounded(near[0], 1)} times" in V1_PAGE
    assert (
        f"to {rounded(far[0], 1)}, while the Transformer falls to 0.4 and rises again to {rounded(far[1], 1)}."
        in V1_PAGE
    )


def test_regbench_of_v1():
    for line in regbench_lines():
        assert line in V1_PAGE, line


def regbench_lines():
    name, numbers = "regbench", (100, 500, 2500)
    for said, label in OF_V1:
        right = [f"{rounded(mean(name, label, 'accuracy', x, name), 1)} %" for x in numbers]
        far = [rounded(mean(name, label, "total variation", x, name), 3) for x in numbers]
        yield f"| {said} | {' | '.join(right)} | {' | '.join(far)} |"
    for said, label in OF_V1[:2]:
        at = [PUBLISHED_AT.index(x) for x in numbers]
        right, far = ([PUBLISHED[evaluation][label][i] for i in at] for evaluation in ("accuracy", "total variation"))
        yield f"| {said}, published | {' | '.join(f'{x:.1f} %' for x in right)} | {' | '.join(f'{x:g}' for x in far)} |"
    trials = {label: 0 for _, label in OF_V1}
    for model in kept(name)["models"]:
        trials[model["arrangement"]] += model["trial"]
    [fewest] = [check for check in kept(name)["verdict"]["checks"] if "within 5 points" in check["says"]]
    lost = mean(name, V1, "accuracy", 2500, name) - mean(name, V1, "accuracy", 100, name)
    more = f"{rounded(-fewest['estimate'], 1)} ({rounded(-fewest['high'], 1)} to {rounded(-fewest['low'], 1)})"
    yield f"v1 loses {rounded(lost, 1)} points from 2500 automata to 100, {more} more than was allowed"
    yield f"{trials[V1]} trials of v1, {trials[V2]} of v2 and {trials[TRANSFORMER]} of the Transformer"


def three_moons_lines():
    seeds, name = (0, 1, 2), "three-moons"

    def each(arrangement, evaluation, x, digits):
        return [rounded(mean(name, arrangement, evaluation, x, name, seed), digits) for seed in seeds]

    for label in ("one head", "three heads"):
        yield f"| {label}: right from | {' | '.join(each(label, 'moment', 0, 0))} |"
        errors = zip(*(each(label, "error", x, 2) for x in (90, 270, 700)), strict=True)
        yield f"| {label}: error after 90, 270, 700 positions | {' | '.join(map(', '.join, errors))} |"
        losses = {m["seed"]: m["losses"] for m in kept(name)["models"] if m["arrangement"] == label}
        starts = (", ".join(rounded(1000 * loss, 1) for loss in losses[seed]) for seed in seeds)
        yield f"| {label}: training loss of the 4 starts, × 1000 | {' | '.join(starts)} |"
    shares = " | ".join(f"{share} %" for share in each("three heads", "isolation", 0, 1))
    yield f"| three heads: share of a key that comes from the head's own moon, least head | {shares} |"
