"""What the studies ask, asked of models whose answers are known."""

import pytest
import torch
from tests.helpers import tiny_model

from mosaics.data.regbench import LETTERS, SEPARATOR, SYMBOLS, open_regbench, regbench_tokenizer
from mosaics.data.worlds import World, world_tokenizer
from mosaics.evaluation import Scorer, evaluate
from mosaics.experiments.questions import AttentionByDistance, RegBenchQuestions, WorldQuestions
from mosaics.memories import Read


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


@pytest.mark.parametrize("settings", [{}, {"words": 3}])
def test_world_questions_are_the_same_for_all_shots(settings):
    suite = WorldQuestions(task="in-context-learning", shots=(1, 4), samples=8, settings=settings)
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
    suite = WorldQuestions(task="new-knowledge", lengths=(256,), samples=4, settings={"facts": 1})
    for example in suite.examples(None):
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

            even = torch.full((1, 2, time, time), 1 / time)
            learned = torch.rand(1, 2, time, 7)  # of pairs that are no positions: not looked at

            def read(weights, memory, layer, **more):
                return Read(memory, layer, lambda positions: (weights[:, :, positions], 0), weights.shape[3], **more)

            return [read(even, "a", 0), read(learned, "b", 0, contextual=False), read(even, "a", 1)]

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


class KnownSymbols:
    """Stands in for a scorer: expects what a function of (number of the test automaton, ids, position) expects."""

    def __init__(self, expects):
        self.expects = expects
        self.numbers = {tuple(open_regbench().sequence("test", n)): n for n in range(8)}

    def next_logprobs(self, ids, positions):
        number = self.numbers[tuple(ids)]
        return torch.tensor([self.expects(number, ids, position) for position in positions]).log()


def possible(number, ids, position):
    """The automaton's own distribution after a position, worked out letter by letter."""
    edges, state = open_regbench().automaton("test", number).edges, 0
    for symbol in ids[: position + 1]:
        state = 0 if symbol == SEPARATOR else dict(edges[state])[symbol]
    letters = [letter for letter, _ in edges[state]]
    return [letters.count(symbol) / len(letters) for symbol in range(len(SYMBOLS))]


def regbench(expects, samples=4):
    return evaluate(RegBenchQuestions(automata=7, samples=samples), KnownSymbols(expects))["summary"]["tables"]


def test_regbench_questions_give_the_automaton_itself_all():
    (row,) = regbench(possible)["all"]
    letters = sum(int((open_regbench().sequence("test", n)[1:] < LETTERS).sum()) for n in range(4))
    assert row["automata"] == 7 and row["positions"] == letters
    assert row["accuracy"] == 100 and row["total variation"] == pytest.approx(0, abs=1e-7)


def test_regbench_questions_of_what_expects_all_symbols_alike():
    # With m possible letters of 20 symbols: m (1/m - 1/20) / 2 + (20 - m) / 20 / 2 = 1 - m / 20.
    found = regbench(lambda *_: [1 / 20] * 20)["all"][0]["total variation"]
    counts = [
        len(letters)
        for n in range(4)
        for _, letters in open_regbench().automaton("test", n).allowed(open_regbench().sequence("test", n))
    ]
    assert found == pytest.approx(1 - sum(counts) / len(counts) / 20, abs=1e-6)


def test_regbench_questions_want_the_likeliest_symbol_to_be_possible():
    def half(number, ids, position):
        """All possible letters, but a separator is likelier wherever the position is odd."""
        chances = [0.4 * chance for chance in possible(number, ids, position)]
        chances[SEPARATOR if position % 2 else next(s for s, chance in enumerate(chances) if chance)] += 0.6
        return chances

    positions = [p for n in range(4) for p, _ in counted(n)]
    (row,) = regbench(half)["all"]
    assert row["accuracy"] == pytest.approx(100 * sum(p % 2 == 0 for p in positions) / len(positions))


def test_regbench_questions_tell_how_many_words_came_before():
    """What knows nothing before the third word, and all from there on."""

    def late(number, ids, position):
        known = ids[: position + 1].count(SEPARATOR) >= 2
        return possible(number, ids, position) if known else [0.0] * 19 + [1.0]

    rows = {row["words before"]: row for row in regbench(late)["by words before"]}
    assert [rows[n]["accuracy"] for n in range(4)] == [0, 0, 100, 100]
    assert [rows[n]["total variation"] for n in range(4)] == pytest.approx([1, 1, 0, 0], abs=1e-6)
    assert sum(row["positions"] for row in rows.values()) == sum(len(list(counted(n))) for n in range(4))


def counted(number):
    return open_regbench().automaton("test", number).allowed(open_regbench().sequence("test", number))


def test_regbench_questions_ask_a_model_for_what_comes_next():
    tokenizer = regbench_tokenizer()
    model = tiny_model(torch.float32, vocab_size=len(tokenizer))
    found = evaluate(RegBenchQuestions(automata=7, samples=1), Scorer(model, tokenizer))["summary"]["tables"]["all"]
    ids = open_regbench().sequence("test", 0).tolist()
    chances = model(torch.tensor([ids])).logits[0].softmax(-1).detach()
    errors = [
        0.5 * sum(abs(float(chances[p, s]) - (s in letters) / len(letters)) for s in range(20))
        for p, letters in counted(0)
    ]
    assert found[0]["total variation"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
