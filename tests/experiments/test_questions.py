"""What the studies ask, asked of models whose answers are known."""

import torch
from tests.helpers import tiny_model

from mosaics.data.worlds import World, world_tokenizer
from mosaics.evaluation import Scorer, evaluate
from mosaics.experiments.questions import AttentionByDistance, WorldQuestions


class Known:
    """Stands in for a scorer: says what a function of the prompt says."""

    def __init__(self, says):
        self.says = says

    def complete(self, examples, max_new_tokens):
        assert max_new_tokens == 1
        return [self.says(example) for example in examples]


def test_world_questions_give_the_oracle_100_percent_at_every_point():
    for points in ({"task": "recall", "lengths": (64, 512)}, {"task": "in-context-learning", "shots": (1, 4)}):
        found = evaluate(WorldQuestions(samples=16, **points), Known(lambda e: e.references[0]))
        rows = found["summary"]["tables"]["by x"]
        assert [(row["accuracy"], row["examples"]) for row in rows] == [(100.0, 16)] * 2


def test_world_questions_are_those_of_the_test_split():
    suite = WorldQuestions(task="new-knowledge", lengths=(256,), samples=8)
    asked = suite.examples(None)
    expected = list(World(0).examples("new-knowledge", 8, 256, questions=8))
    assert [(e.prefix + e.prompt, e.references) for e in asked] == [(e.prompt, [e.answer]) for e in expected]


def test_world_questions_are_the_same_for_all_shots():
    suite = WorldQuestions(task="in-context-learning", shots=(1, 4), samples=8)
    few, many = (suite.examples(None)[i : i + 8] for i in (0, 8))
    for one, four in zip(few, many, strict=True):
        assert (one.prompt, one.references) == (four.prompt, four.references) and one.id != four.id
        assert four.prefix.startswith(one.prefix)
        for shots, words in ((1, one.prefix.split()), (4, four.prefix.split())):
            labels = [word for word in words if word.startswith("class_")]
            assert len(set(labels)) == 8 and all(labels.count(label) == shots for label in labels)
            assert (
                words[len(words) + len(one.prompt.split()) - (one if shots == 1 else four).meta["distance"]] in labels
            )


def test_world_questions_can_hold_the_number_of_facts():
    for example in WorldQuestions(task="new-knowledge", lengths=(256,), samples=4, facts=1).examples(None):
        assert example.prefix.count(example.references[0]) == 1
        assert example.id.endswith("256-1") or "256-1" in example.id


def test_world_questions_score_what_the_model_writes_next():
    tokenizer = world_tokenizer()
    model = tiny_model(torch.float32, vocab_size=len(tokenizer))
    suite = WorldQuestions(task="recall", lengths=(64,), samples=4)
    found = evaluate(suite, Scorer(model, tokenizer))
    for example, record in zip(suite.examples(None), found["examples"], strict=True):
        ids = tokenizer(example.prefix + example.prompt, return_tensors="pt").input_ids
        expected = tokenizer.decode(model(ids).logits[0, -1].argmax())
        assert record["prediction"] == expected and record["score"] == (expected == example.references[0])


def test_attention_by_distance_of_even_weights_is_one(tmp_path):
    class Even:
        device = torch.device("cpu")

        def read_weights(self, ids):
            time = ids.shape[1]

            class Read:
                weights = torch.full((1, 2, time, time), 1 / time)

            return [Read, Read]

    class Looker:
        model, start_id, training_length = Even(), 0, 64

        def encode(self, text, begin):
            return list(text.encode())

        def decode(self, ids):
            return bytes(ids).decode()

    (tmp_path / "a.txt").write_text("x" * 100)
    suite = AttentionByDistance(data=str(tmp_path), bins=4)
    rows = evaluate(suite, Looker())["summary"]["tables"]["by distance"]
    assert len(rows) == 4 and all(abs(row["score"] - 1) < 1e-6 for row in rows)
