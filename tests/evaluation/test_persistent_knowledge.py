"""The common benchmarks: from files with known answers, and through lm-eval."""

import json

import pytest

from mosaics.evaluation import PersistentKnowledge, evaluate
from mosaics.evaluation import persistent_knowledge as module
from mosaics.evaluation.harness import task_manager
from mosaics.evaluation.persistent_knowledge import (
    BENCHMARKS,
    FALLS,
    FORMATS,
    STAYS,
    Benchmark,
    mapping,
    normalised,
)

COLOURS = ["red", "blue", "green", "old"]
ROWS = {
    "arc-easy": [{"query": f"Question: {i}?", "choices": COLOURS, "gold": i % 4} for i in range(8)],
    "piqa": [{"query": "Question: How?\n", "choices": ["with care", "never"], "gold": 0}],
    "winogrande": [{"context_options": ["Ann was late so Ann", "Ann was so Bob"], "continuation": "ran.", "gold": 0}],
    "lambada": [{"context": "He gave the dog a", "continuation": "bone"}],
    "tqa": [{"context": "Question: Which city?\nAnswer:", "answer": "Paris", "aliases": ["City of Light", "Paris"]}],
    "nq": [{"question": "who wrote it", "answer": ["The Author", "An author"]}],
    "siqa": [{"context": "Ann fell.", "question": "Y?", "answerA": "i", "answerB": "s", "answerC": "t", "label": "1"}],
    "sciq": [
        {
            "question": "Who?", "correct_answer": "darwin", "distractor1": "a", "distractor2": "b", "distractor3": "c",
            "support": "It was darwin.",
        }
    ],
    "mmlu-alt": [
        {"split": "dev", "question": "q", "choices": ["1", "2"], "answer": 0},
        {"split": "test", "question": "1 + 1 = ", "choices": ["1", "2", "3", "4"], "answer": 1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knowledge")
    for name, records in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: str(folder / f"{name}.jsonl") for name in ROWS}


def oracle(prompt, example):
    return example.references[0] if example.references else "ran."


def table(result, title="benchmarks"):
    return {row["benchmark"]: row for row in result["summary"]["tables"][title]}


def test_persistent_knowledge_of_hand_computed_prompts(known, data):
    shown = {e.meta["task"]: e for e in PersistentKnowledge(data=data).examples(known(oracle))}
    assert shown["arc-easy"].prompt.endswith("?\nAnswer:") and shown["arc-easy"].choices == [
        " red",
        " blue",
        " green",
        " old",
    ]
    assert shown["piqa"].prompt == "Question: How?\nAnswer:" and shown["piqa"].references == ["with care"]
    assert shown["tqa"].references == ["Paris", "City of Light"]
    assert shown["nq"].prompt == "Question: who wrote it?\nAnswer:"
    assert shown["siqa"].prompt == "Q: Ann fell. Y?\nA:" and shown["siqa"].references == ["i"]
    assert shown["sciq"].prompt == "It was darwin.\nQuestion: Who?\nAnswer:"
    assert shown["mmlu-alt"].prompt == "Question: 1 + 1 =\nAnswer:" and shown["mmlu-alt"].references == ["2"]
    assert sum(e.meta["task"] == "mmlu-alt" for e in PersistentKnowledge(data=data).examples(known(oracle))) == 1


def test_persistent_knowledge_of_an_oracle_is_100_percent(known, data):
    model = known(oracle)
    # The right context of winogrande is the one that goes on with the continuation.
    right = "Ann was late so Ann"
    choose = model.choose
    model.choose = lambda es: [
        [float(e.prompt == right)] if e.id.startswith("winogrande") else choose([e])[0] for e in es
    ]
    result = evaluate(PersistentKnowledge(data=data), model)
    assert {name: row["accuracy"] for name, row in table(result).items()} == dict.fromkeys(ROWS, 100)
    averages = result["summary"]["tables"]["averages"]
    assert [(row["average of"], row["benchmarks"], row["of"]) for row in averages] == [(STAYS, 7, 13), ("all", 7, 19)]


def test_persistent_knowledge_of_a_constant_model_scores_its_base_rate(known, data):
    result = evaluate(PersistentKnowledge(data={"arc-easy": data["arc-easy"]}), known(lambda prompt, e: "green"))
    assert table(result)["arc-easy"]["accuracy"] == table(result)["arc-easy"]["chance"] == 25


def test_persistent_knowledge_scores_by_character_where_the_benchmark_does(known, tmp_path):
    record = {"query": "Question: x", "choices": ["a long answer", "no"], "gold": 0}
    for name in ("arc-easy", "boolq"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    model = known(oracle)
    model.choose = lambda examples: [[-6.5, -2.0] for _ in examples]  # by character: -0.5 and -1
    result = evaluate(PersistentKnowledge(data={n: str(tmp_path / f"{n}.jsonl") for n in ("arc-easy", "boolq")}), model)
    assert table(result)["arc-easy"]["accuracy"] == 100 and table(result)["boolq"]["accuracy"] == 0
    assert result["examples"][0]["meta"]["acc"] is False


def test_persistent_knowledge_fewshot_shows_solved_questions_that_are_not_asked(known, data):
    examples = list(PersistentKnowledge(data={"arc-easy": data["arc-easy"]}, fewshot=3).examples(known(oracle)))
    assert len(examples) == 5 and len({example.prefix for example in examples}) == 1
    assert examples[0].prefix.count("\nAnswer: ") == 3
    assert not any(example.prompt in example.prefix for example in examples)
    with pytest.raises(ValueError, match="has 8 questions; ask for fewer --fewshot"):
        PersistentKnowledge(data={"arc-easy": data["arc-easy"]}, fewshot=8).examples(known(oracle))


def test_normalised_equals_what_the_benchmarks_compare():
    assert normalised(" The  Author!") == normalised("author") == "author"
    assert normalised("An anthem") == "anthem"


def test_benchmarks_are_the_papers_19_in_13_and_6():
    parts = [benchmark.part for benchmark in BENCHMARKS.values()]
    assert (parts.count(STAYS), parts.count(FALLS)) == (13, 6)
    assert [name for name, one in BENCHMARKS.items() if one.runs_code] == ["human-eval+", "mbpp"]
    assert {row["paper"] for row in mapping()} == set(BENCHMARKS)


@pytest.mark.slow
def test_benchmarks_are_known_to_lm_eval():
    pytest.importorskip("lm_eval")
    known_tasks = task_manager().all_tasks
    for benchmark in BENCHMARKS.values():
        name = benchmark.task if isinstance(benchmark.task, str) else benchmark.task["task"]
        assert name in known_tasks, name


def test_persistent_knowledge_runs_code_only_on_request(known):
    with pytest.raises(ValueError, match="mbpp executes what the model writes; allow that with --allow-code"):
        PersistentKnowledge(tasks=("mbpp",)).examples(known(oracle))
    assert not any(BENCHMARKS[e.meta["task"]].runs_code for e in PersistentKnowledge().examples(known(oracle)))
    assert len(PersistentKnowledge().examples(known(oracle))) == 17
    assert len(PersistentKnowledge(tasks=("mbpp",), allow_code=True).examples(known(oracle))) == 1


@pytest.mark.slow
def test_persistent_knowledge_through_lm_eval_equals_the_same_questions_from_a_file(
    scorer, data, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval")
    task = {
        "task": "arc_here", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data["arc-easy"]}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setitem(module.BENCHMARKS, "arc-easy", Benchmark(STAYS, task, "acc_norm"))
    ours = evaluate(PersistentKnowledge(data={"arc-easy": data["arc-easy"]}), scorer)
    theirs = evaluate(PersistentKnowledge(tasks=("arc-easy",)), scorer, tmp_path / "out")
    assert table(theirs)["arc-easy"]["accuracy"] == table(ours)["arc-easy"]["accuracy"]
    assert table(theirs)["arc-easy"]["questions"] == 8 and table(theirs)["arc-easy"]["from"] == "lm-eval"
    [record] = theirs["examples"]
    assert [s["score"]["acc_norm"] for s in record["meta"]["samples"]] == [e["score"] for e in ours["examples"]]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["examples"] == theirs["examples"]


@pytest.mark.slow
def test_persistent_knowledge_names_what_lm_eval_cannot_get(scorer, monkeypatch):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="lm-eval can't run openbookqa .* or give a file with --data"):
        evaluate(PersistentKnowledge(tasks=("obqa",), samples=1), scorer)


def test_persistent_knowledge_reads_the_real_files(known, shared):
    files = {
        "arc-easy": "arc_easy_test",
        "obqa": "openbookqa_test",
        "boolq": "boolq_valid",
        "winogrande": "winogrande_valid",
    }
    files |= {"piqa": "piqa_valid", "lambada": "lambada_openai_test", "tqa": "triviaqa_3000", "nq": "nq_open_valid"}
    files |= {"siqa": "siqa_valid", "sciq": "sciq_valid", "hellaswag": "hellaswag_valid_1000"}
    files = {name: str(shared / "data/knowledge" / f"{file}.jsonl.gz") for name, file in files.items()}
    files["mmlu-alt"] = str(shared / "data/knowledge/mmlu.jsonl.xz")
    assert files.keys() <= FORMATS.keys()
    examples = PersistentKnowledge(data=files, fewshot=1).examples(known(oracle))
    counts = {task: 0 for task in files}
    for example in examples:
        counts[example.meta["task"]] += 1
    assert counts["arc-easy"] == 2375 and counts["mmlu-alt"] == 14041 and counts["sciq"] == 999
    assert sum(counts.values()) == len(examples)


def test_persistent_knowledge_refuses_unknown_benchmarks_and_formats(known, tmp_path):
    for options in ({"tasks": ("arc",)}, {"data": {"gsm8k": "x"}}):
        with pytest.raises(ValueError):
            PersistentKnowledge(**options)
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match="a record without 'query' .it has: question"):
        PersistentKnowledge(data={"piqa": str(tmp_path / "bad.jsonl")}).examples(known(oracle))
