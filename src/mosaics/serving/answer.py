"""One answer in the making: draws tokens from logits, turns them into text, and knows when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper

UNDECIDED = "\ufffd"  # stands for bytes that are no whole character, or not yet
LEAST = -9999.0  # in the place of the logarithm of 0, which JSON does not have


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        max_tokens: it ends after so many.
        temperature: logits are divided by it; below 0.000001 the likeliest token is always taken.
        top_p: tokens are drawn from the likeliest that have this probability together.
        seed: of the draws.
        stop: it ends before any of these texts.
        logprobs: how many likeliest tokens are told beside every token, with their log-probabilities; None: not even
            the token's own.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Logprob:
    """A token's text and the natural logarithm of its probability, before temperature and top_p; the likeliest tokens
    beside it; and where its text begins in the answer, in characters."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    offset: int = 0


@dataclass
class Piece:
    """What came since the last piece; `finish_reason` ("stop" or "length") is that of the last one."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[Logprob] = field(default_factory=list)


class Answer:
    """Takes the logits after each token and gives text as soon as it is certain.

    At a temperature of 0 its tokens are those of `generate`, and by a seed those that `generate` draws by it on a CPU.

    Args:
        tokenizer: used by one thread at a time.
        end: tokens that end an answer.
        sampling: how tokens are drawn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: frozenset[int], sampling: Sampling) -> None:
        self.tokenizer, self.end, self.sampling = tokenizer, end, sampling
        self.tokens: list[int] = []
        self.finished = False
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._start = 0  # the first token that the next ones are decoded with
        self._shown = 0  # characters of the text from there on that were given
        self._held = ""  # text that may be the beginning of a stop
        self._length = 0  # characters so far
        self._piece = Piece()

    def take(self, logits: Tensor) -> Piece | None:
        """Draw the next token from logits `(vocabulary,)`; a piece of the answer, when there is text or it ends.

        Raises:
            ValueError: the logits are not finite.
        """
        logits = logits.float()
        if not logits.max().isfinite():
            raise ValueError("the model's logits are not finite; use another model")
        token, piece = self._drawn(logits), self._piece
        self.tokens.append(token)
        piece.tokens += 1
        if self.sampling.logprobs is not None:
            piece.logprobs.append(self._logprob(logits, token))
        ended = token in self.end
        self.finished = ended or len(self.tokens) >= self.sampling.max_tokens
        text, stopped = self._until_stop(self._text(self.tokens[:-1] if ended else self.tokens))
        piece.text += text
        if ended or stopped:
            piece.finish_reason, self.finished = "stop", True
        elif self.finished:
            piece.finish_reason = "length"
        elif not piece.text:
            return None
        self._piece = Piece()
        return piece

    def _drawn(self, logits: Tensor) -> int:
        if self.sampling.temperature < 1e-6:
            return int(logits.argmax())
        scores = TemperatureLogitsWarper(float(self.sampling.temperature))(None, logits[None])
        if self.sampling.top_p < 1:
            scores = TopPLogitsWarper(float(self.sampling.top_p))(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def _logprob(self, logits: Tensor, token: int) -> Logprob:
        logprobs = logits.log_softmax(-1).clamp(min=LEAST)
        values, tokens = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        top = tuple((self.tokenizer.decode([t]), v) for t, v in zip(tokens.tolist(), values.tolist(), strict=True))
        return Logprob(self.tokenizer.decode([token]), logprobs[token].item(), top, self._length)

    def _text(self, tokens: list[int]) -> str:
        """What is new in the text of the tokens, but for bytes that may become a character with the next token."""
        text = self.tokenizer.decode(tokens[self._start :], skip_special_tokens=True)
        undecided = 0 if self.finished else min(len(text) - len(text.rstrip(UNDECIDED)), 3)
        certain = text[: len(text) - undecided]
        new, self._shown = certain[self._shown :], max(self._shown, len(certain))
        if not undecided and len(tokens) - self._start > 32:  # what is long past is not decoded again
            self._start = len(tokens) - 8
            self._shown = len(self.tokenizer.decode(tokens[self._start :], skip_special_tokens=True))
        self._length += len(new)
        return new

    def _until_stop(self, new: str) -> tuple[str, bool]:
        """What may be given of the text so far, and whether a stop follows it."""
        text, stop = self._held + new, self.sampling.stop
        found = [text.find(s) for s in stop if s in text]
        if found:
            return text[: min(found)], True
        held = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
        given = len(text) - (0 if self.finished else max(held, default=0))
        self._held = text[given:]
        return text[:given], False
