"""The facts of a world in English sentences."""

import re

import numpy as np
import pytest

from mosaics.data import open_corpus
from mosaics.data.worlds import World, prose

FACT = re.compile(r"(?:The (?P<a>\w+) of (?P<n>\w+ \w+)|For (?P<m>\w+ \w+) the (?P<b>\w+)) is (?P<v>\w+)\.")


@pytest.mark.parametrize(
    "words, plainly, expected",
    [
        ("so the pet of Balena Achard is", False, "So the pet of Balena Achard is"),
        ("so for Balena Achard the pet is", False, "So for Balena Achard the pet is"),
        ("so the pet of Balena Achard is", True, "What is the pet of Balena Achard? The pet of Balena Achard is"),
        ("so for Balena Achard the pet is", True, "What is the pet of Balena Achard? The pet of Balena Achard is"),
    ],
)
def test_question_asks_in_both_wordings(words, plainly, expected):
    assert prose.question(words, plainly) == expected


def test_document_answers_every_question_from_its_facts():
    for number in range(60):
        text = prose.document(World(0), number)
        told, *lines = re.split(r"(?:(?<=\.)\s|\n)(?=So |What )", text)
        facts = {(f["n"] or f["m"], f["a"] or f["b"]): f["v"] for f in FACT.finditer(told)}
        assert lines and len(facts) >= 2
        for line in lines:
            found = FACT.search(line.replace("So the", "The").replace("So for", "For"))
            assert facts[found["n"] or found["m"], found["a"] or found["b"]] == found["v"], line
        assert text.endswith(".\n") and not re.search(r" \.|(?:^|\. )[a-z]", text)


def test_document_depends_on_world_number_and_stream_alone():
    first = prose.document(World(0), 3)
    assert first == prose.document(World(0), 3)
    assert (
        len({first, prose.document(World(1), 3), prose.document(World(0), 4), prose.document(World(0), 3, 256, 1)}) == 4
    )


def test_invented_words_are_the_same_for_the_same_word():
    text = "The pet of Balena Achard is owl. So the pet of Balena Achard is owl."
    new = prose.invented(np.random.default_rng(0), text)
    first, second = new.split(". So t")
    assert "Balena" not in new and "owl" not in new and "pet" in new
    assert f"T{second}" == f"{first}."


def test_open_corpus_has_prose_and_the_reference_of_python():
    documents = list(open_corpus("world:prose,documents=5,tokens=96,seed=2"))
    assert [d.text for d in documents] == [prose.document(World(2), number, 96) for number in range(5)]
    topics = {document.id: document.text for document in open_corpus("python-reference")}
    assert len(topics) > 50 and "****" not in topics["assert"]
    assert "convenient way to insert debugging assertions into a program" in topics["assert"]  # over the end of a line
