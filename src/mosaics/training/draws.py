"""Seeds of a run. What a step draws depends on (seed, step) alone, so resuming needs no generator's state."""

import numpy as np
import torch


def seed_step(seed: int, step: int, row: int = 0) -> None:
    """Seed torch's default generators, from which dropout draws, for the rows of a step that begin with `row`.

    The same rows get the same dropout whichever process computes them, and other rows another; so a run is the same
    for any number of processes as long as its micro-batches are. Step 0 is the initialisation.

    Args:
        seed: of the run.
        step: counted from 1.
        row: the first row of the micro-batch, counted from the first row of the step's whole batch.
    """
    words = np.random.SeedSequence([seed, step, 1, row]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0] >> 1))
