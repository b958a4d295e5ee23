"""Random draws of a run. Those of a step depend on (seed, step) alone, so resuming needs no generator's
state."""

import numpy as np
import torch


def draw_step(seed: int, step: int) -> float:
    """The random number in [0, 1) of one optimisation step, from which the long-term delay follows.

    It is shared by all layers, micro-batches and processes.
    """
    return float(np.random.default_rng([seed, step, 0]).random())


def seed_step(seed: int, step: int) -> None:
    """Seed torch's default generators (dropout draws from them) for a step; step 0 is the initialisation."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, 1]).generate_state(1, np.uint64)[0] >> 1))
