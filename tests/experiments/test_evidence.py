"""Verdicts follow from intervals, and know when they can't be told."""

import numpy as np
import pytest

from mosaics.experiments.claims import Check, Claim, Term
from mosaics.experiments.evidence import FAILS, HOLDS, LEFT_OUT, OPEN, difference, judge
from mosaics.experiments.records import by_predictor, read_record, write_record
from mosaics.experiments.reproduce import verdict_text


def term(arrangement="a", **more):
    return Term(arrangement=arrangement, setting="s", evaluation="e", **more)


def check(relation, margin=0.0, right=None, kind="claim", **more):
    return Check(says="it is so", left=term(**more), relation=relation, right=right, margin=margin, kind=kind)


def rows(**shares):
    """Rows of arrangements: for each seed the shares at x = 1, 2, 4, of 400 questions in contexts of 8."""
    found = []
    for name, seeds in shares.items():
        for seed, values in enumerate(seeds):
            for x, share in reversed(list(zip((1, 2, 4), values, strict=False))):
                scores = [float(i < share * 4) for i in np.random.default_rng(seed).permutation(400)]
                row = {"arrangement": name, "setting": "s", "evaluation": "e", "seed": seed, "x": x}
                found.append(row | {"y": sum(scores) / 4, "scores": scores, "groups": [8] * 50})
    return found


def verdict(checks, **shares):
    claim = Claim(name="c", paper="", here="", asks=(), checks=tuple(checks), full_scale="")
    return judge(claim, {"rows": rows(**shares), "models": []})


def test_judge_asks_whether_the_interval_lies_on_the_right_side():
    assert verdict([check(">=", 95)], a=[[0, 0, 99], [0, 0, 99]])["verdict"] == HOLDS
    assert verdict([check(">=", 95)], a=[[0, 0, 80], [0, 0, 85]])["verdict"] == FAILS
    assert verdict([check(">=", 95)], a=[[0, 0, 96], [0, 0, 95]])["verdict"] == OPEN
    assert verdict([check("<=", 50, at=0)], a=[[20, 99, 99], [30, 99, 99]])["verdict"] == HOLDS
    assert verdict([check("<=", 50, at=0)], a=[[70, 0, 0], [80, 0, 0]])["verdict"] == FAILS


def test_judge_counts_seeds_that_differ_as_uncertainty():
    one = difference(check(">=", 50), rows(a=[[0, 0, 60], [0, 0, 60], [0, 0, 60]]))
    apart = difference(check(">=", 50), rows(a=[[0, 0, 100], [0, 0, 60], [0, 0, 20]]))
    assert one["estimate"] == pytest.approx(apart["estimate"]) and one["low"] > 0 > apart["low"]
    assert apart["by_seed"] == {"0": 50.0, "1": 10.0, "2": -30.0}


def test_judge_knows_that_all_of_few_is_not_certain():
    found = difference(check(">=", 99.5), rows(a=[[0, 0, 100]]))
    assert found["estimate"] == pytest.approx(0.5) and found["low"] < 0
    both = difference(check(">=", -0.5, right=term("b")), rows(a=[[0, 0, 100]], b=[[0, 0, 100]]))
    assert both["low"] < 0 < both["high"]


def test_judge_compares_pairs_of_answers():
    better = check(">=", 10, right=term("b"))
    assert verdict([better], a=[[0, 0, 40], [0, 0, 40]], b=[[0, 0, 20], [0, 0, 10]])["verdict"] == HOLDS
    assert verdict([better], a=[[0, 0, 30], [0, 0, 30]], b=[[0, 0, 30], [0, 0, 31]])["verdict"] == FAILS
    assert verdict([better], a=[[0, 0, 31], [0, 0, 31]], b=[[0, 0, 20], [0, 0, 21]])["verdict"] == OPEN
    half = Check(says="", left=term("a"), relation="<=", right=term("b"), factor=0.5)
    found = difference(half, rows(a=[[0, 0, 20]], b=[[0, 0, 60]]))
    assert (found["left"], found["right"], found["estimate"]) == (20, 30, pytest.approx(10)) and found["low"] > 0


def test_difference_draws_whole_contexts():
    """Eight answers to one context that are alike are one piece of evidence, not eight."""
    made = rows(a=[[0, 0, 50]])
    alike = [{**row, "scores": sorted(row["scores"])} for row in made]
    apart, together = (difference(check(">=", 50), given) for given in (made, alike))
    assert together["high"] - together["low"] > 1.5 * (apart["high"] - apart["low"])


