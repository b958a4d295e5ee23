"""What our ops cost beside the plain PyTorch of other people: forward and backward, on the same inputs, in turn.

pip install --no-deps fla-core einops
python benchmarks/references.py [--tokens 2048] [--width 64] [--rounds 5]

The references are the `naive` modules of flash-linear-attention, which are meant for reading and for checking kernels,
and of which the chunked one is taken where there is one: what runs on a CPU without ours. Both have to agree first.
Medians of the ratios of rounds, lowest and highest; the Markdown is for docs/performance.md.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mosaics.experiments.measuring import paired
from mosaics.experiments.records import commit, processor
from mosaics.ops.delta_rule import delta_rule
from mosaics.ops.local_linear import local_linear
from mosaics.reporting import markdown

HEADS = 4
AGREE = 1e-3  # of the largest number; both compute in float32


def reference(name: str) -> ModuleType:
    """A module of plain PyTorch, without the package around it, which needs Triton."""
    path = Path(importlib.util.find_spec("fla").submodule_search_locations[0]) / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def turned(*tensors: Tensor) -> list[Tensor]:
    """Heads and time exchanged: they have time first."""
    return [x.transpose(1, 2) for x in tensors]


Case = tuple[str, str, Callable[..., Tensor], Callable[..., Tensor]]


def cases(width: int) -> list[Case]:
    """System, which reference, ours, theirs; both of queries, keys, values, log decay of heads, that of channels,
    strength."""
    scale = width**-0.5
    linear, gla, simple = reference("linear_attn"), reference("gla"), reference("simple_gla")
    delta, gated, kda, parallax = (reference(n) for n in ("delta_rule", "gated_delta_rule", "kda", "parallax"))
    retention = reference("retention").naive_retention
    by_head = torch.log1p(-(2.0 ** (-5.0 - torch.arange(HEADS))))[None, :, None]

    def ours(write: str, decay: str = "", corrected: bool = False) -> Callable[..., Tensor]:
        def run(q, k, v, g, channels, beta):
            chosen = {"": None, "fixed": by_head.expand_as(g), "heads": g, "channels": channels}[decay]
            return delta_rule(q * scale, k, v, chosen, beta if corrected else None, write=write)[0]

        return run

    def back(found) -> Tensor:
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return [
        (
            "linear attention",
            "chunked",
            ours("hebbian"),
            lambda q, k, v, *_: back(linear.naive_chunk_linear_attn(*turned(q, k, v))),
        ),
        ("retention", "all pairs", ours("hebbian", "fixed"), lambda q, k, v, *_: retention(q, k, v)),
        (
            "Mamba-2 (decay of heads)",
            "chunked",
            ours("hebbian", "heads"),
            lambda q, k, v, g, *_: back(simple.naive_chunk_simple_gla(*turned(q, k, v, g))),
        ),
        (
            "GLA",
            "recurrent",
            ours("hebbian", "channels"),
            lambda q, k, v, g, c, _: back(gla.naive_recurrent_gla(*turned(q, k, v, c))),
        ),
        (
            "DeltaNet",
            "chunked",
            ours("delta", corrected=True),
            lambda q, k, v, g, c, beta: delta.delta_rule_chunkwise(q, k, v, beta)[0],
        ),
        (
            "Gated DeltaNet",
            "chunked",
            ours("delta", "heads", corrected=True),
            lambda q, k, v, g, c, beta: back(gated.naive_chunk_gated_delta_rule(*turned(q, k, v, g, beta))),
        ),
        (
            "KDA",
            "chunked",
            ours("delta", "channels", corrected=True),
            lambda q, k, v, g, c, beta: back(kda.naive_chunk_kda(*turned(q, k, v, c, beta))),
        ),
        (
            "Parallax",
            "all pairs",
            lambda q, k, v, *_: local_linear(q, k, v, probe=q).read,
            lambda q, k, v, *_: back(parallax.naive_parallax(*turned(q, q, k, v))),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if not all(map(importlib.util.find_spec, ("fla", "einops"))):
        parser.error("this needs code of others; pip install --no-deps fla-core einops")
    torch.manual_seed(0)
    shape = (1, HEADS, given.tokens, given.width)
    q, k, v = (torch.randn(shape) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    decays = [torch.nn.functional.logsigmoid(torch.randn(s) + 4) for s in (shape[:3], shape)]
    inputs = [x.requires_grad_() for x in (q, k, v, *decays, torch.rand(shape[:3]))]
    target, lines = torch.randn(shape), []

    def step(run: Callable[..., Tensor]) -> list[Tensor]:
        read = run(*(x * 1 for x in inputs))  # some of them write into what they get
        return [read, *torch.autograd.grad(read, inputs[:3], target)]

    for system, kind, *both in cases(given.width):
        for mine, other in zip(*map(step, both), strict=True):
            error = (mine - other).abs().max() / other.abs().max()
            if not error < AGREE:
                sys.exit(f"{system}: ours and the reference differ by {error:.1e} of the largest number")
        runs = {name: partial(step, run) for name, run in zip(("ours", "theirs"), both, strict=True)}
        samples = paired(runs, given.rounds, torch.device("cpu"), None)
        ratios = [a / b for a, b in zip(samples["ours"], samples["theirs"], strict=True)]
        times = [1000 * statistics.median(samples[name]) for name in runs]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
        lines.append([system, kind, *(f"{t:.3g}" for t in times), spread])
        print(lines[-1], flush=True)
    about = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}"
    print(f"\n{given.tokens} tokens, {HEADS} heads of {given.width}, float32. {about}:\n")
    print(markdown(["system", "reference", "ours (ms)", "theirs (ms)", "ratio"], lines))


if __name__ == "__main__":
    main()
