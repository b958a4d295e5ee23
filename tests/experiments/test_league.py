"""The league of `mosaics compare --systems`, with trainings of three steps."""

import json
from pathlib import Path

import pytest
from tests.experiments.conftest import OPTIONS

from mosaics.experiments.league import league, run_league, systems
from mosaics.experiments.league_page import league_page
from mosaics.experiments.pages import league_in, write_results_page
from mosaics.experiments.records import write_record
from mosaics.experiments.studies import _axes
from mosaics.models import PRESETS

ROOT = Path(__file__).parents[2]
WORDS = "--worlds recall,new-knowledge --text none --seeds 0 --samples 4".split()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    from mosaics.cli import main

    folder = tmp_path_factory.mktemp("league")
    words = ["compare", "--systems", "memory-mosaics-v2,gla", "--output", str(folder / "out"), *WORDS, *OPTIONS]
    assert main([*words, "--results", str(folder / "results")]) == 0
    return folder


@pytest.mark.slow
def test_league_page_has_all_numbers_and_what_was_not_run(kept, tmp_path):
    record = league_in(kept / "results")
    assert {(m["setting"], m["arrangement"]) for m in record["models"]} == {
        (task, system) for task in ("recall", "new-knowledge") for system in ("memory-mosaics-v2", "gla")
    }
    [page] = write_results_page(kept / "results", tmp_path / "results.md")
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "league.md" and "Not run" not in text and str(record["command"]) in text
    assert "**One fact in a long text**" in text and "beside memory-mosaics-v2 at" in text
    images = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert len(images) >= 3 and all((tmp_path / image).is_file() for image in images)
    for cost in record["costs"]:
        assert all(f"{number:,}" in text for number in cost["state_bytes"])
    before = text
    record["rows"][-1]["y"] += 12.5
    assert league_page(record, kept / "results", tmp_path / "results.md") != before
    record["models"] = [m for m in record["models"] if (m["setting"], m["arrangement"]) != ("recall", "gla")]
    without = league_page(record, kept / "results", tmp_path / "results.md")
    assert without.count("Not run: gla.") == 1
    assert "| gla |" not in without.split("## recall")[1].split("## new-knowledge")[0]


