"""Between the requests, which live in an event loop, and the engine, which is a thread."""

from __future__ import annotations

import asyncio
import copy
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import jinja2
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mosaics.models import MosaicForCausalLM
from mosaics.serving.answer import Answer, Piece, Sampling
from mosaics.serving.engine import Engine, Job, ShuttingDown
from mosaics.serving.memories import Kept, Memories


@dataclass(frozen=True)
class Limits:
    """What a server does at most.

    Attributes:
        parallel: answers that are written at once.
        queue: answers that wait beyond those.
        context: tokens of memory, prompt and answer together.
        tokens: of an answer; a conversation's answer has so many where nothing else is asked for.
        body: bytes of a request.
        seconds: for a request, waiting included.
        memories: that are kept.
        memory_bytes: of all memories together.
    """

    parallel: int = 16
    queue: int = 256
    context: int = 131072
    tokens: int = 4096
    body: int = 8 << 20
    seconds: float = 600.0
    memories: int = 16
    memory_bytes: int = 2 << 30


class Refused(Exception):
    """A request that gets no answer: the HTTP status, and what OpenAI's errors say."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kind.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.error = status, {"message": message, "type": kind, "param": param, "code": code}
        self.headers = {"retry-after": "1"} if retry else {"x-should-retry": "false"}  # both known to OpenAI's clients


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from, and what comes before them."""

    ids: list[int]
    before: Kept | None = None

    @property
    def cached(self) -> int:
        return 0 if self.before is None else self.before.tokens

    @property
    def tokens(self) -> int:
        return self.cached + len(self.ids)


