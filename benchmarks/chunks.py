"""What chunks of one token cost, where a chunk is part of the equation: a step of one block, beside chunks of 16.

    python benchmarks/chunks.py

Both in turn in one process, on one thread; the ratio is of the fastest of each.
"""

import time

import torch

from mosaics import MosaicConfig, MosaicForCausalLM

SYSTEMS = ("ttt-linear", "titans-lmm", "yaad", "omeganet", "lattice")
TIME, ROUNDS = 512, 5


def seconds(model: MosaicForCausalLM, ids: torch.Tensor) -> float:
    """Of a forward and a backward pass."""
    begun = time.perf_counter()
    model(ids, labels=ids).loss.backward()
    return time.perf_counter() - begun


def main() -> None:
    """Print a line for each system."""
    torch.set_num_threads(1)
    ids = torch.randint(4096, (1, TIME), generator=torch.Generator().manual_seed(0))
    print(f"seconds of a step of one block, {TIME} tokens:")
    for system in SYSTEMS:
        models = {
            chunk: MosaicForCausalLM(MosaicConfig.from_preset(f"{system}-tiny", chunk=chunk, num_hidden_layers=1))
            for chunk in (16, 1)
        }
        taken = {chunk: [] for chunk in models}
        for _ in range(ROUNDS):
            for chunk, model in models.items():
                taken[chunk].append(seconds(model, ids))
        best = {chunk: min(found) for chunk, found in taken.items()}
        print(f"  {system}: {best[16]:.3f} with chunks of 16, {best[1]:.3f} with 1: {best[1] / best[16]:.1f} times")


if __name__ == "__main__":
    main()
