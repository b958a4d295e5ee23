"""Passes of token ids through a causal language model, long rows piece by piece with a cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Passes:
    """Passes rows through a model; what it keeps of the last prefix is not passed again.

    Args:
        model: any causal language model of transformers, at evaluation.
        batch_size: rows in a pass at most.
        chunk: positions in a pass.
        batch_tokens: positions in a pass over several rows, the cached ones included, at most.

    Attributes:
        cached: whether it has a cache that takes several tokens at once.
    """

    def __init__(self, model, batch_size: int, chunk: int, batch_tokens: int) -> None:
        self.model, self.batch_size, self.chunk, self.batch_tokens = model, batch_size, chunk, batch_tokens
        known = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in known
        # Recurrent models of others have caches of their own, which take one token at a time.
        own = getattr(model.config, "model_type", "") == "mosaic"
        self.cached = own or ("past_key_values" in known and not getattr(model, "_is_stateful", False))
        # What is kept narrower than it is computed is asked for as it is kept, also where one pass would do.
        self._always_keeps = own and model.config.state_dtype is not None
        self._prefix: tuple[tuple[int, ...], object] = ((), None)

    @torch.inference_mode()
    def logits(self, ids: Tensor, cache, first: int) -> Iterator[tuple[int, Tensor]]:
        """Logits of all positions from `first` on, chunk by chunk: (position of the first, logits)."""
        ids = ids.to(self.model.device)
        chunk = self.chunk if self.cached else ids.shape[1]
        if cache is None and self.cached and (ids.shape[1] > chunk or self._always_keeps):
            cache = self._new_cache()
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            keep = min(max(start + part.shape[1] - first, 1), part.shape[1])
            logits = self._logits(part, cache, keep)
            if start + part.shape[1] > first:
                yield start + part.shape[1] - keep, logits

    @torch.inference_mode()
    def step(self, ids: Tensor, cache) -> tuple[Tensor, object]:
        """Logits after the last position, and the cache."""
        if not self.cached:
            return self._logits(ids.to(self.model.device), None, 1)[:, -1], None
        cache = self._new_cache() if cache is None else cache
        for part in ids.to(self.model.device).split(self.chunk, dim=1):
            logits = self._logits(part, cache, 1)
        return logits[:, -1], cache

    def _logits(self, ids: Tensor, cache, keep: int) -> Tensor:
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        if cache is None:
            options["use_cache"] = False
        else:
            options |= {"past_key_values": cache, "use_cache": True}
        return self.model(input_ids=ids, **options).logits[:, -keep:]

    def _new_cache(self):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def prefix_cache(self, prefix: Sequence[int]) -> tuple[object, int]:
        """The cache after a prefix and the prefix's length; the last one is kept."""
        if not prefix or not self.cached:
            return None, 0
        prefix = tuple(prefix)
        if self._prefix[0] != prefix:
            self._prefix = ((), None)
            _, cache = self.step(torch.tensor([prefix]), None)
            self._prefix = (prefix, cache)
        return self._prefix[1], len(prefix)

    @torch.inference_mode()
    def copies(self, cache, count: int):
        """A copy of a cache of one row, for so many; None stays None."""
        if cache is None:
            return None
        cache = copy.deepcopy(cache)
        if count > 1:
            cache.batch_repeat_interleave(count)
        return cache

    def rows_for(self, length: int) -> int:
        """How many rows of a length one pass may have."""
        return max(1, min(self.batch_size, self.batch_tokens // max(1, length)))

    def batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Rows of similar length together, the longest first."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while order:
            room = self.rows_for(lengths[order[0]])
            yield order[:room]
            order = order[room:]
