"""A language model as the suites see it: likelihoods of continuations, greedy generation, nats per token.

Nothing here depends on the batch: rows are filled up on the right, where a causal model cannot see it, and rows
that are generated together have the same length. A prefix that consecutive examples share is encoded once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from mosaics.data.tokenizer import encode_pieces
from mosaics.evaluation.example import Example
from mosaics.evaluation.passes import Passes
from mosaics.models.digest import digest_of
from mosaics.models.placing import place

_TAIL = 200  # characters; no token is nearly as long
_LONG = 512  # tokens of a prefix after which passing every choice costs more than searching


class Scorer:
    """Asks a transformers causal language model.

    Args:
        model: any causal language model of transformers, at evaluation.
        tokenizer: its tokenizer.
        batch_size: rows in a pass at most.
        limit: tokens of prompt and answer together that are allowed, if any; it is not the training length.
        chunk: positions in a pass: longer rows are passed piece by piece with a cache.
        batch_tokens: positions in a pass over several rows, the cached ones included, at most (bounds the memory).

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        batch_size: int = 16,
        limit: int | None = None,
        chunk: int = 2048,
        batch_tokens: int = 1 << 17,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("limit", limit), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_size, self.limit = batch_size, limit
        self._passes = Passes(self.model, batch_size, chunk, batch_tokens)
        ids = tokenizer("a").input_ids
        begin = tokenizer.bos_token_id
        self._begin = [begin] if begin is not None and ids[:1] == [begin] else []
        self._text: tuple[str, list[int]] = ("", [])  # the last prefix

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: str = "float32",
        without: Sequence[str] = (),
        **options,
    ) -> Scorer:
        """Loads a model through transformers' Auto classes.

        Args:
            source: an exported model, a run's folder (its export), or a name on the Hugging Face hub.
            device: as torch names it; `auto` takes a GPU if there is one.
            dtype: `float32`, `bfloat16`, `float16` or `float64`.
            without: memories to take out, as `long_term` (mosaics only).
            options: those of the class.

        Raises:
            ValueError: an unknown dtype or memory, a run without export, a model that has no such memory.
            OSError: there is no such model.
        """
        from mosaics.models.loading import load_exported

        model, tokenizer = load_exported(source)
        return cls(place(model, device, dtype, without), tokenizer, **options)

    @property
    def training_length(self) -> int | None:
        """The context that the model was trained with, as far as its config says."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def start_id(self) -> int:
        """What stands before a text: begin-of-text, or what separates texts.

        Raises:
            ValueError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("the tokenizer has neither begin-of-text nor end-of-text; set its bos_token and save it again")

    def fingerprint(self) -> str:
        """16 hexadecimal digits of a hash over the config and all weights; tells models apart."""
        config = repr(sorted(self.model.config.to_diff_dict().items()))
        return digest_of(config, sorted(self.model.state_dict().items()))[:16]

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Token ids of a text, after begin-of-text if the tokenizer puts it there; special tokens inside the text
        are read as plain text."""
        return (self._begin if begin else []) + encode_pieces(self.tokenizer, [text])[0].tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count(self, text: str) -> int:
        """Tokens of a text, begin-of-text included."""
        return len(self.encode(text))

    # What the suites ask

    def choose(self, examples: Sequence[Example]) -> list[list[float]]:
        """Log-likelihood (nats) of every choice of every example, with the example's ending.

        Raises:
            ValueError: a prompt with its choice is longer than the limit.
        """
        return [[sum(score) for score in scores] for scores in self.choice_scores(examples)]

    def choice_scores(self, examples: Sequence[Example]) -> list[list[list[float]]]:
        """Log-likelihood of every token of every choice of every example."""
        results: list[list[list[float]]] = []
        for prefix, group in groupby(examples, key=lambda example: example.prefix):
            group = list(group)
            rows, shared = [], self._shared_ids(prefix)
            for example in group:
                for row in self._rows(example):
                    rows.append(row)
                    shared = shared[: _common(shared, row[0])]
            scores = iter(self.loglikelihoods(rows, shared))
            results += [[next(scores) for _ in example.choices] for example in group]
        return results

    def best(self, examples: Sequence[Example]) -> list[str]:
        """The choice with the greatest log-likelihood for each example.

        After a long prefix not all choices are scored: the beginning of a choice bounds its likelihood from above, so
        that the search may go on with the most likely beginning until that is a whole choice.

        Raises:
            ValueError: a prompt with its choice is longer than the limit.
        """
        if not self._passes.cached or any(len(self._shared_ids(example.prefix)) < _LONG for example in examples):
            scored = zip(examples, self.choose(examples), strict=True)
            return [example.choices[max(range(len(scores)), key=scores.__getitem__)] for example, scores in scored]
        return [self._search(example) for example in examples]

    def _search(self, example: Example) -> str:
        rows = list(self._rows(example))
        length = min(len(context) for context, _ in rows)  # where choices begin to differ from each other
        wholes = [[*context, *continuation] for context, continuation in rows]
        prefix = self._shared_ids(example.prefix)
        cache, known = self._passes.prefix_cache(prefix[: min(_common(prefix, wholes[0]), length - 1)])
        logits, cache = self._passes.step(torch.tensor([wholes[0][known:length]]), self._passes.copies(cache, 1))
        # Entries: log-likelihood so far (negated), whether that is all, the choices that begin so, tokens covered.
        heap: list[tuple[float, bool, list[int], int]] = []

        def push(score: float, choices: list[int], covered: int, logits: Tensor) -> None:
            logprobs = logits.float().log_softmax(-1)
            for token in dict.fromkeys(wholes[i][length + covered] for i in choices):
                following = [i for i in choices if wholes[i][length + covered] == token]
                heapq.heappush(heap, (score - logprobs[token].item(), False, following, covered + 1))

        push(0.0, list(range(len(wholes))), 0, logits[0])
        while True:
            score, whole, choices, covered = heapq.heappop(heap)
            if whole:
                return example.choices[choices[0]]
            shared = wholes[choices[0]][length:]
            for i in choices[1:]:
                shared = shared[: _common(shared, wholes[i][length:])]
            passes = self._passes.logits(torch.tensor([shared]), self._passes.copies(cache, 1), covered - 1)
            logits = torch.cat([piece for _, piece in passes], 1)
            for at in range(covered, len(shared)):
                score -= logits[0, at - covered].float().log_softmax(-1)[shared[at]].item()
            ended = [i for i in choices if len(wholes[i]) == length + len(shared)]
            if ended:
                heapq.heappush(heap, (score, True, ended[:1], len(shared)))
            if going_on := [i for i in choices if i not in ended]:
                push(score, going_on, len(shared), logits[0, -1])

    def complete(self, examples: Sequence[Example], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy continuations of the examples' prompts.

        Args:
            examples: what to go on from.
            max_new_tokens: tokens to write at most; end-of-text ends earlier.
            stop: texts that end an answer; they are cut off with what follows.

        Raises:
            ValueError: a prompt with the room for its answer is longer than the limit.
        """
        texts: list[str] = []
        for prefix, group in groupby(examples, key=lambda example: example.prefix):
            rows, shared = [], self._shared_ids(prefix)
            for example in group:
                rows.append(self._ids(example))
                self._check_length(example.id, len(rows[-1]) + max_new_tokens)
                shared = shared[: _common(shared, rows[-1])]
            for ids in self._generate(rows, shared, max_new_tokens, stop):
                texts.append(_before(self.decode(ids), stop))
        return texts

    def next_logprobs(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Log-probabilities of the token after each of the positions of one row: float32 `(positions, vocabulary)`."""
        self._check_ids(ids)
        if not positions or not 0 <= min(positions) <= max(positions) < len(ids):
            raise ValueError(f"the positions are {list(positions)}; give some from 0 to {len(ids) - 1}")
        found = []
        for start, logits in self._passes.logits(torch.tensor([ids]), None, min(positions)):
            here = [p - start for p in positions if start <= p < start + logits.shape[1]]
            found.append(logits[0, here].float().log_softmax(-1).cpu())
        return torch.cat(found)

    def token_nats(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Nats of every token but the first of each row: float32 `(tokens - 1,)`; rows may differ in length."""
        scored = self.loglikelihoods([(row[:1], row[1:]) for row in rows])
        return [-torch.tensor(scores) for scores in scored]

    # Token level

    def loglikelihoods(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], prefix: Sequence[int] = ()
    ) -> list[list[float]]:
        """Log-likelihood of every token of continuations.

        Args:
            requests: (context, continuation) in token ids; contexts are not empty.
            prefix: ids that all contexts begin with; they are passed once.

        Returns:
            Nats (negative or 0) of each token, for each request.

        Raises:
            ValueError: an id is none of the model's, or a context is empty.
        """
        if not all(len(context) for context, _ in requests):
            raise ValueError("a context is empty; give at least one token before what is asked for")
        self._check_ids(*(ids for request in requests for ids in request))
        results: list[list[float]] = [[] for _ in requests]
        # Requests that differ in their last token only, as answers of one token do, are one row.
        asked: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(requests):
            asked.setdefault((*context, *continuation[:-1]), []).append(i)
        rows, starts = list(asked), [len(context) - 1 for context, _ in requests]
        # The last id of each context has to be passed again, for what it says about the continuation.
        length = min(len(prefix), *starts) if rows else 0
        cache, length = self._passes.prefix_cache(prefix[:length])
        for batch in self._passes.batches([len(row) for row in rows]):
            width = max(len(rows[line]) for line in batch) - length
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for line, row in enumerate(batch):
                ids[line, : len(rows[row]) - length] = torch.tensor(rows[row][length:])
            wanted = [(line, i) for line, row in enumerate(batch) for i in asked[rows[row]]]
            first = min(starts[i] for _, i in wanted) - length
            for start, logits in self._passes.logits(ids, self._passes.copies(cache, len(batch)), first):
                # Only what is asked for leaves the device, and no second array of the whole vocabulary is made.
                for line, i in wanted:
                    continuation, offset = requests[i][1], starts[i] - length
                    low, high = max(start, offset), min(start + logits.shape[1], offset + len(continuation))
                    if low < high:
                        targets = torch.tensor(continuation[low - offset : high - offset], device=logits.device)
                        piece = logits[line, low - start : high - start].float()
                        results[i] += (piece.gather(1, targets[:, None])[:, 0] - piece.logsumexp(-1)).tolist()
        return results

    def _generate(self, rows, prefix, max_new_tokens: int, stop: Sequence[str]) -> list[list[int]]:
        """Greedy continuations of rows of ids; rows of one length go together."""
        answers: list[list[int]] = [[] for _ in rows]
        length = min(len(prefix), *(len(row) - 1 for row in rows)) if rows else 0
        cache, length = self._passes.prefix_cache(prefix[:length])
        ends = {self.tokenizer.eos_token_id} - {None}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for _, same in groupby(order, key=lambda i: len(rows[i])):
            same = list(same)
            room = self._passes.rows_for(len(rows[same[0]]) + max_new_tokens)
            for batch in (same[i : i + room] for i in range(0, len(same), room)):
                ids = torch.tensor([rows[i][length:] for i in batch])
                state, done = self._passes.copies(cache, len(batch)), set()
                for step in range(max_new_tokens):
                    if step and not self._passes.cached:
                        ids = torch.tensor([rows[i] + answers[i] for i in batch])
                    logits, state = self._passes.step(ids, state)
                    tokens = logits.argmax(-1).tolist()
                    for line, (i, token) in enumerate(zip(batch, tokens, strict=True)):
                        if token in ends:
                            done.add(line)
                        answers[i].append(token)
                        if line not in done and stop:
                            text = self.decode(answers[i])
                            if _before(text, stop) != text:
                                done.add(line)
                    if len(done) == len(batch):
                        break
                    ids = torch.tensor(tokens)[:, None]
                for i in batch:
                    cut = next((at for at, token in enumerate(answers[i]) if token in ends), None)
                    answers[i] = answers[i][:cut]
        return answers

    # Text to ids

    def _shared_ids(self, prefix: str) -> list[int]:
        if prefix != self._text[0]:
            self._text = (prefix, self.encode(prefix) if prefix else [])
        return self._text[1]

    def _ids(self, example: Example) -> list[int]:
        if not isinstance(example.prompt, str):
            self._check_ids(example.prompt)
            return list(example.prompt)
        ids = self.encode(example.prefix + example.prompt)
        if not ids:
            raise ValueError(f"the prompt of {example.id} is empty and the tokenizer has no begin-of-text")
        return ids

    def _rows(self, example: Example) -> Iterator[tuple[list[int], list[int]]]:
        """Context and continuation of each choice; a token that spans both belongs to the continuation."""
        context, encode = self._ids(example), self._encode_tail(example)
        for choice in example.choices:
            whole = encode(context, choice + example.ending)
            self._check_length(example.id, len(whole))
            cut = min(_common(context, whole), len(whole) - 1)
            yield (whole[:cut], whole[cut:]) if cut else ([self.start_id], whole)

    def _encode_tail(self, example: Example):
        """A function that encodes the prompt with something after it, and reads only the last part of the prompt anew.

        Where the prompt is cut, tokens may come out otherwise; so what is taken from the part begins after that.
        """
        if not isinstance(example.prompt, str):
            return lambda context, text: context + self.encode(text, begin=False)
        prompt = example.prefix + example.prompt
        tail = prompt[-_TAIL:]
        known = self.encode(tail, begin=False)

        def encode(context: list[int], text: str) -> list[int]:
            equal = _common(context[::-1], known[::-1])
            again = self.encode(tail + text, begin=False)
            if len(prompt) > _TAIL and equal > len(known) - _common(known, again):
                return context[: len(context) - equal] + again[len(known) - equal :]
            return self.encode(prompt + text)

        return encode

    def _check_ids(self, *rows: Sequence[int]) -> None:
        words = self.model.config.get_text_config().vocab_size
        for ids in rows:
            if len(ids) and not 0 <= min(ids) <= max(ids) < words:
                raise ValueError(
                    f"the tokens go from {min(ids)} to {max(ids)}; those of this model are 0 to {words - 1}"
                )

    def _check_length(self, name: str, length: int) -> None:
        if self.limit is not None and length > self.limit:
            raise ValueError(
                f"{name} needs {length} tokens with its answer and the limit is {self.limit}; "
                "raise the limit or ask for shorter prompts (none is ever cut)"
            )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two rows have in common at the start."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _before(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]
