"""Documents before questions: where the answer stands, how long prompts are, and models whose answers are known."""

import json
import random
import re
from collections import Counter

import pytest

from mosaics.evaluation import Example, NewKnowledge, Scorer, evaluate
from mosaics.evaluation.new_knowledge import matches, read_hotpotqa, read_squad

TOWNS = [f"town{i:02d}" for i in range(40)]


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """Eight articles of five paragraphs, each with a question about one town."""
    path = tmp_path_factory.mktemp("qa") / "squad.json"
    articles = []
    for a in range(8):
        paragraphs = []
        for i in range(5 * a, 5 * a + 5):
            fact = f"The {TOWNS[i]} was founded in {1000 + i} by the king."
            asked = {
                "id": f"q{i}",
                "question": f"When was the {TOWNS[i]} founded?",
                "answers": [{"text": str(1000 + i)}],
            }
            asked["answers"].append({"text": f"in {1000 + i}"})
            unknown = {"id": f"u{i}", "question": "Why?", "answers": [], "is_impossible": True}
            paragraphs.append({"context": fact, "qas": [asked, unknown]})
        articles.append({"title": f"a{a}", "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return str(path)


@pytest.fixture(scope="module")
def essays(tmp_path_factory):
    path = tmp_path_factory.mktemp("essays") / "essays.txt"
    path.write_text(" ".join(f"Sentence {i} is about nothing in particular." for i in range(300)))
    return str(path)


def oracle(prompt, example):
    """Reads the answer from the prompt, as a person would."""
    if "Question:" in prompt:
        town = re.search(r"Question: When was the (\w+) founded", prompt)[1]
        return " It was in " + re.search(town + r" was founded in (\d+)", prompt)[1]
    key = re.search(r"for ([\w-]+) mentioned", prompt)[1]
    return re.search(rf"for {key} is: ([\w-]+)\.", prompt)[1]


def forgetful(share):
    """Reads the last part of the prompt only."""

    def says(prompt, example):
        try:
            return oracle(prompt[int(len(prompt) * (1 - share)) :], example)
        except TypeError:
            return "I do not know."

    return says


def suite(squad, essays, **options):
    return NewKnowledge(data={"squad": squad, "essays": essays}, **{"lengths": (320, 640), "samples": 25} | options)


def rows(result, table="by length"):
    return result["summary"]["tables"][table]


def test_new_knowledge_prompts_fill_their_length_and_never_exceed_it(known, squad, essays):
    model = known(oracle)
    examples = list(suite(squad, essays).examples(model))
    assert Counter((e.meta["task"], e.meta["length"]) for e in examples) == {
        (task, length): 25 for task in ("squad", "niah-noise", "niah-essays", "niah-uuids") for length in (320, 640)
    }
    for example in examples:
        room = 64 if example.meta["task"] == "niah-uuids" else 32
        assert model.count(example.prompt) == example.meta["tokens"] <= example.meta["length"] - room
        assert example.meta["tokens"] > example.meta["length"] - room - 60  # no more than about a document is free
    assert len({example.id for example in examples}) == len(examples)


def test_new_knowledge_draws_the_place_of_the_answer_for_every_sample(known, squad, essays):
    examples = list(suite(squad, essays).examples(known(oracle)))
    for task in ("squad", "niah-noise", "niah-essays"):
        depths = [e.meta["depth"] for e in examples if (e.meta["task"], e.meta["length"]) == (task, 640)]
        assert min(depths) < 0.2 and max(depths) > 0.8 and len(set(depths)) >= 7
    for example in examples:
        if example.meta["task"] == "squad":
            shown = re.findall(r"Document \d+:\n(.*)", example.prompt)
            assert len(shown) == len(set(shown)) == example.meta["documents"]
            assert [i for i, text in enumerate(shown) if example.references[0] in text] == example.meta["gold"]


def test_new_knowledge_published_has_the_answer_at_one_place_in_all_samples(known, squad):
    options = {"data": {"squad": squad}, "lengths": (640,), "samples": 25}
    published = rows(evaluate(NewKnowledge(**options, construction="published"), known(oracle)))
    drawn = rows(evaluate(NewKnowledge(**options, tasks=("squad",)), known(oracle)))
    assert published[0]["places"] == 1 and published[0]["examples"] == 25
    assert drawn[0]["places"] > 5
    # By hand: with one seed, Python's shuffle takes the first of 10 documents to the 3rd place from the end.
    order = list(range(10))
    random.Random(42).shuffle(order)
    [first] = {tuple(e.meta["gold"]) for e in NewKnowledge(**options, construction="published").examples(known(oracle))}
    assert first == (order.index(0),)


def test_new_knowledge_of_an_oracle_is_100_percent(known, squad, essays):
    result = evaluate(suite(squad, essays), known(oracle))
    assert all(row["accuracy"] == 100 for table in ("by length", "by depth") for row in rows(result, table))
    assert {row["mean over references"] for row in rows(result)} == {100}


def test_new_knowledge_of_a_constant_model_scores_its_base_rate(known, squad, essays):
    result = evaluate(suite(squad, essays, tasks=("squad",), samples=40), known(lambda prompt, e: "1007"))
    assert [row["accuracy"] for row in rows(result)] == [2.5, 2.5]  # one question of 40
    assert [row["mean over references"] for row in rows(result)] == [1.25, 1.25]  # one of its two references


def test_new_knowledge_of_a_forgetful_model_shows_its_bias_by_depth(known, squad, essays):
    result = evaluate(suite(squad, essays, tasks=("niah-essays",), lengths=(1280,), samples=60), known(forgetful(0.5)))
    by_depth = {row["depth"]: row["accuracy"] for row in rows(result, "by depth")}
    assert by_depth["0-20 %"] == 0 and by_depth["20-40 %"] == 0
    assert by_depth["60-80 %"] == by_depth["80-100 %"] == 100


def test_new_knowledge_of_a_hand_computed_sample(known, tmp_path):
    data = {"data": [{"title": "t", "paragraphs": [{"context": "Ann lives in Rome.", "qas": [
        {"id": "1", "question": "Where does Ann live?", "answers": [{"text": "Rome"}]}]},
        {"context": "Bob is old.", "qas": []}]}]}  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps(data))
    model = known(lambda prompt, e: "rome, of course")
    made = NewKnowledge(data={"squad": str(tmp_path / "squad.json")}, tasks=("squad",), lengths=(260,), samples=1)
    [example] = made.examples(model)
    instruction = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    texts = ["Ann lives in Rome.", "Bob is old."][:: 1 if example.meta["gold"] == [0] else -1]
    assert example.prompt == (
        f"{instruction}\n\nThe following are given documents.\n\nDocument 1:\n{texts[0]}\n\nDocument 2:\n{texts[1]}"
        f"\n\n{instruction}\n\nQuestion: Where does Ann live? Answer:"
    )
    [record] = made.answer(model, [example])
    assert record.score == 1 and record.meta["depth"] in (0.25, 0.75)


def test_matches_gives_max_and_mean_over_references():
    assert matches(" Denver Broncos won", ["denver broncos", "The Broncos", "Broncos"]) == (1.0, pytest.approx(2 / 3))
    assert matches("no", ["yes"]) == (0.0, 0.0)


def test_new_knowledge_refuses_a_prompt_beyond_the_limit_of_the_user(scorer, tokenizer, squad):
    made = NewKnowledge(data={"squad": squad}, tasks=("squad",), lengths=(320,), samples=1, max_new_tokens=2)
    assert len(evaluate(made, scorer)["examples"]) == 1  # ten times the training length is no reason
    with pytest.raises(ValueError, match="the limit is 250"):
        evaluate(made, Scorer(scorer.model, tokenizer, limit=250))


def test_new_knowledge_refuses_what_it_cannot_build(known, squad, essays):
    with pytest.raises(ValueError, match="no question of squad and its documents fit into 64 tokens"):
        list(suite(squad, essays, lengths=(64,)).examples(known(oracle)))
    with pytest.raises(ValueError, match="all 40 documents of squad do not fill 9000 tokens"):
        list(suite(squad, essays, lengths=(9000,)).examples(known(oracle)))
    with pytest.raises(ValueError, match="needs --data hotpotqa=PATH"):
        suite(squad, essays, tasks=("hotpotqa",)).examples(known(oracle))
    for options in ({"tasks": ("squat",)}, {"data": {"squat": "x"}}, {"construction": "other"}):
        with pytest.raises(ValueError):
            NewKnowledge(**options)


def test_read_hotpotqa_reads_all_forms_alike(tmp_path):
    paragraphs = [("Ann", ["Ann is a singer.", " She lives in Rome."], True), ("Bob", ["Bob is old."], False)]
    paragraphs.append(("Rome", ["Rome is in Italy."], True))
    official = {
        "_id": "x", "question": "Where does the singer Ann live?", "answer": "Italy",
        "supporting_facts": [["Ann", 0], ["Rome", 0]], "context": [[t, s] for t, s, _ in paragraphs],
    }  # fmt: skip
    hub = official | {
        "supporting_facts": {"title": ["Ann", "Rome"], "sent_id": [0, 0]},
        "context": {"title": [t for t, *_ in paragraphs], "sentences": [s for _, s, _ in paragraphs]},
    }
    ircot = {
        "question_id": "x", "question_text": official["question"], "answers_objects": [{"spans": ["Italy"]}],
        "contexts": [{"title": t, "paragraph_text": "".join(s), "is_supporting": g} for t, s, g in paragraphs],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([official]))
    (tmp_path / "b.json").write_text(json.dumps([hub]))
    (tmp_path / "c.jsonl").write_text(json.dumps(ircot) + "\n")
    read = [read_hotpotqa(str(tmp_path / name)) for name in ("a.json", "b.json", "c.jsonl")]
    assert read[0] == read[1] == read[2]
    documents, [question] = read[0]
    assert [documents[i] for i in question.gold] == [
        "Ann\nAnn is a singer. She lives in Rome.",
        "Rome\nRome is in Italy.",
    ]
    assert [documents[i] for i in question.related] == ["Bob\nBob is old."]


def test_new_knowledge_reads_the_real_files(known, shared):
    documents, questions = read_squad(str(shared / "data/qa/squad_v2.0_dev.json.gz"))
    assert (len(documents), len(questions)) == (1204, 5928)
    assert all(any(a in documents[q.gold[0]] for a in q.answers) for q in questions)
    documents, questions = read_hotpotqa(str(shared / "data/qa/hotpotqa_dev_distractor_500_ircot.jsonl.gz"))
    assert (len(documents), len(questions)) == (4858, 500) and {len(q.gold) for q in questions} == {2}
    made = NewKnowledge(
        data={"hotpotqa": str(shared / "data/qa/hotpotqa_dev_distractor_500_ircot.jsonl.gz")},
        tasks=("hotpotqa",), lengths=(2048,), samples=3,
    )  # fmt: skip
    for example in made.examples(known(oracle)):
        assert isinstance(example, Example) and 1900 < example.meta["tokens"] <= 2048 - 32
