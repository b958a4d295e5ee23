"""What a model can do: one file for each dimension, asked through one `Scorer`, written down answer by answer."""

from mosaics.evaluation.example import Example, Record
from mosaics.evaluation.harness import LmEval
from mosaics.evaluation.in_context_learning import InContextLearning
from mosaics.evaluation.new_knowledge import NewKnowledge
from mosaics.evaluation.perplexity import Perplexity
from mosaics.evaluation.persistent_knowledge import PersistentKnowledge
from mosaics.evaluation.recall import Recall
from mosaics.evaluation.results import Suite, evaluate
from mosaics.evaluation.scorer import Scorer

SUITES: dict[str, type[Suite]] = {
    suite.name: suite for suite in (PersistentKnowledge, NewKnowledge, InContextLearning, Recall, Perplexity, LmEval)
}

__all__ = [
    "SUITES",
    "Example",
    "InContextLearning",
    "LmEval",
    "NewKnowledge",
    "Perplexity",
    "PersistentKnowledge",
    "Recall",
    "Record",
    "Scorer",
    "Suite",
    "evaluate",
]
