"""Any task of lm-eval, by name or from a file."""

import json
from types import SimpleNamespace

import pytest
import yaml

from mosaics.cli import main
from mosaics.evaluation import LmEval, PersistentKnowledge, evaluate
from mosaics.evaluation import harness as module
from mosaics.evaluation.harness import task_manager

pytest.importorskip("lm_eval")
COLOURS = ["red", "blue", "green", "old"]


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """A data file, and a task file that asks it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"query": f"Question: {i}?", "choices": COLOURS, "gold": i % 4} for i in range(8)]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "colours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc_norm"}],
    }  # fmt: skip
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    return data, tmp_path / "colours.yaml"


def test_lm_eval_of_a_task_file_equals_the_same_questions_from_data(scorer, questions, tmp_path):
    data, file = questions
    ours = evaluate(PersistentKnowledge(data={"arc-easy": str(data)}), scorer)
    theirs = evaluate(LmEval(tasks=(str(file),)), scorer, tmp_path / "out")
    [record] = theirs["examples"]
    assert [s["score"]["acc_norm"] for s in record["meta"]["samples"]] == [e["score"] for e in ours["examples"]]
    [row] = [row for row in theirs["summary"]["tables"]["tasks"] if row["metric"] == "acc_norm"]
    assert (row["task"], row["questions"]) == ("colours", 8)
    assert 100 * row["value"] == ours["summary"]["tables"]["benchmarks"][0]["accuracy"]
    assert list(theirs["settings"]["sources"]) == ["colours.yaml"]
    few = evaluate(LmEval(tasks=(str(file),), samples=3, fewshot=2), scorer)["examples"][0]["meta"]
    assert few["questions"] == {"colours": 3}
    assert few["samples"][0]["prompt_digest"] != record["meta"]["samples"][0]["prompt_digest"]


def test_lm_eval_refuses_what_it_can_not_run_in_one_sentence(scorer, questions, tmp_path, capsys, monkeypatch):
    manager = SimpleNamespace(all_tasks=["arc_easy", "piqa"])  # its own index takes half a minute to make
    monkeypatch.setattr(module, "task_manager", lambda index=True: manager if index else task_manager(index=False))
    words = ["evaluate", str(tmp_path), "--suite", "lm-eval"]
    for more, said in (
        ([], "needs --tasks"),
        (["--tasks", "arc_eesy"], "did you mean arc_easy?"),
        (["--tasks", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["--tasks", "arc_easy", "--pairs", "4"], "--pairs is not for the suite lm-eval"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1
    file = questions[1]
    gone = file.read_text().replace("questions.jsonl", "gone.jsonl")
    for text in ("- 1", "task: broken\noutput_type: nothing\n", gone):
        file.write_text(text)
        with pytest.raises(ValueError, match="lm-eval can't run .*colours.yaml"):
            evaluate(LmEval(tasks=(str(file),)), scorer)
