"""A conversation whose past is in the cache: what was said once is never read again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import jinja2
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mosaics.models.memory_file import load_memory, save_memory
from mosaics.serving.answer import Answer, Sampling
from mosaics.serving.engine import CHUNK

ANSWER = "\x02the answer\x03"  # stands for an answer in what a template makes, to see what follows one


class Conversation:
    """Says and answers in turns.

    With a chat template, it is asked for what stands between the last answer and the next: so that answers, which are
    in the cache as they were written, need not be made into tokens again. Without one, the text simply goes on.

    Args:
        model: at evaluation.
        tokenizer: of the model.
        memory: a file that `save_memory` wrote, which comes before everything.
        begin: gives what comes before everything in its place: a cache that has seen no token, as of a library.

    Raises:
        ValueError: the memory is damaged, or another model's.
        OSError: there is no memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        memory: Path | None = None,
        begin: Callable[[], DynamicCache] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self._first = begin or partial(DynamicCache, config=model.config)
        end = model.generation_config.eos_token_id
        self._end = frozenset(end if isinstance(end, list) else [] if end is None else [end])
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but not the memory."""
        if self.memory is None:
            self._cache, self._read = self._first(), []
        else:
            self._cache, ids = load_memory(self.memory, self.model)
            self._read = ids[0].tolist()
        self._unread: list[int] = []  # tokens that are not in the cache yet
        self._messages: list[dict[str, str]] = []
        self._closing = ""  # what a template puts behind an answer, where it was read already

    def ask(self, said: str, sampling: Sampling) -> Generator[str]:
        """The answer in pieces, "" while what was said is read; closed early, the conversation goes on from there."""
        between = self._between(said)
        first = not self._read and not self._unread
        ids = self.tokenizer(between, add_special_tokens=first and not self.tokenizer.chat_template).input_ids
        if not first and ids[:1] == [self.tokenizer.bos_token_id]:
            ids = ids[1:]
        self._messages.append({"role": "user", "content": said})
        self._unread += ids
        answer, text = Answer(self.tokenizer, self._end, sampling), ""
        try:
            logits = None
            for logits in self._reading():  # noqa: B007
                yield ""
            while logits is not None and not answer.finished:
                piece = answer.take(logits)
                if answer.tokens[-1] not in self._end:
                    self._unread.append(answer.tokens[-1])
                if piece is not None:
                    text += piece.text
                    yield piece.text
                if not answer.finished:
                    *_, logits = self._reading()
        finally:
            self._messages.append({"role": "assistant", "content": text})

    def save(self, file: Path) -> int:
        """Keep what was read and said so far as a memory; gives its size in bytes.

        Raises:
            ValueError: nothing was said yet.
            OSError: the file can't be written.
        """
        if self.tokenizer.chat_template and self._messages and not self._closing:
            self._closing = self._template(self._messages, ask=False)
            self._unread += self.tokenizer(self._closing, add_special_tokens=False).input_ids
        for _ in self._reading():
            pass
        if not self._read:
            raise ValueError("nothing was said yet; there is nothing to save")
        return save_memory(file, self.model, self._cache, torch.tensor([self._read]))

    def _between(self, said: str) -> str:
        """The text from the end of the last answer to the beginning of the next."""
        if not self.tokenizer.chat_template:
            return said if not self._messages else f"\n{said}"
        text = self._template([*self._messages, {"role": "user", "content": said}], ask=True)
        text, self._closing = text.removeprefix(self._closing), ""
        return text

    def _template(self, messages: list[dict[str, str]], ask: bool) -> str:
        """What a template makes of messages, from behind the last answer on."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if answers:
            messages = [*messages]
            messages[answers[-1]] = {"role": "assistant", "content": ANSWER}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses what was said: {error}; /reset begins again") from None
        if answers and ANSWER not in text:
            raise ValueError("the chat template leaves out what was answered, so the conversation can't go on; /reset")
        return text.rpartition(ANSWER)[2]

    @torch.inference_mode()
    def _reading(self) -> Iterator[Tensor]:
        """Read what is unread, chunk by chunk; gives the logits `(vocabulary,)` after each."""
        while self._unread:
            chunk = self._unread[:CHUNK]
            ids = torch.tensor([chunk], device=self.model.device)
            logits = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            self._unread = self._unread[CHUNK:]
            self._read += chunk
            yield logits.cpu()
