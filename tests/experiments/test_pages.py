"""The page of kept results, and that the one in the docs is made of what lies in results/."""

from pathlib import Path

import pytest
from tests.experiments.conftest import OPTIONS

from mosaics.experiments import pages
from mosaics.experiments.pages import (
    _asked,
    _learning,
    _to_enough,
    _to_equal_loss,
    reached,
    records_in,
    results_page,
    write_results_page,
)
from mosaics.experiments.points import plot_of
from mosaics.experiments.records import trainings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    from mosaics.cli import main

    folder = tmp_path_factory.mktemp("kept")
    words = ["reproduce", "table12", "--seeds", "0", "--samples", "2", "--output", folder / "out", *OPTIONS]
    assert main([*map(str, words), "--results", str(folder / "results")]) == 0
    return folder / "results"


@pytest.mark.slow
def test_page_has_the_verdict_the_command_and_every_number(kept, tmp_path):
    [page] = write_results_page(kept, tmp_path / "page.md")
    text, [record] = page.read_text(encoding="utf-8"), records_in(kept)
    assert record["command"] in text and str(record["commit"]) in text
    assert f"## `table12`: {record['verdict']['verdict']}" in text and "| `table3` |" in text and "not run" in text
    assert all(check["says"] in text for check in record["verdict"]["checks"])
    assert all(f"| {row['x']:g} " in text for row in record["rows"])
    images = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert images and all((tmp_path / image).is_file() for image in images)


@pytest.mark.slow
def test_page_follows_the_numbers(kept, tmp_path):
    [record] = records_in(kept)
    before = results_page([record], kept, tmp_path / "page.md")
    record["rows"][0]["y"] += 12.5
    record["verdict"]["checks"][0]["low"] -= 1.25
    assert results_page([record], kept, tmp_path / "page.md") != before


@pytest.mark.slow
def test_page_says_when_a_claim_was_defined_otherwise(kept, tmp_path, monkeypatch):
    [record] = records_in(kept)
    assert "was changed since" not in results_page([record], kept, tmp_path / "page.md")
    claim = pages.CLAIMS[record["name"]]
    easier = claim.checks[0].model_copy(update={"margin": claim.checks[0].margin - 1})
    monkeypatch.setitem(pages.CLAIMS, record["name"], claim.model_copy(update={"checks": (easier, *claim.checks[1:])}))
    assert "was changed since" in results_page([record], kept, tmp_path / "page.md")
    monkeypatch.setitem(pages.CLAIMS, record["name"], claim.model_copy(update={"here": "in other words"}))
    assert "was changed since" not in results_page([record], kept, tmp_path / "page.md")


def test_plots_have_lines_of_what_counting_reaches():
    records = {record["name"]: record for record in records_in(ROOT / "results")}
    for name, asked, lines, curves in (
        ("text", ("text", "loss"), {"bigram", "trigram"}, set()),
        ("table13", ("new-knowledge", "needle"), {"chance"}, set()),
        ("table9", ("mixed", "in-context-learning"), {"chance"}, {"naive bayes", "nearest 5"}),
    ):
        (found,) = (
            plot_of(evaluation, rows, records[name])
            for shown_as, evaluation, rows in _asked(records[name])
            if (shown_as, evaluation["name"]) == asked
        )
        assert {line for line, _ in found["lines"]} == lines
        beside = {label: dict(zip(xs, ys, strict=True)) for label, xs, ys in found["beside"]}
        assert curves <= beside.keys() and (curves or not beside)
        for b in records[name]["baselines"]:
            if (b["setting"], b["evaluation"]) == asked and curves:
                assert beside["naive bayes"][b["x"]] == b["naive_bayes"]


def test_page_says_when_both_had_the_loss_of_the_worse():
    probes = {
        ("v2", 0): [[100, 10.0, 5.0], [200, 20.0, 4.0], [300, 30.0, 3.5]],
        ("twin", 0): [[100, 5.0, 6.0], [200, 10.0, 5.0], [300, 15.0, 4.5]],  # v2 is there after 150 steps, 15 seconds
        ("v2", 1): [[100, 10.0, 5.0], [200, 20.0, 4.0], [300, 30.0, 4.0]],
        ("twin", 1): [[100, 5.0, 4.5], [200, 10.0, 3.5], [300, 15.0, 3.0]],  # which has v2's 4 after 150 steps
    }
    models = [
        {"setting": "text", "arrangement": label, "seed": seed, "trial": False, "probes": found}
        for (label, seed), found in probes.items()
    ]
    models.append(models[0] | {"trial": True, "probes": [[1, 1.0, 0.1]]})
    study = {"arrangements": [{"label": "v2"}, {"label": "twin"}, {"label": "untrained"}]}
    study["settings"] = [{"name": "text", "data": {"corpus": "x"}}, {"name": "recall", "data": {"corpus": None}}]
    models.append(models[1] | {"seed": 2})  # the other training of that seed diverged
    said, table = _to_equal_loss(study, models)
    assert "`text`" in said
    row = "| twin | 4.25 (4 … 4.5) | 175.0 (150.0 … 200.0) | 225.0 (150.0 … 300.0) |"
    assert table.splitlines()[-1].startswith(row), table
    assert table.splitlines()[-1].endswith("| 0.9167 (0.5 … 1.333) | 1.833 (1 … 2.667) |"), table
    assert reached([[100, 5.0, 6.0], [200, 9.0, 5.0]], 7.0) == (100, 5.0)


