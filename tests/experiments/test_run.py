"""A study does all of its work, once, and on equal terms."""

import json

import pytest
import torch
from tests.experiments.conftest import MICRO

from mosaics.experiments import work
from mosaics.experiments.compare import arrangements, study
from mosaics.experiments.report import write_report
from mosaics.experiments.run import run_each, run_study
from mosaics.experiments.work import Source, Training


def test_run_study_asks_every_model_everything(results, small_study):
    seen = {(row["setting"], row["arrangement"], row["seed"]): [] for row in results["rows"]}
    for row in results["rows"]:
        seen[row["setting"], row["arrangement"], row["seed"]].append(row["x"])
    assert len(seen) == 2 * 2 * 2
    assert all(xs == ([64, 128, 256, 512] if key[0] == "recall" else [1, 2, 4, 8]) for key, xs in seen.items())
    assert {b["setting"] for b in results["baselines"]} == {"recall"}


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

    monkeypatch.setattr(work, "_train", refuse)
    monkeypatch.setattr(work, "_scorer", refuse)
    assert run_study(small_study, cache)["rows"] == results["rows"]


def test_training_continues_after_an_interruption_bit_for_bit(small_study, results, cache, tmp_path, monkeypatch):
    from mosaics.training import loop

    setting, first = small_study.settings[0], small_study.arrangements[0]
    job = Training(first, first, setting, 1, next(m["learning_rate"] for m in results["models"] if not m["trial"]))
    assert job.result(cache) is not None
    step, done = loop.optimisation_step, []

    def stops(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(work, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(loop, "optimisation_step", stops)
    with pytest.raises(KeyboardInterrupt):
        work.train(job, tmp_path)
    done.append(None)  # three of them: it goes on, and two steps would be one too many
    work.train(job, tmp_path)
    assert len(done) == 4
    assert work.Path(job.folder(tmp_path) / "checkpoints").exists() is False
    ours, theirs = (json.loads((job.folder(c) / "training.json").read_text()) for c in (tmp_path, cache))
    assert ours["curve"] == theirs["curve"] and ours["held_out_loss"] == theirs["held_out_loss"]


def test_arrangements_see_the_same_rows_in_the_same_order(small_study, cache):
    for setting in small_study.settings:
        rows = [Source(setting.data, 64, seed, cache).train.batch(8, 4)["input_ids"] for seed in (0, 0, 1)]
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


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
