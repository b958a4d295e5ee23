"""A study does all of its work, once, and on equal terms."""

import json
import math

import numpy as np
import pytest
import torch
from tests.experiments.conftest import MICRO

from mosaics.experiments import asking, trainings
from mosaics.experiments.compare import arrangements, study
from mosaics.experiments.report import write_report
from mosaics.experiments.studies import Plan, merit, next_trials, run_each, run_study
from mosaics.experiments.study import Data, Probe, Setting
from mosaics.experiments.trainings import Source, Training, steps_to_enough


def test_run_study_asks_every_model_everything(results, small_study):
    seen = {(row["setting"], row["arrangement"], row["seed"]): [] for row in results["rows"]}
    for row in results["rows"]:
        seen[row["setting"], row["arrangement"], row["seed"]].append(row["x"])
    assert len(seen) == 2 * 2 * 2
    assert all(xs == ([64, 128, 256, 512] if key[0] == "recall" else [1, 2, 4, 8]) for key, xs in seen.items())
    found = {b["setting"]: [] for b in results["baselines"]}
    for row in results["baselines"]:
        found[row["setting"]].append(row)
    assert [row["x"] for row in found["recall"]] == [64, 128, 256, 512] and "repeated_ending" in found["recall"][0]
    assert [row["x"] for row in found["text"]] == [1, 2, 4, 8] and found["text"][0]["bigram"] > 1
    asked = {row["x"]: row["groups"] for row in results["rows"] if row["setting"] == "text"}
    for row in found["text"]:
        assert row["groups"] == asked[row["x"]] and np.mean(row["scores"]["bigram"]) == pytest.approx(
            row["bigram"], 1e-3
        )


def test_run_study_trains_every_arrangement_with_every_trial_and_takes_the_best(results):
    for setting in ("recall", "text"):
        for name in ("memory-mosaics-v2", "transformer"):
            mine = [m for m in results["models"] if (m["setting"], m["arrangement"]) == (setting, name)]
            first = {m["learning_rate"]: m for m in mine if m["seed"] == 0}
            assert set(first) == {1e-3, 2e-3}
            best = min(first.values(), key=lambda m: m["held_out_loss"])
            kept = [m for m in mine if not m["trial"]]
            assert {m["seed"] for m in kept} == {0, 1}
            assert {m["learning_rate"] for m in kept} == {best["learning_rate"]}


def test_run_study_matches_parameters(results):
    sizes = {(m["setting"], m["arrangement"]): m["parameters"] for m in results["models"]}
    for setting in ("recall", "text"):
        assert sizes[setting, "transformer"] == pytest.approx(sizes[setting, "memory-mosaics-v2"], rel=0.01)


def test_arrangements_match_flops_too():
    both = arrangements(["memory-mosaics-v2-tiny", "transformer-tiny"], ["parameters", "flops"])
    assert [(a.label, a.match) for a in both[1:]] == [
        ("transformer (equal parameters)", "parameters"),
        ("transformer (equal flops)", "flops"),
    ]


