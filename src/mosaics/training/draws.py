"""Random draws of a run. Those of a step depend on (seed, step) alone, so resuming needs no generator's
state."""

import numpy as np
import torch


def draw_step(seed: int, step: int) -> float:
    """The random number in [0, 1) of one optimisation step, from which the long-term delay follows.

    It is shared by all layers, micro-batches and processes.
    """
    return float(np.random.default_rng([seed, step, 0]).random())


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
