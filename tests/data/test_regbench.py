"""RegBench: minimal automata, no two of them alike; sequences of their words; rows in which only letters count."""

import numpy as np
import pytest
import torch

from mosaics.data.regbench import (
    HELD_OUT,
    LETTERS,
    PADDING,
    SEPARATOR,
    SYMBOLS,
    Automaton,
    RegBench,
    RegBenchStream,
    open_regbench,
    regbench_tokenizer,
)
from mosaics.models import count_targets

A, B, C = range(3)


def words(sequence):
    """The words between separators."""
    return [word.split() for word in " ".join(map(str, sequence)).split(str(SEPARATOR))]


def test_automaton_is_minimal_and_trimmed():
    # 1 and 2 allow the same words, and 4 with them once those are one; 3 is never reached.
    drawn = [{A: 1, B: 2}, {C: 0}, {C: 4}, {A: 0}, {B: 1, A: 2}]
    assert Automaton.of(drawn).edges == (((A, 1), (B, 1)), ((C, 0),))
    # The same letters, but not the same words: three states stay.
    assert len(Automaton.of([{A: 1, B: 2}, {C: 0}, {C: 1}]).edges) == 3


def test_automata_of_one_language_are_equal():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = Automaton.draw(rng)
        states = len(one.edges)
        # Other numbers for the states but the first, and a twin of the last state, reached from the first one.
        new = np.concatenate([[0], 1 + rng.permutation(states - 1)])
        renamed = [{}] * states
        for state, edges in enumerate(one.edges):
            renamed[new[state]] = {letter: int(new[to]) for letter, to in reversed(edges)}
        twin = [*renamed, dict(renamed[-1])]
        twin[0] = {letter: states if to == states - 1 else to for letter, to in twin[0].items()}
        assert Automaton.of(twin) == one and hash(Automaton.of(twin)) == hash(one)


def test_automata_are_as_the_benchmark_says():
    rng = np.random.default_rng(1)
    drawn = [Automaton.draw(rng) for _ in range(300)]
    assert {len(state) for one in drawn for state in one.edges} == {1, 2, 3}
    assert max(len(one.edges) for one in drawn) == 12
    assert {letter for one in drawn for state in one.edges for letter, _ in state} == set(range(LETTERS))


def test_sequences_are_words_of_their_automaton():
    bench = RegBench(3)
    counts, lengths = set(), set()
    for number in range(60):
        one, found = bench.automaton("train", number), bench.sequence("train", number)
        counts.add(len(words(found)))
        for word in words(found):
            lengths.add(len(word))
            state = 0
            for letter in word:
                state = dict(one.edges[state])[int(letter)]
    assert min(counts) == 10 and max(counts) == 19
    assert min(lengths) == 1 and max(lengths) == 49


def test_allowed_letters_start_anew_with_every_word():
    one = Automaton.of([{A: 1}, {B: 0, C: 2}, {A: 0}])
    found = list(one.allowed([A, C, SEPARATOR, A, B, A, PADDING]))
    assert found == [(0, [B, C]), (2, [A]), (3, [B, C]), (4, [A])]  # not what stands before a separator or padding


def test_regbench_has_no_automaton_twice():
    bench = RegBench()
    found = [bench.automaton("train", n) for n in range(800)]
    held = [bench.automaton(split, n) for split in ("validation", "test") for n in range(HELD_OUT)]
    assert len({*found, *held}) == 800 + 2 * HELD_OUT
    drawn = np.random.default_rng([0, 0])
    assert len({Automaton.draw(drawn) for _ in range(1300)}) < 1300  # so that there was something to leave out


def test_regbench_does_not_depend_on_what_was_asked_before():
    many, few = RegBench(), RegBench()
    many.automaton("train", 100)
    for split, number in (("test", 7), ("validation", 7), ("train", 7)):
        assert many.automaton(split, number) == few.automaton(split, number)
        assert np.array_equal(many.sequence(split, number), few.sequence(split, number))
    assert not np.array_equal(RegBench(1).sequence("test", 7), few.sequence("test", 7))
    assert not np.array_equal(few.sequence("validation", 7), few.sequence("test", 7))


@pytest.mark.parametrize(("split", "number"), [("dev", 0), ("test", HELD_OUT), ("train", -1)])
def test_regbench_refuses_what_it_does_not_have(split, number):
    with pytest.raises(ValueError, match="there is no automaton"):
        RegBench().sequence(split, number)
    with pytest.raises(ValueError, match="take 1 or more"):
        RegBenchStream(0, 64)


def test_every_pass_of_a_stream_has_all_sequences_whole():
    stream = RegBenchStream(20, 1024)
    size = len(stream.rows)
    expected = {tuple(open_regbench().sequence("train", n)) for n in range(20)}
    passes = [stream.batch(turn * size, size) for turn in range(2)]
    for rows in passes:
        found = []
        for ids, documents, mask in zip(rows["input_ids"], rows["document_ids"], rows["attention_mask"], strict=True):
            found += [tuple(ids[mask & (documents == n)].tolist()) for n in range(int(documents.max()) + 1)]
        assert len(found) == 20 and set(found) == expected
    assert not torch.equal(passes[0]["input_ids"], passes[1]["input_ids"])
    assert size < 12  # some to a row


def test_stream_counts_letters_only():
    rows = RegBenchStream(20, 1024).batch(0, 8)
    ids, labels = rows["input_ids"], rows["labels"]
    assert set(ids[labels == -100].unique().tolist()) == {SEPARATOR, PADDING}
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    letters = sum(int((one < LETTERS).sum()) - 1 for row in _rows(20, 8) for one in row)  # nothing is before the first
    assert int(count_targets(labels, rows["attention_mask"], rows["document_ids"])) == letters


def _rows(automata, count):
    stream = RegBenchStream(automata, 1024)
    order = np.random.default_rng([0, 0]).permutation(len(stream.rows))
    return [stream.rows[at] for at in order[:count]]


def test_stream_is_addressed_by_row():
    stream = RegBenchStream(10, 1024)
    whole, part = stream.batch(0, 12), stream.batch(8, 4)
    assert all(torch.equal(whole[key][8:], part[key]) for key in whole)
    other = RegBenchStream(10, 1024, seed=1).batch(0, 12)["input_ids"]
    assert not torch.equal(whole["input_ids"], other)


def test_stream_cuts_what_is_longer_than_a_row():
    rows = RegBenchStream(5, 64).batch(0, 5)
    starts = {tuple(open_regbench().sequence("train", n)[:64]) for n in range(5)}
    assert {tuple(row[mask].tolist()) for row, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)} == (
        starts
    )


def test_tokenizer_knows_every_symbol():
    tokenizer = regbench_tokenizer()
    assert tokenizer(SYMBOLS).input_ids == list(range(len(SYMBOLS))) == list(range(RegBenchStream.vocab_size))
    assert tokenizer.pad_token_id == PADDING
