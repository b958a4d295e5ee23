"""Classes with names that mean something: the classification episodes of the worlds, with each label replaced by the
most frequent word of its class (Figure 3; the worlds' own labels are anonymous, as in Figure 4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from mosaics.data.worlds import WorldStream
from mosaics.data.worlds.vocabulary import LABELS, WORD_IDS
from mosaics.data.worlds.world import EXAMPLE_WORDS

_LABEL_IDS = frozenset(WORD_IDS[label] for label in LABELS)


def names_of_classes(words: Sequence, labels: frozenset = frozenset(LABELS)) -> dict:
    """A word for each label: the most frequent one of its examples that names no other class.

    Args:
        words: of an episode, or their ids; an example is 8 words, "means" and its label.
        labels: what of that is a label.
    """
    counts: dict = {}
    for place, word in enumerate(words):
        if word in labels:
            counts.setdefault(word, Counter()).update(words[max(0, place - 1 - EXAMPLE_WORDS) : place - 1])
    names: dict = {}
    for label, found in counts.items():
        free = (word for word, _ in found.most_common() if word not in names.values())
        names[label] = next(free, label)
    return names


class NamedClasses(WorldStream):
    """The rows of the world `in-context-learning` with names for labels."""

    def batch(self, first_sequence: int, count: int) -> dict[str, torch.Tensor | None]:
        rows = super().batch(first_sequence, count)
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            for label, name in names_of_classes(ids.tolist(), _LABEL_IDS).items():
                here = ids == label
                ids[here] = name
                labels[here & (labels != -100)] = name
        return rows
