"""Many-shot classification: the wordings, the strategies, and models whose answers are known."""

import json
import re

import pytest

from mosaics.evaluation import InContextLearning, Scorer, evaluate
from mosaics.evaluation.in_context_learning import READERS, STRATEGIES, CountedWords

FORMAT = "The predict answer must come from the demonstration examples with the exact format."


@pytest.fixture(scope="module")
def banking(tmp_path_factory):
    """Three intents of two demonstrations each; a quoted text has a newline."""
    folder = tmp_path_factory.mktemp("icl")
    texts = {"lost_card": ["My card is gone", '"Where is\nmy card?"'], "fee": ["Why a fee?", "A fee again"]}
    texts["top_up"] = ["Add money", "How to top up"]
    lines = [f"{text},{label}" for label, both in texts.items() for text in both]
    (folder / "train.csv").write_text("text,category\n" + "\n".join(lines) + "\n")
    (folder / "test.csv").write_text(
        "text,category\nI lost my card,lost_card\nWhat is this fee?,fee\nTop me up,top_up\n"
    )
    return {"banking77_train": str(folder / "train.csv"), "banking77_test": str(folder / "test.csv")}


def demonstrations(prompt):
    """(text, label) pairs of a synthetic prompt, and the query."""
    found = re.findall(r"text: ([a-z ]+?)\s+class:(?: (\w+))?", prompt)
    return found[:-1], found[-1][0]


def oracle(prompt, example):
    """The label of the demonstration that has most words in common with the query."""
    pairs, query = demonstrations(prompt)
    votes = {}
    for text, label in pairs:
        votes[label] = votes.get(label, 0) + len(set(text.split()) & set(query.split()))
    return max(votes, key=votes.get)


def rows(result, table="best strategy"):
    return result["summary"]["tables"][table]


def test_in_context_learning_of_a_hand_computed_prompt(known, banking):
    suite = InContextLearning(data=banking, shots=(2,), samples=3)
    examples = {example.id: example for example in suite.examples(known(oracle))}
    assert len(examples) == 2 * 4 * 3
    example = examples["banking77/semantic/newline/2/0"]
    head = (
        f"Given a customer service query, please predict the intent of the query. {FORMAT} The examples are as follows:"
    )
    assert example.prefix.startswith(head + "\nservice query: ")
    shown = re.findall(r"service query: (.+)\nintent category: (\w+)", example.prefix)
    assert [label for _, label in shown] == ["fee", "lost_card", "top_up"] * 2  # one of every class in every shot
    assert {"Where is my card?", "My card is gone"} == {text for text, label in shown if label == "lost_card"}
    query = {"lost_card": "I lost my card", "fee": "What is this fee?", "top_up": "Top me up"}[example.references[0]]
    assert example.prompt == f"\nservice query: {query}\nintent category:"
    assert example.choices == [" fee", " lost_card", " top_up"] and example.ending == "\nservice"
    spaced = examples["banking77/semantic/space/2/0"]
    assert (spaced.prefix + spaced.prompt).replace("\n", " ") == spaced.prefix + spaced.prompt
    assert spaced.prefix + spaced.prompt == (example.prefix + example.prompt).replace("\n", " ")


def test_in_context_learning_shuffles_the_classes_within_each_shot(known):
    suite = InContextLearning(shots=(1, 4), samples=1, labels=("semantic",), classes=6)
    orders = {}
    for example in suite.examples(known(oracle)):
        pairs, _ = demonstrations(example.prefix + example.prompt)
        labels = [label for _, label in pairs]
        shots = [labels[i : i + 6] for i in range(0, len(labels), 6)]
        assert all(sorted(shot) == sorted(labels[:6]) and len(set(shot)) == 6 for shot in shots)
        orders[example.meta["strategy"], example.meta["shots"]] = shots
    for separator in ("newline", "space"):
        assert len({tuple(shot) for shot in orders[separator, 4]}) == 1
        assert len({tuple(shot) for shot in orders[f"{separator}-shuffled", 4]}) > 1
        assert orders[f"{separator}-shuffled", 4][0] == orders[f"{separator}-shuffled", 1][0]  # shots are nested