class Desk:
    """A model with what its clients share: the engine, the memories, the limits.

    Args:
        name: what clients call the model.
        model: at evaluation.
        tokenizer: of the model.
        limits: what is done at most.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits = Limits()
    ) -> None:
        self.name, self.model, self.tokenizer, self.limits = name, model, tokenizer, limits
        self.created = int(time.time())
        self.memories = Memories(limits.memories, limits.memory_bytes)
        self.engine = Engine(model, limits.parallel)
        self.open = 0  # answers of requests that have not ended
        end = model.generation_config.eos_token_id
        self._end = frozenset(end if isinstance(end, list) else [] if end is None else [end])
        self._decoding = copy.deepcopy(tokenizer)  # for the engine's thread: none is for two threads at once
        self._one_at_a_time = anyio.CapacityLimiter(1)

    async def tokens(self, text: str, special: bool) -> list[int]:
        """The tokens of a text, with those that begin one if `special`."""
        return await self._encoded(lambda: self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids)

    async def conversation(self, messages: list[dict[str, str]], first: bool) -> list[int]:
        """The tokens of a conversation whose next message is the model's; `first`: nothing comes before it.

        Raises:
            Refused: the tokenizer has no chat template, or it does not allow these messages.
        """
        if not self.tokenizer.chat_template:
            raise Refused(400, f"the model {self.name!r} has no chat template; use /v1/completions", "no_chat_template")
        options = dict(add_generation_prompt=True, return_dict=False)
        try:
            ids = await self._encoded(lambda: self.tokenizer.apply_chat_template(messages, **options))
        except jinja2.TemplateError as error:
            raise Refused(400, f"the chat template refuses the messages: {error}", param="messages") from None
        return ids if first or ids[:1] != [self.tokenizer.bos_token_id] else ids[1:]

    async def _encoded(self, encode: Callable[[], list[int]]) -> list[int]:
        return await anyio.to_thread.run_sync(encode, limiter=self._one_at_a_time)

    def memory(self, id: str | None) -> Kept | None:
        """The memory of an id; None for None.

        Raises:
            Refused: there is none.
        """
        if id is None:
            return None
        try:
            return self.memories.get(id)
        except KeyError:
            raise Refused(
                404,
                f"there is no memory {id!r}; it was never here, was deleted, or had to go for others",
                "memory_not_found",
                "memory",
            ) from None

    def check_length(self, prompt: Prompt, answer: int = 0) -> None:
        """Raises `Refused` for more tokens than may be, or none."""
        if not prompt.ids:
            raise Refused(400, "there are no tokens to go on from; say something", param="prompt")
        if prompt.tokens + answer > self.limits.context:
            raise Refused(
                400,
                f"memory and prompt have {prompt.tokens} tokens and the answer may have {answer}: more than "
                f"{self.limits.context}; ask for less",
                "context_length_exceeded",
            )

    def answer(self, sampling: Sampling) -> Answer:
        """An answer to be."""
        return Answer(self._decoding, self._end, sampling)


class Ticket:
    """The jobs of one request. To be closed when the request ends, however it does: nothing goes on for nobody."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._jobs: list[Job] = []
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Queue()
        self._rows = 0
        self._deadline = time.monotonic() + desk.limits.seconds

    def close(self) -> None:
        for job in self._jobs:
            job.over = True
        self.desk.open -= self._rows
        self._rows = 0

    async def read(self, prompt: Prompt) -> Kept:
        """Make a memory of a prompt."""
        self._submit([(prompt, [])])
        async for _, cache in self._events():
            return Kept(f"mem-{secrets.token_hex(12)}", cache, prompt.tokens)

    def ask(self, prompts: list[Prompt], samplings: list[Sampling]) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of answers as they come, each with the number of its answer: as many for every prompt as there are
        samplings.

        Raises:
            Refused: too many answers are under way.
        """
        self._submit([(prompt, [self.desk.answer(sampling) for sampling in samplings]) for prompt in prompts])
        return self._events()

    def _submit(self, asked: list[tuple[Prompt, list[Answer]]]) -> None:
        engine, limits = self.desk.engine, self.desk.limits
        rows = [len(answers) or 1 for _, answers in asked]
        if max(rows) > limits.parallel or sum(rows) > limits.parallel + limits.queue:
            raise Refused(
                400,
                f"{sum(rows)} answers, {max(rows)} of them to one prompt, are more than this server writes: "
                f"{limits.parallel} at once, {limits.queue} waiting; ask for fewer",
                param="n",
            )
        if engine.closing or not engine.alive:
            raise Refused(503, "the server is shutting down")
        if self.desk.open + sum(rows) > limits.parallel + limits.queue:
            raise Refused(429, "too many answers are under way; ask again later", "too_many_requests", retry=True)
        self._rows = sum(rows)
        self.desk.open += self._rows
        for prompt, answers in asked:
            first = sum(rows[: len(self._jobs)])
            ids = torch.tensor([prompt.ids])
            before = None if prompt.before is None else prompt.before.cache
            job = Job(ids, answers, before, partial(self._tell, first), self._deadline)
            self._jobs.append(job)
            engine.submit(job)

    def _tell(self, first: int, number: int | None, what: Any) -> None:
        """Called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._told.put_nowait, (first + (number or 0), what))
        except RuntimeError:  # the loop has ended
            pass

    async def _events(self) -> AsyncIterator[tuple[int, Any]]:
        going_on = self._rows
        while going_on:
            index, what = await self._told.get()
            if isinstance(what, Exception):
                raise _refusal(what) from what
            yield index, what
            going_on -= isinstance(what, DynamicCache) or what.finish_reason is not None


def _refusal(error: Exception) -> Refused:
    """What a client is told of an error in the engine."""
    if isinstance(error, ShuttingDown):
        return Refused(503, "the server is shutting down")
    if isinstance(error, TimeoutError):
        return Refused(408, f"{error}; ask for less, or again when fewer do", "timeout")
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return Refused(503, "out of memory; ask for less, or again when fewer do", "out_of_memory")
    return Refused(500, f"the model failed ({type(error).__name__}); the server's log says more")


def memory_bytes(model: PreTrainedModel, tokens: int) -> int:
    """About how much a memory of so many tokens will hold.

    Raises:
        Refused: the model keeps none.
    """
    if not isinstance(model, MosaicForCausalLM):
        raise Refused(400, f"only a mosaic keeps a memory, and this model is a {model.config.model_type}")
    return model.model.stack.state_bytes(tokens, model.dtype.itemsize)
