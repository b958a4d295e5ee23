"""Synthetic worlds with three separable kinds of knowledge, and recall."""

from mosaics.data.worlds.baselines import LastWords, NearestExamples, WordCounts, baseline_accuracies, predictors
from mosaics.data.worlds.documents import open_world
from mosaics.data.worlds.stream import WorldStream
from mosaics.data.worlds.vocabulary import world_tokenizer
from mosaics.data.worlds.world import MIXED, TASKS, Episode, Question, World, WorldExample

__all__ = [
    "MIXED",
    "TASKS",
    "Episode",
    "LastWords",
    "NearestExamples",
    "Question",
    "WordCounts",
    "World",
    "WorldExample",
    "WorldStream",
    "baseline_accuracies",
    "open_world",
    "predictors",
    "world_tokenizer",
]