def test_judge_pairs_simple_predictors_with_the_same_documents(tmp_path):
    """Documents are hard or easy for everyone: what a predictor reaches is compared document by document."""
    losses = np.random.default_rng(0).normal(4, 1, 40)
    row = {"arrangement": "a", "setting": "s", "evaluation": "e", "x": 1, "groups": [2] * 20}
    made = [row | {"seed": i, "y": losses.mean(), "scores": losses.tolist()} for i in (0, 1)]
    counted = {"setting": "s", "evaluation": "e", "x": 1, "trigram": losses.mean() + 0.2}
    single = {"scores": {"trigram": (losses + 0.2).tolist()}, "groups": [2] * 20}
    better = Check(says="", left=term("a"), relation="<=", right=term("baseline: trigram"), margin=-0.1)
    claim = Claim(name="c", paper="", here="", asks=(), checks=(better,), full_scale="")
    results = {"rows": made, "models": [], "study": {"seeds": [0, 1]}, "machine": {}}
    assert judge(claim, results | {"baselines": [counted]})["verdict"] == OPEN
    assert judge(claim, results | {"baselines": [counted | single]})["verdict"] == HOLDS
    write_record(tmp_path / "kept.json", "c", results | {"baselines": [counted | single]}, "")
    kept = read_record(tmp_path / "kept.json")
    assert judge(claim, kept)["verdict"] == HOLDS and by_predictor(kept["baselines"][0]).keys() == {"trigram"}


def test_judge_measures_falls_rises_and_spreads():
    assert verdict([check("<=", 5, measure="fall")], a=[[10, 9, 90], [10, 20, 90]])["verdict"] == HOLDS
    assert verdict([check("<=", 5, measure="fall")], a=[[40, 10, 90], [40, 10, 90]])["verdict"] == FAILS
    assert verdict([check(">=", 50, measure="rise")], a=[[10, 10, 90], [10, 10, 90]])["verdict"] == HOLDS
    plain = [{k: v for k, v in row.items() if k != "scores"} for row in rows(a=[[9, 2, 2], [1, 3, 3]])]
    assert difference(check("<=", 0.0, measure="spread", at=1), plain)["estimate"] == 0
    assert difference(check("<=", 0.0, measure="spread", at=0), plain)["high"] < 0


def test_judge_can_not_tell_without_a_premise_and_does_not_ask_a_control():
    good, bad = check(">=", 50, at=0), check(">=", 50, at=1)
    shares = dict(a=[[90, 10, 90], [90, 10, 90]])
    assert verdict([good], **shares)["verdict"] == HOLDS and verdict([bad], **shares)["verdict"] == FAILS
    premise = bad.model_copy(update={"kind": "premise", "says": "it has learnt"})
    found = verdict([good, premise], **shares)
    assert found["verdict"] == OPEN and found["why"] == ["it has learnt"]
    assert "can't be told, since not: it has learnt" in verdict_text(found) and "premise: it has" in verdict_text(found)
    assert verdict([good, bad.model_copy(update={"kind": "control"})], **shares)["verdict"] == HOLDS


def test_judge_leaves_out_what_was_compared_with_one_that_has_not_learnt():
    learnt = check(">=", 50, at=0, arrangement="b")
    apart = check(">=", 10, right=term("b")).model_copy(update={"given": learnt, "says": "it is ahead"})
    good = check(">=", 50)
    shares = dict(a=[[90, 90, 90], [90, 90, 90]])
    cases = ([90, 90, 85], FAILS, FAILS), ([20, 90, 85], HOLDS, LEFT_OUT), ([90, 90, 20], HOLDS, HOLDS)
    for b, said, least in cases:
        found = verdict([good, apart], b=[b, b], **shares)
        assert (found["verdict"], found["checks"][1]["verdict"]) == (said, least)
    assert "-   it is ahead" in verdict_text(verdict([good, apart], b=[[20, 90, 85]] * 2, **shares))
    assert verdict([apart], b=[[20, 90, 85]] * 2, **shares)["verdict"] == OPEN, "nothing is left that could decide"


def test_judge_can_not_tell_where_nothing_was_measured():
    found = verdict([check(">=", 5, right=term("b"))], a=[[1, 1, 1]])
    assert found["verdict"] == OPEN and "nothing was measured" in verdict_text(found)


def test_judge_compares_steps():
    def model(arrangement, seed, enough, steps=900, trial=False):
        return {"arrangement": arrangement, "setting": "s", "seed": seed, "trial": trial, "steps": steps} | {
            "enough_at": enough
        }

    models = [model("a", s, 100 + s) for s in range(3)] + [model("b", s, None if s else 700) for s in range(3)]
    models.append(model("a", 0, 1, trial=True))
    claim = Claim(
        name="c",
        paper="",
        here="",
        asks=(),
        checks=(
            Check(
                says="b takes five times as long",
                left=term("b", measure="steps"),
                relation=">=",
                right=term("a", measure="steps"),
                factor=5.0,
            ),
        ),
        full_scale="",
    )
    found = judge(claim, {"rows": [], "models": models})
    assert found["verdict"] == HOLDS and found["checks"][0]["left"] == pytest.approx((700 + 900 + 900) / 3)