def test_run_study_does_nothing_twice(results, small_study, cache, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("done again")

    monkeypatch.setattr(trainings, "_train", refuse)
    monkeypatch.setattr(asking, "_scorer", refuse)
    again = run_study(small_study, cache)
    assert again["rows"] == results["rows"] and any(model["trial"] for model in again["models"])
    assert sorted(map(str, again["models"])) == sorted(map(str, results["models"]))  # trials of before, too


def test_training_continues_after_an_interruption_bit_for_bit(small_study, results, cache, tmp_path, monkeypatch):
    from mosaics.training import loop

    setting, first = small_study.settings[0], small_study.arrangements[0]
    job = Training(first, first, setting, 1, next(m["variant"] for m in results["models"] if not m["trial"]))
    assert job.result(cache) is not None
    step, done = loop.optimisation_step, []

    def stops(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(trainings, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(loop, "optimisation_step", stops)
    with pytest.raises(KeyboardInterrupt):
        trainings.train(job, tmp_path)
    done.append(None)  # three of them: it goes on, and two steps would be one too many
    trainings.train(job, tmp_path)
    assert len(done) == 4
    assert trainings.Path(job.folder(tmp_path) / "checkpoints").exists() is False
    ours, theirs = (json.loads((job.folder(c) / "training.json").read_text()) for c in (tmp_path, cache))
    assert ours["curve"] == theirs["curve"] and ours["held_out_loss"] == theirs["held_out_loss"]


def test_arrangements_see_the_same_rows_in_the_same_order(small_study, cache):
    for setting in small_study.settings:
        rows = [Source(setting.data, 64, seed, cache).train.batch(8, 4)["input_ids"] for seed in (0, 0, 1)]
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_models_without_their_longest_heads_are_asked_apart(results, small_study, cache):
    """On text, where the loss follows every head; the model that is asked next is whole again."""
    setting, twin = small_study.settings[1], small_study.arrangements[1]
    job = Plan(small_study, cache).job(twin, setting, 1)
    [loss] = [one for one in setting.evaluations if one.suite == "perplexity"]
    silent = loss.model_copy(update={"name": "silent", "without_longest": 0.5})
    assert loss.plain and not silent.plain
    asking._scorer.cache_clear()
    whole, less = (asking.evaluate(job, one, cache) for one in (loss, silent))
    other = loss.model_copy(update={"options": loss.options | {"samples": loss.options["samples"] + 1}})
    again = asking.evaluate(job, other, cache)
    assert [row["y"] for row in less] != [row["y"] for row in whole]
    assert [row["scores"][0] for row in again] == [row["scores"][0] for row in whole]


def test_source_holds_rows_out(small_study, cache):
    for setting in small_study.settings:
        source = Source(setting.data, 64, 0, cache)
        seen = {tuple(row) for row in source.train.batch(0, 64)["input_ids"].tolist()}
        assert not seen & {tuple(row) for row in source.held_out.batch(0, 16)["input_ids"].tolist()}


def test_a_diverged_trial_is_not_taken(tmp_path, monkeypatch):
    from mosaics.training import loop

    step = loop.optimisation_step

    def diverges(model, optimizer, data, recipe, *rest):
        if recipe.training.learning_rate == 1e-3:
            raise loop.NonFinite("the loss is nan")
        return step(model, optimizer, data, recipe, *rest)

    monkeypatch.setattr(loop, "optimisation_step", diverges)
    common = {"worlds": ["recall"], "corpus": None, "seeds": (0,), "samples": 2, "changes": MICRO}
    found = run_study(study(["memory-mosaics-v2-tiny"], learning_rates=(1e-3, 2e-3), **common), tmp_path)
    losses = {m["learning_rate"]: (m["held_out_loss"], m["trial"]) for m in found["models"]}
    assert losses[1e-3] == (None, True) and losses[2e-3][0] is not None and not losses[2e-3][1]
    # Where all of them diverge, the report says so, and what goes on from there is not trained.
    planned = study(["memory-mosaics-v2-tiny"], learning_rates=(1e-3,), **common)
    later = planned.settings[0].model_copy(update={"name": "later", "start": planned.settings[0]})
    found = run_study(planned.model_copy(update={"settings": (*planned.settings, later)}), tmp_path)
    assert found["rows"] == [] and [m["held_out_loss"] for m in found["models"]] == [None, None]
    assert write_report(found, tmp_path / "report").read_text(encoding="utf-8").count("diverged") == 2


@pytest.mark.slow
def test_run_each_does_everything_in_several_processes(capsys):
    run_each(str, [(number,) for number in range(5)], 2, "number")
    lines = capsys.readouterr().err.splitlines()
    assert {line.split("] ")[1] for line in lines} == {"0", "1", "2", "3", "4"}
    assert [line.split("]")[0] for line in lines] == [f"[number {n} of 5" for n in range(1, 6)]


def test_study_refuses_what_can_not_be():
    with pytest.raises(ValueError, match="nothing to train on"):
        study(worlds=[], corpus=None)
    with pytest.raises(ValueError, match="--export.license"):
        study(changes={"export.license": "mit"})
    with pytest.raises(ValueError, match="no world 'recal'"):
        study(worlds=["recal"], corpus=None)
    with pytest.raises(ValueError, match="not by 'flop'"):
        study(match=["flop"])
    with pytest.raises(ValueError, match="transformer-tiny"):
        run_study(study(["transformr-tiny"]), None)


def searched(axes, score, beyond=0):
    """What `next_trials` tries, round by round, and what it finds."""
    known, rounds = {}, []
    while True:
        missing, best = next_trials(axes, lambda v, known=dict(known): known.get(tuple(v.items())), beyond)
        if not missing:
            return rounds, best
        rounds.append(missing)
        known |= {tuple(v.items()): (score(v),) for v in missing}


def test_next_trials_goes_on_until_the_best_is_not_at_the_edge():
    axes = {"training.learning_rate": (1.0, 2.0, 4.0), "model.x": (None, "b")}
    rounds, best = searched(axes, lambda v: abs(v["training.learning_rate"] - 16) + (v["model.x"] is None), beyond=3)
    assert best == {"training.learning_rate": 16.0, "model.x": "b"}
    tried = [v["training.learning_rate"] for v in rounds[0]], [v["training.learning_rate"] for v in rounds[1]]
    assert tried == ([1.0, 2.0, 4.0], [8.0]) and rounds[3][0]["training.learning_rate"] == 32.0
    _, best = searched(axes, lambda v: -v["training.learning_rate"], beyond=1)
    assert best["training.learning_rate"] == 8.0  # no further than asked
    rounds, best = searched(axes, lambda v: v["training.learning_rate"], beyond=2)
    assert best["training.learning_rate"] == 0.25


def test_next_trials_looks_around_the_best_once_more():
    """The best rate depends on the other key."""

    def score(v):
        wanted = 4.0 if v["model.x"] == "b" else 1.0
        return abs(v["training.learning_rate"] - wanted) + (0 if v["model.x"] == "b" else 10)

    axes = {"training.learning_rate": (1.0, 2.0, 4.0), "model.x": (None, "b")}
    _, best = searched(axes, score)
    assert best == {"training.learning_rate": 2.0, "model.x": "b"}  # the neighbour; not all of them again
    assert searched({}, score) == ([], {})


@pytest.mark.parametrize("wanted", (0.25, 1.0, 2.0, 8.0, 32.0))
@pytest.mark.parametrize("first", (1.0, 4.0))
def test_next_trials_ends_with_neighbours_on_both_sides(first, wanted):
    """Both sides of the best rate were tried with the best of the other key, wherever the first round ended."""

    def score(v):
        return abs(math.log2(v["training.learning_rate"] / (first if v["model.x"] is None else wanted))) - (
            10 if v["model.x"] == "b" else 0
        )

    axes = {"training.learning_rate": (1.0, 2.0, 4.0), "model.x": (None, "b")}
    rounds, best = searched(axes, score, beyond=3)
    assert best == {"training.learning_rate": wanted, "model.x": "b"}
    tried = [v for each in rounds for v in each]
    for factor in (0.5, 2.0):
        beside = best | {"training.learning_rate": wanted * factor}
        assert beside in tried or wanted * factor > 4.0 * 2**3


def test_merit_ranks_by_steps_then_by_what_was_learnt_then_by_loss():
    task = Setting(name="s", data=Data(world="recall"), probe=Probe(every=10, enough=90.0))

    def result(*probes, loss=1.0):
        return {"held_out_loss": loss, "probes": [[10 * (i + 1), 0.0, p] for i, p in enumerate(probes)]}

    ranked = [result(95, 95), result(5, 91, 92), result(91, 5, 95, 95), result(80, 80), result(50), result(loss=None)]
    assert sorted(ranked, key=lambda r: merit(task, r)) == ranked
    assert [steps_to_enough(task, r["probes"]) for r in ranked] == [10, 20, 30, None, None, None]
    by_loss = task.model_copy(update={"probe": None})
    assert merit(by_loss, result(loss=1.0)) < merit(by_loss, result(loss=2.0)) < merit(by_loss, result(loss=None))


def test_training_stops_when_it_knows_enough_and_keeps_what_it_knew(tmp_path):
    changes = MICRO | {"training.steps": 9}
    [setting] = study(["memory-mosaics-v2-tiny"], ["recall"], None, changes=changes).settings
    probed = setting.model_copy(update={"probe": Probe(every=2, rows=8, enough=0.0)})
    first = arrangements(["memory-mosaics-v2-tiny"])[0]
    done = trainings.train(Training(first, first, probed, 0), tmp_path)
    assert done["steps"] == 4 and [step for step, *_ in done["probes"]] == [2, 4] and done["tokens"] == 4 * 4 * 64
    assert all(0 <= value <= 100 and seconds > 0 for _, seconds, value in done["probes"])
    never = setting.model_copy(update={"probe": Probe(every=2, rows=8, enough=101.0)})
    assert trainings.train(Training(first, first, never, 0), tmp_path)["steps"] == 9
    plain = trainings.train(Training(first, first, setting, 0), tmp_path)
    looked = trainings.train(Training(first, first, setting.model_copy(update={"probe": Probe(every=1)}), 0), tmp_path)
    assert plain["curve"] == looked["curve"]  # to look changes nothing


def test_source_follows_a_curriculum():
    data = Data(
        world="recall", settings={"facts": 4}, curriculum=((2, {"length": 32}), (3, {"length": 48, "facts": 2}))
    )
    source = Source(data, 64, 0, None)
    rows = [source.at(step).batch(0, 2) for step in range(1, 8)]
    assert [row["input_ids"].shape[1] for row in rows] == [32, 32, 48, 48, 48, 64, 64]
    assert [int(row["answers"][0].sum()) for row in rows] == [4, 4, 2, 2, 2, 4, 4]
    assert (rows[-1]["labels"] == -100).any()  # the loss is that of the data


def test_plan_tunes_each_arrangement_by_what_it_has(tmp_path):
    planned = study(worlds=["recall"], corpus=None, learning_rates=(1e-3, 2e-3), changes=MICRO)
    tuning = planned.settings[0].tuning | {"model.initializer_range": (None, 0.02)}
    settings = (planned.settings[0].model_copy(update={"tuning": tuning}),)
    v2, twin = planned.arrangements
    twin = twin.model_copy(update={"tuning": {"model.rotary_base": (1e4, 5e5), "model.num_pairs": (3, 4)}})
    plan = Plan(planned.model_copy(update={"settings": settings, "arrangements": (v2, twin)}), tmp_path)
    assert plan.trials()[0].variant == {"training.learning_rate": 1e-3, "model.initializer_range": None}
    trials, _ = plan.expected()
    keys = {job.arrangement.label: set(job.variant) for job in trials}
    assert keys[v2.label] == {"training.learning_rate", "model.initializer_range"}
    assert keys[twin.label] == keys[v2.label] | {"model.rotary_base"}
