"""Training rows of a world, addressed by their number."""

import inspect

import numpy as np
import torch

from mosaics.data.worlds.vocabulary import WORD_IDS
from mosaics.data.worlds.world import World

LOSSES = ("all", "answers")
SETTINGS = tuple(inspect.signature(World.episode).parameters)[6:]  # after self, task, number, length, split, stream


class WorldStream:
    """An endless stream of rows, one episode of the training split each; the position in it is one integer.

    The rows of optimisation step s (counted from 0) are `batch(s * batch_size, batch_size)`: they depend on the two
    seeds and the step alone, and a batch may be cut into micro-batches anywhere.

    Args:
        world: the world.
        task: one of `TASKS`, or `mixed`.
        context_length: tokens in a row, T.
        loss: `all` counts every token, `answers` only those that answer a question.
        seed: of the stream; runs in one world have different ones.
        settings: of `World.episode`, such as `facts` or `noise`.

    Raises:
        ValueError: another word for `loss`, an unknown setting; or what `World.episode` raises.
    """

    vocab_size = len(WORD_IDS)

    def __init__(
        self, world: World, task: str, context_length: int, *, loss: str = "all", seed: int = 0, **settings
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; choose {' or '.join(LOSSES)}")
        for key in settings:
            if key not in SETTINGS:
                raise ValueError(f"episodes of a world have no setting {key!r}; choose from {', '.join(SETTINGS)}")
        self.world, self.task, self.context_length, self.loss, self.seed = world, task, context_length, loss, seed
        self.settings = settings
        self._row(0)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        episode = self.world.episode(self.task, number, self.context_length, stream=self.seed, **self.settings)
        return episode.tokens()

    def batch(self, first_sequence: int, count: int) -> dict[str, torch.Tensor | None]:
        """Rows number `first_sequence` to `first_sequence + count - 1`, as `PackedDataset.batch` gives them.

        Returns:
            A dictionary for `count` rows of T positions:

            - `input_ids`: int64, (count, T), without padding;
            - `document_ids`: int64, (count, T), 0: a row is one document;
            - `attention_mask`: None;
            - `labels`: int64, (count, T), -100 where the loss is not counted (models shift them inside);
            - `answers`: bool, (count, T): where the answers are.

        Raises:
            ValueError: a negative position or fewer than one row.
        """
        if first_sequence < 0 or count < 1:
            raise ValueError(f"{count} rows from {first_sequence} are out of range; take 1 or more from 0 or later")
        ids, answers = zip(*map(self._row, range(first_sequence, first_sequence + count)), strict=True)
        ids, answers = torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(answers))
        return {
            "input_ids": ids,
            "document_ids": torch.zeros_like(ids),
            "attention_mask": None,
            "labels": ids.clone() if self.loss == "all" else ids.masked_fill(~answers, -100),
            "answers": answers,
        }
