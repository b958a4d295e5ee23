"""Synthetic worlds with three separable kinds of knowledge, and recall."""

from mosaics.data.worlds.baselines import LastWords, WordCounts, baseline_accuracies
from mosaics.data.worlds.documents import open_world
from mosaics.data.worlds.stream import WorldStream
from mosaics.data.worlds.vocabulary import world_tokenizer
from mosaics.data.worlds.world import MIXED, TASKS, Episode, Question, World, WorldExample

__all__ = [
    "MIXED",
    "TASKS",
    "Episode",
    "LastWords",
    "Question",
    "WordCounts",
    "World",
    "WorldExample",
    "WorldStream",
    "baseline_accuracies",
    "open_world",
    "world_tokenizer",
]
