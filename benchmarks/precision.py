"""The error of each form of the two ops in float32 and bfloat16, against the naive twin in float64 (above 8192 tokens
against the blockwise form in float64, one head: a T x T array would not fit).

`python benchmarks/precision.py` prints two tables of relative root mean square errors: `rounded` against the twin fed
the same rounded inputs (what the form adds), `exact` against the twin fed the inputs before they were rounded. With
TRITON_INTERPRET=1 the kernel of the leaky average is among the forms; `flex` is unfused here. `--gradients` prints the
errors of float32 gradients instead: of reads where keys repeat, and of averages over long documents.
"""

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops import kernel_regression as read
from mosaics.ops import leaky_average as average

HEADS, WIDTH, REACH = 4, 128, read.Reach(64)
FORMS = ("naive", "blockwise", "shifted")
LARGEST_SQUARE = 8192
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def error(value: Tensor, expected: Tensor) -> str:
    return f"{((value.double() - expected).norm() / expected.norm()).item():9.1e}"


def bandwidth(dtype: torch.dtype, heads: int = HEADS) -> read.Bandwidth:
    """Table 6's initialisation."""
    theta = torch.full((heads,), 1.5, dtype=dtype)
    return read.Bandwidth(theta.exp(), theta.exp(), torch.full((heads,), 1 / 3, dtype=dtype))


