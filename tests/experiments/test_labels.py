"""Labels that mean something are words of their classes."""

import torch

from mosaics.data.worlds import World, WorldStream
from mosaics.experiments.labels import NamedClasses, names_of_classes
from mosaics.experiments.questions import WorldQuestions


def test_names_of_classes_are_their_most_frequent_words():
    example = "balix balix balix bamup bamup bazet bazet borond means".split()
    words = [*example, "class_01", ".", *example, "class_02", "."]
    assert names_of_classes(words) == {"class_01": "balix", "class_02": "bamup"}


def test_named_classes_replace_every_label_and_nothing_else():
    plain, named = (kind(World(0), "in-context-learning", 256).batch(3, 4) for kind in (WorldStream, NamedClasses))
    answers = plain["answers"]
    assert answers.any() and torch.equal(answers, named["answers"])
    assert torch.equal(plain["input_ids"][~answers], named["input_ids"][~answers])
    assert (plain["input_ids"] != named["input_ids"])[answers].all()
    assert torch.equal(named["labels"], named["input_ids"])
    for before, after in zip(plain["input_ids"][0][answers[0]], named["input_ids"][0][answers[0]], strict=True):
        same = plain["input_ids"][0][answers[0]] == before
        assert (named["input_ids"][0][answers[0]][same] == after).all()


def test_world_questions_can_name_classes():
    settings = {"task": "in-context-learning", "shots": (2,), "samples": 8}
    plain, named = (WorldQuestions(named_classes=n, **settings).examples(None) for n in (False, True))
    for a, b in zip(plain, named, strict=True):
        assert a.references[0].startswith("class_") and b.references[0] in a.prefix.split()
        assert "class_" not in b.prefix and b.prefix.split().count(b.references[0]) >= 2 and a.prompt == b.prompt
