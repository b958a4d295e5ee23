"""The gated recurrence of the keys as products of small matrices: no loop over time, no T x T array."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaics.ops import may_be, widest
from mosaics.ops.leaky_average.state import LeakyAverageState, at_least_float32, floor_of, shortened

CHUNK = 32
FORGET = -1e5  # exp(FORGET) is 0: a decay below it begins anew
APART = 1e7  # more than any sum of the logarithms of one chunk


def leaky_average(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, state: LeakyAverageState | None = None, eps: float = 0.0
) -> tuple[Tensor, LeakyAverageState]:
    """Equation 8 in chunks of `CHUNK` positions; see `mosaics.ops.leaky_average.leaky_average`."""
    dtype = inputs.dtype
    inputs = at_least_float32(inputs)
    if state is None:
        state = LeakyAverageState.empty(inputs)
    directions, log_scales = _averages(inputs, *(x.to(widest(x)) for x in (log_gate, log_decay)), *state)
    log_scales = log_scales.to(inputs.dtype)
    keys = shortened(directions, log_scales, eps).to(dtype)
    return keys, LeakyAverageState(directions[..., -1, :], log_scales[..., -1])


def _averages(
    inputs: Tensor, log_gate: Tensor, log_decay: Tensor, first: Tensor, first_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Directions `(batch, heads, time, width)` and log scales `(batch, heads, time)` of all averages.

    The start of every chunk is again a leaky average, of the chunks before it: hence the recursion, which is as
    deep as the logarithm of the length. Logarithms are as wide as can be: differences of their sums keep their digits.
    """
    time = inputs.shape[2]
    # A graph that is exported serves every length, so it can't have the depth of one: it is quadratic, as its reads.
    chunks = 1 if torch.compiler.is_exporting() else -(-time // CHUNK)
    size = -(-time // chunks)
    missing = chunks * size - time
    if chunks > 1 and missing:  # A position with a gate of 0 and a decay of 1 changes nothing.
        inputs = F.pad(inputs, (0, 0, 0, missing))
        log_gate = F.pad(log_gate, (0, missing), value=-torch.inf)
        log_decay = F.pad(log_decay, (0, missing))
    inputs, log_gate, log_decay = (x.unflatten(2, (chunks, size)) for x in (inputs, log_gate, log_decay))

    # A position i of a chunk weighs exp(since[t] + logs[i]) at position t, unless the past is forgotten between them.
    forgotten = log_decay < FORGET
    part = forgotten.cumsum(-1) if may_be(lambda: forgotten.any()) else None
    since = log_decay.masked_fill(forgotten, 0.0).cumsum(-1)
    logs = log_gate - since

    first, first_scale = first[:, :, None], first_scale[:, :, None].to(log_gate.dtype)
    if chunks > 1:
        # What each chunk but the last adds, seen from its end.
        ends, decays = logs[:, :, :-1], since[:, :, :-1, -1]
        if part is not None:
            ends = ends.masked_fill(part[:, :, :-1] != part[:, :, :-1, -1:], -torch.inf)
            decays = decays.masked_fill(part[:, :, :-1, -1] > 0, -torch.inf)
        most = ends.detach().amax(-1)
        weights = (ends - most.masked_fill(most == -torch.inf, 0.0)[..., None]).exp().to(inputs.dtype)
        added = (weights[..., None, :] @ inputs[:, :, :-1]).squeeze(-2)
        later, later_scale = _averages(added, since[:, :, :-1, -1] + most, decays, first[:, :, 0], first_scale[:, :, 0])
        first = torch.cat([first, later], dim=2)
        first_scale = torch.cat([first_scale, later_scale], dim=2)

    # Column 0 is what came before the chunk.
    logs = torch.cat([first_scale[..., None], logs], dim=-1)
    if part is not None:
        part = F.pad(part, (1, 0))
    most = _running_maximum(logs.detach(), part)
    directions, norms = _WeightedDirections.apply(torch.cat([first[..., None, :], inputs], dim=-2), logs, most, part)
    log_scales = since + most + norms.to(most.dtype).log()
    return directions.flatten(2, 3)[:, :, :time], log_scales.flatten(2, 3)[:, :, :time]


def _running_maximum(logs: Tensor, part: Tensor | None) -> Tensor:
    """The largest of columns 0 ... t + 1 for each position t, of its own part; -inf where there is nothing. A
    constant: the average does not depend on it."""
    if part is None:
        return _cummax(logs)[..., 1:]
    most = _cummax(logs + APART * part)[..., 1:] - APART * part[..., 1:]
    return most.masked_fill(most < -APART / 2, -torch.inf)


def _cummax(x: Tensor) -> Tensor:
    """The largest of all up to each of the last dimension."""
    if not torch.compiler.is_exporting():
        return x.cummax(-1).values
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)  # ONNX has no cummax
    return x[..., None, :].masked_fill(later, -torch.inf).amax(-1)


class _WeightedDirections(torch.autograd.Function):
    """Direction and norm of each row of `weights @ vectors`, where weights[t, i] = exp(logs[i] - most[t])."""

    @staticmethod
    def forward(ctx, vectors: Tensor, logs: Tensor, most: Tensor, part: Tensor | None) -> tuple[Tensor, Tensor]:
        most = most.masked_fill(most == -torch.inf, 0.0)
        weights = (logs[..., None, :] - most[..., :, None]).to(vectors.dtype).exp_().tril_(1)
        if part is not None:
            weights.masked_fill_(part[..., None, :] != part[..., 1:, None], 0.0)
        average = weights @ vectors
        norms, floor = torch.linalg.vector_norm(average, dim=-1), floor_of(average)
        inverse = norms.clamp_(min=floor).reciprocal().masked_fill_(norms <= floor, 0.0)
        directions = average.mul_(inverse[..., None])
        ctx.save_for_backward(vectors, weights, directions, inverse)
        ctx.set_materialize_grads(False)
        return directions, norms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor | None, grad_norms: Tensor | None) -> tuple[Tensor | None, ...]:
        vectors, weights, directions, inverse = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(directions)
        along = -torch.linalg.vecdot(grad, directions) * inverse
        if grad_norms is not None:
            along += grad_norms
        grad_average = (directions * along[..., None]).addcmul_(grad, inverse[..., None])
        grad_logs = (grad_average @ vectors.mT).mul_(weights).sum(-2, dtype=widest(vectors))
        return weights.mT @ grad_average, grad_logs, None, None