def test_in_context_learning_anonymous_labels_say_nothing_but_are_the_same_task(known, banking):
    suite = InContextLearning(data=banking, shots=(1,), samples=3, strategies=("newline",))
    examples = list(suite.examples(known(oracle)))
    named, anonymous = examples[:3], examples[3:]
    assert anonymous[0].choices == [" class_00", " class_01", " class_02"]
    to = {a.references[0]: b.references[0] for a, b in zip(named, anonymous, strict=True)}
    for a, b in zip(named, anonymous, strict=True):
        assert (
            re.sub(r"category: (\w+)", lambda m: f"category: {to[m[1]]}", a.prefix) == b.prefix and a.prompt == b.prompt
        )
    deals = set()
    for seed in range(8):
        both = list(InContextLearning(**suite.model_dump() | {"seed": seed}).examples(known(oracle)))
        deals.add(tuple(sorted((a.references[0], b.references[0]) for a, b in zip(both[:3], both[3:], strict=True))))
    assert len(deals) > 2


def test_in_context_learning_of_an_oracle_is_100_percent(known):
    suite = InContextLearning(shots=(2, 4), samples=24, noise=0.25)
    result = evaluate(suite, known(oracle))
    assert {row["accuracy"] for row in rows(result)} == {100}
    assert {row["chance"] for row in rows(result)} == {12.5}
    assert len(rows(result, "all strategies")) == 2 * 2 * 4
    generated = evaluate(InContextLearning(**suite.model_dump() | {"scoring": "generation"}), known(oracle))
    assert {row["accuracy"] for row in rows(generated)} == {100}


def test_in_context_learning_of_a_constant_model_scores_its_base_rate(known):
    suite = InContextLearning(shots=(1, 2), samples=24, classes=4, labels=("anonymous",))
    result = evaluate(suite, known(lambda prompt, example: "class_02"))
    assert {row["accuracy"] for row in rows(result)} == {25}
    assert all(row["low"] < 25 < row["high"] for row in rows(result))


def test_in_context_learning_of_a_recency_biased_model_shows_in_the_order_of_the_classes(known):
    """It says the last label before the query: right for the last class only, unless the classes are shuffled."""

    def last(prompt, example):
        return demonstrations(prompt)[0][-1][1]

    suite = InContextLearning(shots=(1,), samples=16, classes=4)
    result = evaluate(suite, known(last))
    assert {row["accuracy"] for row in rows(result, "all strategies")} == {25}
    said = {}
    for example in result["examples"]:
        said.setdefault(example["meta"]["strategy"], set()).add(example["prediction"])
    assert all(len(predictions) == 2 for predictions in said.values())  # one for each kind of labels


def test_in_context_learning_best_strategy_is_reported_beside_all(known):
    suite = InContextLearning(shots=(2,), samples=20, labels=("semantic",), noise=0.0)
    result = evaluate(suite, known(lambda p, e: oracle(p, e) if e.meta["strategy"] == "space" else "?"))
    [best] = rows(result)
    assert best["strategy"] == "space" and best["accuracy"] == 100
    assert [row["accuracy"] for row in rows(result, "all strategies") if row["strategy"] != "space"] < [100] * 3