@pytest.mark.slow
def test_league_report_shows_what_every_system_answered(kept):
    record = json.loads((kept / "out" / "results.json").read_text(encoding="utf-8"))
    assert {e["evaluation"] for e in record["examples"]} == {"recall", "new-knowledge", "needle"}
    assert all(set(e["said"]) == {"memory-mosaics-v2", "gla"} for e in record["examples"])
    report = (kept / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h2>Examples</h2>" in report and record["examples"][0]["question"] in report


@pytest.mark.slow
def test_league_takes_from_the_cache_what_is_there(kept, monkeypatch):
    study = league(systems(["memory-mosaics-v2", "gla"]), ["recall", "new-knowledge"], None, seeds=(0,), samples=4)
    monkeypatch.setattr("mosaics.experiments.trainings.train", lambda *_: pytest.fail("trains again"))
    changes = json.loads((kept / "results" / "league.json").read_text())["study"]["settings"]
    settings = tuple(type(study.settings[0]).model_validate(setting) for setting in changes)
    told = []
    study = study.model_copy(update={"settings": settings})
    monkeypatch.setattr("mosaics.experiments.studies._do", lambda job, *_: told.append(job) or str(job))
    results = run_league(study, kept / "out" / "cache", kept=lambda found: told.append(len(found["models"])))
    assert [n for n in told if isinstance(n, int)] == [1, 2, 3, 4] and len(results["rows"]) == len(
        league_in(kept / "results")["rows"]
    )


def test_league_page_shows_how_fast_systems_are_and_which_were_not_measured(tmp_path):
    study = league(systems(["memory-mosaics-v2", "gla", "atlas", "dot"]), ["recall"], None)
    machine = {"processor": "a chip", "threads": 2, "torch": "2", "device": "cpu"}
    record = {"study": study.model_dump(mode="json"), "machine": machine, "commit": "1a", "command": "mosaics compare"}
    record |= {key: [] for key in ("models", "rows", "baselines", "costs")}
    case = {"dtype": "float32", "commit": "2b", "parameters": 6000, "state_bytes": 1234}
    step, token = {"part": "training", "context": 2048}, {"part": "decoding", "context": 1024}
    rows = [
        case | step | {"system": "gla", "seconds": 0.5, "to_v2": [0.9, 0.8, 1.0], "to_llama": [0.7, 0.6, 0.75]},
        case | token | {"system": "gla", "seconds": 0.002, "to_v2": [1.1, 1.0, 1.2], "to_llama": [0.5, 0.4, 0.6]},
        case | step | {"system": "atlas", "left_out": "it was killed, for want of memory"},
    ]
    speeds = {"rows": rows, "models": [], "machine": machine}
    write_record(tmp_path / "results" / "systems.json", "systems", speeds, "python systems.py")
    text = league_page(record, tmp_path, tmp_path / "results.md", league_in(tmp_path / "results", "systems"))
    part = text.split("## How fast they are")[1].split("##")[0]
    gla, atlas = (
        next(line for line in part.splitlines() if line.startswith(f"| {name} |")) for name in ("gla", "atlas")
    )
    ends = "500 | 0.90 (0.80 … 1.00) | 0.70 (0.60 … 0.75) | 2 | 1.10 (1.00 … 1.20) | 0.50 (0.40 … 0.60) |"
    assert gla == f"| gla | float32 | 6,000 | 1,234 | {ends}"
    assert "it was killed, for want of memory" in atlas and atlas.count("|") == gla.count("|")
    assert "Not measured: dot." in part and "`python systems.py`" in part and "Commit 2b," in part
    assert "How fast" not in league_page(record, tmp_path, tmp_path / "results.md")


def test_systems_are_presets_by_any_name():
    assert systems(["titans-lmm", "transformer-tiny"]) == ["titans-lmm-tiny", "transformer-tiny"]
    every = systems(["memory-mosaics-v2", "all"])
    assert every[0] == "memory-mosaics-v2-tiny" and len(set(every)) == len(every)
    left = {name for name in PRESETS if name.endswith("-tiny")} - set(every)
    assert left == {"transformer-long-short-tiny", "gam-tiny"}
    assert systems(["gam"]) == ["gam-tiny"]  # whose questions have to fit its positions
    with pytest.raises(ValueError, match="no system 'titan-lmm'; did you mean titans-lmm"):
        systems(["titan-lmm"])


def test_league_refuses_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="nothing to train on"):
        league(systems(["gla"]), [], None)
    with pytest.raises(ValueError, match="no world 'recal'"):
        league(systems(["gla"]), ["recal"], None)
    study = league(systems(["memory-mosaics-v2", "atlas-plus"]), ["recall"], None)
    with pytest.raises(ValueError, match="atlas-plus can't be made as large as memory-mosaics-v2: .* widen"):
        run_league(study, tmp_path)


@pytest.mark.skipif(not (ROOT / "results" / "league.json").is_file(), reason="there is no kept league")
def test_league_page_in_the_docs_is_made_of_the_results():
    speeds = league_in(ROOT / "results", "systems")
    made = league_page(league_in(ROOT / "results"), ROOT / "results", Path("docs/results.md"), speeds)
    assert (ROOT / "docs" / "league.md").read_text(encoding="utf-8") == made


def test_tuned_league_helps_all_alike():
    """Both starts of all maps, rates beyond the edge, rotary bases of what has rotary positions."""
    study = league(systems(["memory-mosaics-v2", "transformer", "kda"]), ["recall"], "text", tune=True)
    assert [bool(one.tuning) for one in study.arrangements] == [False, True, False]
    for setting in study.settings:
        assert set(setting.tuning) == {"training.learning_rate", "model.initializer_range"} and setting.beyond
        for one in study.arrangements:
            assert {"training.learning_rate", "model.initializer_range"} <= set(_axes(one, setting))
    plain = league(systems(["memory-mosaics-v2", "transformer"]), ["recall"], None, learning_rates=[1e-3])
    assert not any(one.tuning for one in plain.arrangements) and not plain.settings[0].beyond