def rounded_logits(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """For comparison, what no form does: the logits of the whole T x T read in the dtype of the inputs."""
    first, end = REACH.span(queries, keys)
    slot = torch.arange(keys.shape[2])
    outside = (slot < first[:, None]) | (slot >= end[:, None])
    beta = bandwidth(torch.float32).at(end - first).to(queries.dtype)
    logits = beta[..., None] * (queries @ keys.mT)
    weights = logits.masked_fill(outside, -torch.inf).softmax(-1).nan_to_num()
    return weights @ values


def reads(time: int, repeated: bool) -> None:
    """Random keys, or keys of which the second half repeats the first, so that one pair stands out for each query."""
    small = time <= LARGEST_SQUARE
    heads, twin = (HEADS, read.FORMS["naive"]) if small else (1, read.FORMS["blockwise"])
    forms = (*FORMS, "flex") if small else FORMS[1:]
    inputs = torch.randn(1, heads, time, WIDTH, dtype=torch.float64)
    if repeated:
        inputs[:, :, time // 2 :] = inputs[:, :, : time - time // 2]
    ones = torch.ones(1, heads, time, dtype=torch.float64)
    keys, _ = average.leaky_average(inputs, 0 * ones, -0.4 * ones)  # the decay at initialisation, block 1
    values = F.normalize(torch.randn(1, heads, time, WIDTH, dtype=torch.float64), dim=-1)
    exact = twin(keys, keys, values, bandwidth(torch.float64, heads), REACH)
    for dtype in (torch.float32, torch.bfloat16):
        k, v = keys.to(dtype), values.to(dtype)
        expected = twin(k.double(), k.double(), v.double(), bandwidth(torch.float64, heads), REACH)
        beta = bandwidth(torch.float32, heads)
        found = {form: read.kernel_regression(k, k, v, beta, REACH, form=form) for form in forms}
        if dtype == torch.bfloat16 and small:
            found["(logits in bfloat16)"] = rounded_logits(k, k, v)
        for form, out in found.items():
            kind = "repeated" if repeated else "random"
            print(f"  {time:6d} {kind:9s} {str(dtype)[6:]:9s} {form:21s} {error(out, expected)} {error(out, exact)}")


def averages(time: int, spread: float) -> None:
    """Gates and decays whose logarithms vary by `spread`."""
    inputs = torch.randn(1, HEADS, time, WIDTH, dtype=torch.float64)
    log_gate = spread * torch.randn(1, HEADS, time, dtype=torch.float64)
    log_decay = -(spread * torch.randn(1, HEADS, time, dtype=torch.float64)).abs()
    exact, _ = average.leaky_average(inputs, log_gate, log_decay, form="naive")
    for dtype in (torch.float32, torch.bfloat16):
        arguments = [x.to(dtype) for x in (inputs, log_gate, log_decay)]
        expected, _ = average.leaky_average(*(x.double() for x in arguments), form="naive")
        for form in ("naive", "chunked", "triton") if INTERPRETED else ("naive", "chunked"):
            out, _ = average.leaky_average(*arguments, form=form)
            print(f"  {time:6d} {spread:<9g} {str(dtype)[6:]:9s} {form:21s} {error(out, expected)} {error(out, exact)}")


def gradients(function: Callable[..., Tensor], arguments: list[Tensor], dtype: torch.dtype, form: str) -> list[Tensor]:
    """Those of a random sum of what a form says."""
    leaves = [x.to(dtype).requires_grad_() for x in arguments]
    out = function(*leaves, form=form)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [x.double() for x in torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


def gradients_of_reads(time: int, period: int, theta: tuple[float, float, float]) -> None:
    """Keys that come back after `period` positions; `theta` are the logarithms of beta_0 and beta_1, and alpha."""

    def ask(k: Tensor, v: Tensor, base: Tensor, slope: Tensor, exponent: Tensor, form: str) -> Tensor:
        beta = read.Bandwidth(base.exp(), slope.exp(), exponent)
        return read.kernel_regression(k, k, v, beta, read.Reach(1), form=form)

    drawn = torch.randn(1, HEADS, period, WIDTH, dtype=torch.float64)
    keys = F.normalize(drawn[:, :, torch.arange(time) % period], dim=-1).float()
    values = F.normalize(torch.randn(1, HEADS, time, WIDTH), dim=-1)
    arguments = [keys, values, *(torch.full((HEADS,), x) for x in theta)]
    exact = gradients(ask, arguments, torch.float64, "naive")
    for form in ("naive", "blockwise", "compiled"):
        errors = map(error, gradients(ask, arguments, torch.float32, form), exact)
        print(f"  {time:6d} {period:5d} {str(theta[:2]):12s} {form:10s}", *errors)


def gradients_of_averages(time: int, decay: float) -> None:
    """Log gates of deviation 1, log decays of deviation `decay`."""
    ones = torch.ones(1, 2, time)
    arguments = [torch.randn(1, 2, time, 64), torch.randn_like(ones), -decay * torch.randn_like(ones).abs()]
    ask = lambda *x, form: average.leaky_average(*x, form=form)[0]  # noqa: E731
    exact = gradients(ask, arguments, torch.float64, "compiled")
    for form in ("chunked", "compiled"):
        print(f"  {time:6d} {decay:6g} {form:10s}", *map(error, gradients(ask, arguments, torch.float32, form), exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096], help="tokens")
    parser.add_argument("--gradients", action="store_true", help="errors of gradients in float32 instead")
    given = parser.parse_args()
    lengths = given.lengths
    torch.manual_seed(0)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    print(f"commit {commit}, torch {torch.__version__}, {torch.get_num_threads()} threads, CPU; heads of {WIDTH}")
    if given.gradients:
        print("kernel_regression: length, period, theta, form, error of the gradients of k, v and each theta")
        for period in (500, 50):
            for theta in ((1.5, 1.5, 1 / 3), (3.0, 4.0, 0.6)):
                gradients_of_reads(1000, period, theta)
        print("leaky_average: length, log decays, form, error of the gradients of inputs, gates and decays")
        for time in (20_000, 100_000):
            for decay in (0.1, 1e-4):
                gradients_of_averages(time, decay)
        return
    counts = torch.tensor([255, 500, 4096, 32768])
    for count, beta in zip(counts.tolist(), bandwidth(torch.float64).at(counts)[0].tolist(), strict=True):
        spacing = 2.0 ** (torch.tensor(beta).log2().floor().item() - 7)
        print(f"beta({count}) = {beta:.1f}; bfloat16 numbers of that size are {spacing:g} apart")
    print("kernel_regression: length, keys, dtype, form, error (same rounded inputs, exact inputs)")
    for time in lengths:
        for repeated in (False, True):
            reads(time, repeated)
    print("leaky_average: length, spread of the log gates, dtype, form, error (same rounded inputs, exact inputs)")
    for time in lengths:
        for spread in (1.0, 10.0):
            averages(time, spread)


if __name__ == "__main__":
    main()