def test_page_says_how_many_times_the_steps_of_the_first_each_took():
    """Looked at every 25 steps: what was learnt at step 50 may have been there after 26."""

    def model(arrangement, seed, enough, steps, seconds, trial=False):
        about = {"setting": "recall", "arrangement": arrangement, "seed": seed, "trial": trial}
        return about | {"enough_at": enough, "steps": steps, "seconds": seconds}

    models = [model("v2", 0, 50, 75, 7.5), model("v2", 1, 100, 125, 12.5), model("v2", 0, 25, 50, 1.0, trial=True)]
    models += [model("slow", 0, 100, 200, 40.0), model("slow", 1, 350, 375, 75.0)]
    models += [model("never", 0, 400, 400, 40.0), model("never", 1, None, 800, 80.0)]
    models += [model("other seed", 7, 50, 75, 7.5)]
    study = {"arrangements": [{"label": label} for label in ("v2", "slow", "never", "other seed")]}
    task = {"name": "recall", "data": {"corpus": None}, "probe": {"every": 25, "enough": 97.0}}
    study["settings"] = [task, task | {"name": "text", "data": {"corpus": "x"}}, task | {"name": "none", "probe": None}]
    said, table = _to_enough(study, models)
    assert "97 %" in said and "every 25 steps" in said
    slow, never = table.strip().splitlines()[2:]
    assert slow == "| slow | 50, 100 | 100, 350 | 3 (1.5 … 4.667) | 6 |"  # 75 of 50 … 350 of 75 steps; 90 of 15 s
    assert never == "| never | 50, 100 | never in 400, 800 | at least 8 | at least 8 |"
    assert not list(_to_enough(study, [m | {"enough_at": None} for m in models]))


def test_curves_of_learning_are_those_that_the_claim_names():
    probes = [[100, 10.0, 5.0], [200, 20.0, 50.0]]
    models = [
        {"setting": setting, "arrangement": "v2", "seed": seed, "trial": trial, "probes": probes}
        | {"steps": 200, "seconds": 20.0 * (seed + 1)}
        for setting, seed, trial in (
            ("recall", 0, False),
            ("recall", 1, False),
            ("recall", 0, True),
            ("mixed", 0, False),
        )
    ]
    study = {"settings": [{"name": name, "data": {"corpus": None}} for name in ("recall", "mixed")]}
    steps, seconds = _learning({"name": "learning", "study": study, "models": models})
    assert steps["curves"] == [("v2", seed, [100, 200], [5.0, 50.0]) for seed in (0, 1)] and steps["title"] == "recall"
    assert seconds["curves"] == [("v2", seed, [15.0, 30.0], [5.0, 50.0]) for seed in (0, 1)]  # at the pace of both
    for name in ("table3", "of a stranger"):
        assert not list(_learning({"name": name, "study": study, "models": models}))


def test_trainings_leave_out_what_was_only_tried():
    tried, taken, other = (
        {"setting": setting, "arrangement": "v2", "seed": seed, "trial": trial}
        for setting, seed, trial in (("text", 0, True), ("text", 0, False), ("text", 1, False))
    )
    before = tried | {"setting": "before"}  # that another setting is fine-tuned from
    found = list(trainings([tried, before, taken, other]))
    assert found == [("text", "v2", [tried, taken, other], [taken, other])]


def test_page_refuses_a_folder_without_results(tmp_path):
    with pytest.raises(ValueError, match="there are no results in"):
        records_in(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results that mosaics wrote"):
        records_in(tmp_path)


def test_page_in_the_docs_is_made_of_the_results():
    page = ROOT / "docs" / "results.md"
    made = results_page(records_in(ROOT / "results"), ROOT / "results", Path("docs/results.md"))
    assert page.read_text(encoding="utf-8") == made, "run mosaics report results --output docs/results.md"
    images = [line.split("](")[1].rstrip(")") for line in made.splitlines() if line.startswith("![")]
    assert all((page.parent / image).is_file() for image in images)