def test_in_context_learning_depends_on_the_seed_alone(known):
    texts = [
        [e.prefix + e.prompt for e in InContextLearning(shots=(1,), samples=2, seed=s).examples(known(oracle))]
        for s in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    first, other = (set(" ".join(text[::9]).split()) for text in (texts[0], texts[2]))
    assert len(first & other) < 0.5 * len(first)  # other words, not the same ones in another order


def test_in_context_learning_in_any_batch_is_the_same_and_passes_the_demonstrations_once(tokenizer, scorer):
    suite = InContextLearning(shots=(2,), samples=6, classes=3, strategies=("newline", "space-shuffled"))
    passed = 0

    def count(module, args, kwargs):
        nonlocal passed
        passed += kwargs["input_ids"].shape[1]

    hook = scorer.model.register_forward_pre_hook(count, with_kwargs=True)
    one = evaluate(suite, Scorer(scorer.model, tokenizer, batch_size=1))["examples"]
    hook.remove()
    assert one == evaluate(suite, Scorer(scorer.model, tokenizer, batch_size=7))["examples"]
    examples = list(suite.examples(scorer))
    prefixes = {example.prefix for example in examples}
    rest = sum(scorer.count(e.prompt + choice + e.ending) for e in examples for choice in e.choices)
    assert passed <= sum(map(scorer.count, prefixes)) + rest


def test_in_context_learning_reads_relations(known, tmp_path):
    instance = {
        "tokens": "Ann lives in New York .".split(),
        "h": ["ann", "Q1", [[0]]],
        "t": ["new york", "Q2", [[3, 4]]],
    }
    other = {"tokens": "Bob owns Acme .".split(), "h": ["bob", "Q3", [[0]]], "t": ["acme", "Q4", [[2]]]}
    (tmp_path / "fewrel.json").write_text(json.dumps({"P1": [instance] * 5, "P2": [other] * 5}))
    (tmp_path / "names.json").write_text(json.dumps({"P1": ["residence", ""], "P2": ["owner of", ""]}))
    data = {"fewrel": str(tmp_path / "fewrel.json"), "fewrel_names": str(tmp_path / "names.json")}
    suite = InContextLearning(data=data, shots=(4,), samples=9, labels=("semantic",), strategies=("newline",))
    examples = list(suite.examples(known(oracle)))
    assert sorted(e.references[0] for e in examples) == ["owner of", "residence"]
    shown = "sentence: Ann lives in New York .\nthe relation between Ann and New York is: residence\n"
    assert examples[0].prefix.count(shown) == 4 or (examples[0].prefix + "\n").count(shown) == 4
    record = {"token": "Ann lives in New York .".split(), "relation": "per:cities_of_residence"}
    record |= {"subj_start": 0, "subj_end": 0, "obj_start": 3, "obj_end": 4}
    (tmp_path / "tacred.json").write_text(json.dumps([record, record | {"relation": "no_relation"}]))
    train, test = READERS["tacred"][1](dict.fromkeys(READERS["tacred"][0], str(tmp_path / "tacred.json")), None)
    assert len(train) == len(test) == 1 and train[0].between == "the relation between Ann and New York is:"


def test_counted_words_by_hand():
    counted = CountedWords({"fruit": ["red apple", "Red plum"], "car": ["fast red car", "a car"]})
    # There are 6 words, and one for all others; fruit has 4 + 7 counts and car 5 + 7.
    assert counted.answers("apple") == {"naive Bayes": "fruit", "nearest text": "fruit"}  # 2/11 against 1/12
    assert counted.answers("red") == {"naive Bayes": "fruit", "nearest text": "fruit"}  # 3/11 against 2/12
    assert counted.answers("car red") == {"naive Bayes": "car", "nearest text": "car"}  # 6/144 against 3/121
    assert counted.answers("unheard of") == {"naive Bayes": "fruit", "nearest text": "fruit"}  # 1/121 against 1/144
    nearest = CountedWords({"a": ["x", "x x y y y y y y"], "b": ["x y"]}).answers("x y")["nearest text"]
    assert nearest == "b"  # not the one with most in common
    weighed = CountedWords({"a": ["x x y"], "b": ["y z w v"]})
    assert weighed.answers("x z z")["naive Bayes"] == "a"  # 3/729 against 4/1000
    assert CountedWords({"a": ["q"], "b": ["y y y y r s t u"]}).answers("r")["naive Bayes"] == "b"  # 1/8 against 2/15


def test_in_context_learning_shows_what_counting_reaches(known):
    suite = InContextLearning(shots=(1, 8), samples=40, noise=0.5, strategies=STRATEGIES[:2], labels=("anonymous",))
    found = rows(evaluate(suite, known(lambda prompt, example: example.choices[0].strip())))
    few, many = found
    assert many["naive Bayes"] > 95 and few["naive Bayes"] < many["naive Bayes"]
    assert min(few["nearest text"], many["nearest text"]) > 50 > max(few["accuracy"], many["accuracy"])


def test_in_context_learning_reads_stories(known, tmp_path):
    lines = [
        "1 Ann ran to the hall.",
        "2 Bo slept.",
        "3 Where is Ann? \thall\t1",
        "4 Bo left.",
        "5 Where is Bo?\tout\t4",
    ]
    (tmp_path / "babi").write_text("\n".join([*lines, "1 Cy sat.", "2 Where is Cy?\tin\t1"]) + "\n")
    data = dict.fromkeys(READERS["babi"][0], str(tmp_path / "babi"))
    train, test = READERS["babi"][1](data, None)
    assert [(item.text, item.label) for item in train] == [
        ("Ann ran to the hall. Bo slept. Where is Ann?", "hall"),
        ("Ann ran to the hall. Bo slept. Bo left. Where is Bo?", "out"),
        ("Cy sat. Where is Cy?", "in"),
    ]
    examples = list(
        InContextLearning(data=data, shots=(1,), samples=1, strategies=STRATEGIES[:1]).examples(known(oracle))
    )
    assert examples[0].prefix.endswith("out") and "\nstory: Cy sat. Where is Cy?\nanswer: in\n" in examples[0].prefix
    (tmp_path / "babi").write_text("Ann ran.\n")
    with pytest.raises(ValueError, match="does not begin with a number"):
        READERS["babi"][1](data, None)


def test_in_context_learning_reads_the_real_files(known, shared):
    icl = shared / "data/icl"
    data = {"banking77_train": "banking77_train.csv.gz", "banking77_test": "banking77_test.csv.gz"}
    data |= {"goemotions_train": "goemotions_train.tsv.gz", "goemotions_test": "goemotions_test.tsv.gz"}
    data |= {"goemotions_labels": "goemotions_labels.txt", "fewrel": "fewrel_val_wiki.json.gz"}
    data = {name: str(icl / file) for name, file in data.items()} | {
        "fewrel_names": str(icl / "fewrel_pid2name.json.gz")
    }
    suite = InContextLearning(data=data, shots=(2,), samples=2, strategies=STRATEGIES[:1])
    examples = list(suite.examples(known(oracle)))
    assert {(e.meta["task"], e.meta["classes"]) for e in examples} == {
        ("banking77", 77),
        ("goemotions", 28),
        ("fewrel", 16),
    }
    assert len(examples) == 3 * 2 * 2
    import random

    sizes = [tuple(map(len, READERS[task][1](data, random.Random(0)))) for task in ("banking77", "goemotions")]
    assert sizes == [(10003, 3080), (36308, 4590)]


def test_in_context_learning_refuses_what_it_cannot_build(known, banking):
    with pytest.raises(ValueError, match="has 2 demonstrations and 3 shots need as many"):
        list(InContextLearning(data=banking, shots=(1, 3)).examples(known(oracle)))
    with pytest.raises(ValueError, match="needs --data fewrel=PATH"):
        InContextLearning(tasks=("fewrel",)).examples(known(oracle))
    for options in ({"tasks": ("bank",)}, {"data": {"bank": "x"}}, {"labels": ("none",)}, {"strategies": ("tab",)}):
        with pytest.raises(ValueError):
            InContextLearning(**options)
