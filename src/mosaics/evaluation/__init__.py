"""What a model can do: one file for each dimension, asked through one `Scorer`, written down answer by answer."""

from mosaics.evaluation.example import Example, Record
from mosaics.evaluation.perplexity import Perplexity
from mosaics.evaluation.recall import Recall
from mosaics.evaluation.results import Suite, evaluate
from mosaics.evaluation.scorer import Scorer

SUITES: dict[str, type[Suite]] = {suite.name: suite for suite in (Recall, Perplexity)}

__all__ = ["SUITES", "Example", "Perplexity", "Recall", "Record", "Scorer", "Suite", "evaluate"]
