"""One thread that owns a model and writes many answers at once.

Its turns: a chunk of one prompt is read, of each prompt in its turn, then every answer gets its next token. So a long
document keeps nobody from writing, and a new prompt waits for no answer to end. Answers whose contexts are of about the
same length are rows of one batch, since reading the weights is most of the work and is then done once for all; others
(and those of models whose caches can't be joined) are batches of their own, and take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mosaics.models import MosaicForCausalLM
from mosaics.models.cache import held_bytes, join_caches, release
from mosaics.serving.answer import Answer, Piece

CHUNK = 512  # positions of a prompt in a turn
SLACK = 256  # positions that may be padded whatever the lengths
ROOM = 1 << 26  # bytes of state that are worth copying whatever the size of the model

log = logging.getLogger(__name__)


class ShuttingDown(Exception):
    """The server ends."""


@dataclass(eq=False)
class Job:
    """A prompt and its answers; without any, the cache after the prompt is what is wanted.

    Attributes:
        ids: `(1, time)`, at least one token.
        answers: each a sample of its own.
        before: what comes before the prompt; it is copied.
        tell: called by the engine's thread with the number of an answer and a piece of it, or with None and either the
            cache or why there will be nothing more.
        deadline: in seconds of `time.monotonic`.
        over: nobody wants to be told any more.
    """

    ids: Tensor
    answers: list[Answer]
    before: DynamicCache | None
    tell: Callable[[int | None, Piece | DynamicCache | Exception], None]
    deadline: float
    over: bool = False
    cache: DynamicCache | None = None
    read: int = 0  # positions of the prompt

    @property
    def rows(self) -> int:
        return len(self.answers) or 1

    def fail(self, error: Exception) -> None:
        """Give up."""
        self.over = True
        self.tell(None, error)


@dataclass(eq=False)
class Batch:
    """Answers that are written together: the cache has a row for each, `lengths` is the length of its context."""

    cache: DynamicCache
    rows: list[tuple[Job, Answer, int]]
    lengths: list[int] = field(default_factory=list)


class Engine:
    """Starts the thread; `close` ends it.

    Args:
        model: at evaluation; nobody else may use it meanwhile.
        parallel: answers that are read for or written at once; the others wait, first come, first served.
    """

    def __init__(self, model: PreTrainedModel, parallel: int) -> None:
        self.model, self.parallel = model, parallel
        self._stack = model.model.stack if isinstance(model, MosaicForCausalLM) else None
        # What batching saves is reading the weights again; a state that is larger costs more to copy and to pad.
        self._room = max(ROOM, sum(parameter.nbytes for parameter in model.parameters()))
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._batches: list[Batch] = []
        self._end = float("inf")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job behind those that wait."""
        self._inbox.put(job)

    def close(self, grace: float) -> None:
        """End when all jobs have, or after `grace` seconds, telling the others; may be called by a signal's handler."""
        self._end = time.monotonic() + grace
        self._inbox.put(None)

    @property
    def closing(self) -> bool:
        return self._end < float("inf")

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while self._receive():
            self._waiting = deque(job for job in self._waiting if not self._over(job))
            self._reading = deque(job for job in self._reading if not self._over(job))
            self._admit()
            if self._reading:
                self._read(self._reading.popleft())
            for batch in list(self._batches):
                self._write(batch)

    def _receive(self) -> bool:
        """Take in what came, waiting if there is nothing else to do; False when the end has come."""
        while True:
            idle = not (self._waiting or self._reading or self._batches)
            try:
                job = self._inbox.get(block=idle and not self.closing)
            except Empty:
                return not idle
            if job is not None:
                self._waiting.append(job)

    def _over(self, job: Job) -> bool:
        if not job.over and time.monotonic() > self._end:
            job.fail(ShuttingDown("the server is shutting down"))
        if not job.over and time.monotonic() > job.deadline:
            job.fail(TimeoutError("the time for a request is over"))
        return job.over

    def _admit(self) -> None:
        busy = sum(job.rows for job in self._reading) + sum(len(batch.rows) for batch in self._batches)
        while self._waiting and busy + self._waiting[0].rows <= self.parallel:
            self._reading.append(self._waiting.popleft())
            busy += self._reading[-1].rows

    def _read(self, job: Job) -> None:
        """Read a chunk of a prompt; after the last one, begin its answers."""
        try:
            if job.cache is None and job.before is not None:
                job.cache = join_caches([job.before], self._stack)
            elif job.cache is None:
                job.cache = DynamicCache(config=self.model.config)
            logits = self._logits(job.ids[:, job.read : job.read + CHUNK], job.cache)
            job.read += CHUNK
            if job.read < job.ids.shape[1]:
                self._reading.append(job)
            elif job.answers:
                self._begin(job, logits[0])
            else:
                release(job.cache)
                job.tell(None, job.cache)
        except Exception as error:
            self._failed([job], error)

    def _begin(self, job: Job, logits: Tensor) -> None:
        length = job.cache.get_seq_length()
        for number, answer in enumerate(job.answers):
            self._take(job, answer, number, logits)
        rows = [(job, answer, number) for number, answer in enumerate(job.answers) if not answer.finished]
        if job.over or not rows:
            return
        if len(rows) > 1:
            job.cache.batch_repeat_interleave(len(rows))
        new = Batch(job.cache, rows, [length] * len(rows))
        job.cache = None
        for batch in self._batches:
            if self._joined(batch, new):
                return
        self._batches.append(new)

    def _joined(self, batch: Batch, new: Batch) -> bool:
        """Whether answers could be added to those of a batch."""
        lengths = batch.lengths + new.lengths
        if self._stack is None or max(lengths) > 2 * min(lengths) + SLACK:
            return False
        if held_bytes(batch.cache) + held_bytes(new.cache) > self._room:
            return False
        try:
            batch.cache = join_caches([batch.cache, new.cache], self._stack)
        except ValueError:  # states of different kinds
            return False
        batch.rows, batch.lengths = batch.rows + new.rows, lengths
        return True

    def _write(self, batch: Batch) -> None:
        """The next token of every answer of a batch."""
        try:
            self._prune(batch)
            if batch not in self._batches:
                return
            logits = self._logits(torch.tensor([[answer.tokens[-1]] for _, answer, _ in batch.rows]), batch.cache)
            batch.lengths = [length + 1 for length in batch.lengths]
            for (job, answer, number), row in zip(batch.rows, logits, strict=True):
                if not job.over:
                    self._take(job, answer, number, row)
            self._prune(batch)
        except Exception as error:
            self._failed([job for job, _, _ in batch.rows], error)
            self._batches.remove(batch)

    def _prune(self, batch: Batch) -> None:
        """Let go of the rows of answers that have ended."""
        rows = batch.rows
        kept = [i for i, (job, answer, _) in enumerate(rows) if not (answer.finished or self._over(job))]
        if not kept:
            self._batches.remove(batch)
        elif len(kept) < len(rows):
            batch.cache.batch_select_indices(torch.tensor(kept))
            batch.rows, batch.lengths = [rows[i] for i in kept], [batch.lengths[i] for i in kept]

    def _logits(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """`(rows, vocabulary)`, after the last of `ids`."""
        ids = ids.to(self.model.device)
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].cpu()

    def _take(self, job: Job, answer: Answer, number: int, logits: Tensor) -> None:
        try:
            piece = answer.take(logits)
        except Exception as error:
            self._failed([job], error)
        else:
            if piece is not None:
                job.tell(number, piece)

    def _failed(self, jobs: list[Job], error: Exception) -> None:
        log.error("an answer failed", exc_info=error)
        for job in jobs:
            if not job.over:
                job.fail(error)
