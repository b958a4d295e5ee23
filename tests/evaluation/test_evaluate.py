"""`mosaics evaluate` on the command line."""

import html
import json

import pytest

from mosaics.cli import main

from .conftest import stdlib_text, tiny


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def refused(capfd, monkeypatch):
    monkeypatch.delenv("MOSAICS_TRACEBACK", raising=False)

    def call(*words) -> str:
        capfd.readouterr()
        assert main(["evaluate", *map(str, words)]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


def test_evaluate_prints_tables_and_continues(model, tmp_path, capfd):
    words = ["evaluate", model, "--suite", "recall", "--lengths", "64", "--pairs", "2,4", "--samples", "2"]
    words = [*map(str, words), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "by distance" in out and str(tmp_path / "out" / "results.json") in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "report: " in out and "of 12 questions right" in page and "<|begin_of_text|>" in html.unescape(page)
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(first["examples"]) == 4 and first["settings"]["pairs"] == [2, 4]
    assert main([*words, "--batch-size", "1"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first


def test_evaluate_without_a_memory_is_shown_side_by_side(model, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text(stdlib_text("bisect"))
    words = ["evaluate", model, "--suite", "perplexity", "--data", text, "--multiples", "1,2", "--samples", "1"]
    assert main([*map(str, words), "--without", "long_term", "--output", str(tmp_path / "out")]) == 0
    assert "side by side" in capfd.readouterr().out
    whole, without, both = (
        json.loads((tmp_path / "out" / part / "results.json").read_text())
        for part in ("whole", "without-long_term", "")
    )
    assert without["settings"]["without"] == ["long_term"]
    rows = both["summary"]["tables"]["side by side: loss by context (nats per token)"]
    assert [row["context"] for row in rows] == [32, 64]
    for row, a, b in zip(rows, whole["examples"], without["examples"], strict=True):
        assert (row["whole"], row["without long_term"]) == (a["score"], b["score"]) and a["score"] != b["score"]
    assert len(both["examples"]) == 4 and (tmp_path / "out" / "plot.png").exists()


def test_evaluate_with_a_state_dtype_scores_what_is_kept(model, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text(stdlib_text("bisect"))
    words = ["evaluate", model, "--suite", "perplexity", "--data", text, "--multiples", "2", "--samples", "1"]
    found = {}
    for name in ("none", "int8"):
        more = [] if name == "none" else ["--state-dtype", name]
        assert main([*map(str, words), *more, "--output", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert found["int8"]["settings"]["state_dtype"] == "int8" and "state_dtype" not in found["none"]["settings"]
    a, b = (found[name]["examples"][0]["score"] for name in found)
    assert a != b and abs(a - b) < 0.01 * a
    assert main([*map(str, words), "--state-dtype", "int8", "--output", str(tmp_path / "none")]) == 2


def test_evaluate_refuses_impossible_options(refused, model, tmp_path):
    assert "did you mean recall?" in refused(model, "--suite", "recal")
    assert "--pairs is not for the suite perplexity; it is for recall" in refused(
        model, "--suite", "perplexity", "--data", "x", "--pairs", "3"
    )
    assert "needs --data" in refused(model, "--suite", "perplexity")
    assert "--samples is 0" in refused(model, "--suite", "recall", "--samples", "0")
    assert "--pairs is '1,x'" in refused(model, "--suite", "recall", "--pairs", "1,x")
    assert "there is no model" in refused(tmp_path / "none", "--suite", "recall")
    assert "dtype is 'int8'" in refused(model, "--suite", "recall", "--dtype", "int8")
    assert "device 'gpu'" in refused(model, "--suite", "recall", "--device", "gpu")
    assert "the model has no 'nothing' memory; it has" in refused(model, "--suite", "recall", "--without", "nothing")
