"""Models whose answers are known, and a tiny one whose answers are whatever they are."""

import sysconfig
from pathlib import Path

import pytest
import torch

from helpers import tiny_model
from mosaics.data import train_tokenizer
from mosaics.evaluation import Scorer


def stdlib_text(*names: str) -> str:
    return "".join((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text() for name in names)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([stdlib_text("bisect", "heapq", "textwrap", "contextlib")], 700)


@pytest.fixture(scope="session")
def scorer(tokenizer) -> Scorer:
    """A tiny random mosaic with a training length of 32."""
    return Scorer(tiny(tokenizer), tokenizer)


def tiny(tokenizer, **options):
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tiny_model(torch.float32, vocab_size=len(tokenizer), max_position_embeddings=32, **ids, **options)


class Known(Scorer):
    """Answers like a scorer whose model says what a function of the prompt says.

    Args:
        says: from (prompt text, example) to the answer; or, for `next_logprobs`, from the ids so far to the next one.
    """

    def __init__(self, tokenizer, says, training_length: int = 32):
        self.tokenizer, self.says, self._length = tokenizer, says, training_length
        self._begin, self.limit, self.asked = [tokenizer.bos_token_id], None, []

    training_length = property(lambda self: self._length)

    def fingerprint(self) -> str:
        return "known"

    def complete(self, examples, max_new_tokens, stop=()):
        self.asked += examples
        return [self.says(e.prefix + e.prompt, e) for e in examples]

    def choose(self, examples):
        self.asked += examples
        said = [self.says(e.prefix + e.prompt, e) for e in examples]
        return [[0.0 if c.strip() == s else -1.0 for c in e.choices] for e, s in zip(examples, said, strict=True)]

    def best(self, examples):
        scored = zip(examples, self.choose(examples), strict=True)
        return [example.choices[scores.index(max(scores))] for example, scores in scored]

    def choice_scores(self, examples):
        return [[[score] for score in scores] for scores in self.choose(examples)]

    def next_logprobs(self, ids, positions):
        scores = torch.full((len(positions), len(self.tokenizer)), -9.0)
        for line, position in enumerate(positions):
            scores[line, self.says(ids[: position + 1])] = 0.0
        return scores

    def token_nats(self, rows):
        return [torch.tensor([self.says(row[: i + 1]) for i in range(len(row) - 1)]) for row in rows]


@pytest.fixture
def known(tokenizer):
    """Makes a model that says what a function says."""
    return lambda says, **options: Known(tokenizer, says, **options)
