"""Recall: rows without accidental keys, and models whose recall is known."""

import math

import pytest

from mosaics.evaluation import Example, Recall, Scorer, evaluate

SUITE = Recall(lengths=(64, 128), pairs=(4, 8), samples=4, seed=3)


def oracle(ids):
    """What followed the last token when it stood there before."""
    return next((ids[i + 1] for i in range(len(ids) - 2, -1, -1) if ids[i] == ids[-1]), 0)


def by_hand():
    """The hand-computed row: keys 5, 6 with values 15, 16, and fillers 20, 21."""
    ids = [0, 5, 15, 6, 16, 20, 6, 16, 21, 5, 15]
    return ids, [(6, 3, 16), (9, 8, 15)]  # position of the key, distance to its pair, value


def test_recall_rows_have_no_accidental_keys(known):
    for example in SUITE.examples(known(oracle)):
        ids, pairs = example.prompt, example.meta["pairs"]
        assert len(ids) == example.meta["length"]
        keys, values = ids[1 : 2 * pairs : 2], ids[2 : 2 * pairs + 1 : 2]
        assert len({*keys, *values}) == 2 * pairs
        assert all(ids.count(token) == 2 for token in keys + values)
        for query in example.meta["queries"]:
            at = query["position"]
            first = ids.index(ids[at])
            assert (first, ids[first + 1]) == (at - query["distance"], query["value"])
            assert ids[at + 1] == query["value"]
        assert len(example.meta["queries"]) == pairs


def test_recall_rows_depend_on_the_seed_alone(known):
    rows = [Recall(**SUITE.model_dump() | {"seed": seed}).examples(known(oracle)) for seed in (3, 3, 4)]
    assert [row.prompt for row in rows[0]] == [row.prompt for row in rows[1]]
    assert all(a.prompt != b.prompt for a, b in zip(rows[0], rows[2], strict=True))


def test_recall_of_a_hand_computed_row(known):
    ids, queries = by_hand()
    meta = {"length": 11, "pairs": 2}
    meta["queries"] = [{"position": p, "distance": d, "value": v} for p, d, v in queries]
    example = Example("hand", ids, [], meta=meta)
    [record] = SUITE.answer(known(oracle), [example])
    assert record.score == 1 and record.prediction == [16, 15]
    [record] = SUITE.answer(known(lambda so_far: 16), [example])  # right for the first query only
    assert record.score == 0.5
    tables = SUITE.summarise([record])["tables"]
    assert [(row["distance up to"], row["accuracy"]) for row in tables["by distance"]] == [(4, 100), (8, 0)]


def test_recall_of_an_oracle_is_100_percent(known):
    tables = evaluate(SUITE, known(oracle))["summary"]["tables"]
    assert all(row["accuracy"] == row["among values"] == 100 for rows in tables.values() for row in rows)


def test_recall_of_a_model_that_knows_only_the_recent_past_falls_with_the_distance(known):
    tables = evaluate(SUITE, known(lambda ids: oracle(ids[-17:])))["summary"]["tables"]
    for row in tables["by distance"]:
        if row["distance up to"] <= 16:
            assert row["accuracy"] == 100
        if row["distance up to"] > 32:
            assert row["accuracy"] == 0


def test_recall_of_a_model_that_takes_the_first_value_scores_its_base_rate(known):
    rows = evaluate(SUITE, known(lambda ids: ids[2]))["summary"]["tables"]["by length"]
    assert all(math.isclose(row["accuracy"], row["chance"]) for row in rows)


def test_recall_in_any_batch_and_chunk_is_the_same(scorer, tokenizer):
    one = evaluate(SUITE, scorer)["examples"]
    other = evaluate(SUITE, Scorer(scorer.model, tokenizer, chunk=7, batch_size=1))["examples"]
    assert one == other


def test_recall_refuses_what_has_no_room(known):
    with pytest.raises(ValueError, match="pairs and their queries need 257 tokens"):
        Recall(lengths=(100,), pairs=(64,)).examples(known(oracle))
    with pytest.raises(ValueError, match="one word each"):
        Recall(lengths=(100000,), pairs=(5000,)).examples(known(oracle))
