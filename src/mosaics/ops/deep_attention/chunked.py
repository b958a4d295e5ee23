"""Deep attention chunk by chunk: a tile of the chunk's queries and keys against all pairs so far, made again in the
backward pass.

By how much a pair counts at a token follows from rates, windows and decays alone, so it is known before anything is
read: up to `window - 1` tokens after it from a row of numbers that the token has, and later from what it was then, less
the decays since.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mosaics.ops.deep_attention.state import DeepState, Given
from mosaics.ops.inner_loop.network import Network
from mosaics.ops.inner_loop.state import newest

FAR = 2**40  # a position that is none


def deep_attention(
    keys: Tensor,
    given: Given,
    initial: Tensor | None,
    segments: Any,
    network: Network,
    start: Tensor | None,
    state: DeepState | None,
) -> tuple[Tensor, DeepState]:
    """See `mosaics.ops.deep_attention.deep_attention`."""
    queries, values, step, window, rate, log_decay, scale, shift = given
    batch, heads, time, _ = keys.shape
    stored, size = 0 if state is None else state.keys.shape[2], window.shape[-1]
    filled = segments.filled
    count, tokens = filled.sum(-1), filled.sum((1, 2))
    first = segments.source.amin(-1)  # position of each chunk's first token in this call; `time` where it has none
    opens_after = first - filled.long().argmax(-1) - 1  # position of the token before the chunk
    if start is None:
        start = torch.full((batch, time), -stored, device=keys.device)
    own = torch.arange(time, device=keys.device)
    table, shares = _table(window, rate, log_decay, own - start, own < tokens[:, None], state)
    kept = min(stored, size - 1)  # stored pairs whose shares are known now
    shares = shares[:, :, size - 1 - kept :]
    pairs: list[_Pairs] = []
    if stored:
        place = torch.arange(-stored, 0, device=keys.device).expand(batch, -1)
        whole = torch.cat([state.shares[:, :, : stored - kept], shares[:, :, :kept]], dim=2)
        pairs.append(_Pairs(state.keys, state.errors, whole, place))
    # A row of zeros at the end, for places without a token.
    padded = [F.pad(x, (0, 0, 0, 1)) for x in (queries, keys, values, step[..., None], shares[:, :, kept:])]
    at = F.pad(table[:, :, 2:], (0, 0, 0, 1))
    second = None if initial is None else _Second.first(initial, batch, size, state)
    number = torch.arange(segments.count, device=keys.device)
    since = torch.where(segments.begins, number, -1).cummax(1).values.masked_fill(count == 0, segments.count)
    lows, sizes = (x.tolist() for x in (since.amin(0), count.amax(0))) if batch else ([0], [1])
    reads, errors, places = [], [], []
    for i in range(segments.count):
        place = torch.arange(sizes[i], device=keys.device)
        real = place < count[:, i, None]
        place = torch.where(real, first[:, i, None] + place, time)
        places.append(place)
        q, k, v, s, share, row = (_taken(x, place) for x in (*padded, at))
        begins, opens = segments.begins[:, i], segments.opens[:, i]
        if second is not None:
            second = second.opened(initial, begins, opens)
        base = first[:, i, None] - 1
        borders = torch.cat([opens_after[:, i, None], base, base + count[:, i, None]], dim=1)
        ends = _taken(table, (borders + 2).clamp(min=0))
        begin = start.gather(1, first[:, i, None].clamp(max=time - 1))
        older = torch.arange(2 - size, 1, device=keys.device) + base  # the window's tokens before the chunk
        late = table[..., -2:].gather(
            2, (older + size + 1).clamp(max=time + 1)[:, None, :, None].expand(-1, heads, -1, 2)
        )
        chunk = _Chunk(q, k, v, s, share, row, ends, place, real, borders, begin, older, late, scale, shift)
        earlier = pairs[0 if lows[i] < 0 else bool(stored) + lows[i] :]
        answered = _again if torch.is_grad_enabled() else _answered
        read, error, second = answered(chunk, network, second, earlier)
        pairs.append(_Pairs(k, error, share, torch.where(real, place, FAR)))
        reads.append(read)
        errors.append(error)
    index = torch.cat(places, dim=1)[:, None, :, None]
    read, error = (
        values.new_zeros(batch, heads, time + 1, x[0].shape[-1]).scatter(
            2, index.expand(-1, heads, -1, x[0].shape[-1]), torch.cat(x, dim=2)
        )[:, :, :-1]
        for x in (reads, errors)
    )
    last = tokens[:, None] - 1
    opened = last - segments.position.gather(1, last.clamp(min=0)) - 1
    opened = torch.where(last < 0, -2, opened)
    if kept:
        error = torch.cat([state.errors[:, :, stored - kept :], error], dim=2)
    ends = (_taken(table, (x + 2).clamp(min=0)) for x in (last, opened))
    return read, DeepState(keys, error, shares, *ends, *(second or ()))


def _table(
    window: Tensor, rate: Tensor, log_decay: Tensor, position: Tensor, real: Tensor, state: DeepState | None
) -> tuple[Tensor, Tensor]:
    """Rows as `DeepState.now`, `(batch, heads, 2 + time, window + 1)`: of the tokens before the open chunk and before
    the call, then of its own; and `shares` as there of the last `window - 1` tokens before the call and its own."""
    batch, heads, _, size = window.shape
    written = rate[..., None] * window
    before = window.new_zeros(batch, heads, 1, size + 1) if state is None else state.now
    log_decay = log_decay.masked_fill(~real[:, None], 0.0)
    fade, since = log_decay.exp(), before[..., -1] + log_decay.cumsum(-1)
    rows = [written[..., 0]]
    for back in range(1, size):
        older = torch.cat([before[..., back - 1], rows[-1]], dim=2)[:, :, :-1]
        rows.append(torch.where(position[:, None] >= back, fade * older + written[..., back], 0.0))
    rows = torch.stack([*rows, since], dim=-1)
    table = torch.cat([before if state is None else state.opened, before, rows], dim=2)
    return table, F.pad(rows[..., -2:], (0, 0, 0, size - 1))


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """Of `x` `(batch, heads, time, width)` the rows `(batch, places)`."""
    return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class _Pairs(NamedTuple):
    """Some pairs, as `DeepState` has them, and their positions `(batch, pairs)` in the call; `FAR` for none."""

    keys: Tensor
    errors: Tensor
    shares: Tensor
    place: Tensor


class _Second(NamedTuple):
    """The second map, as `DeepState` has it."""

    current: Tensor
    anchor: Tensor
    inputs: Tensor
    sent: Tensor

    @classmethod
    def first(cls, initial: Tensor, batch: int, window: int, state: DeepState | None) -> _Second:
        if state is not None:
            return cls(*state[-4:])
        whole = initial.expand(batch, *initial.shape)
        older = (whole.new_zeros(*whole.shape[:2], window - 1, whole.shape[dim]) for dim in (2, 3))
        return cls(whole, whole, *older)

    def opened(self, initial: Tensor, begins: Tensor, opens: Tensor) -> _Second:
        """Where a chunk opens, and where that begins a document, `(batch,)`."""
        current = torch.where(begins[:, None, None, None], initial, self.current)
        return self._replace(current=current, anchor=torch.where(opens[:, None, None, None], current, self.anchor))


class _Chunk(NamedTuple):
    """What the tokens of a chunk bring, `(batch, heads, places, ...)`.

    Attributes:
        queries, keys, values, step, shares: of each place.
        rows: of each place, as `DeepState.now`.
        ends: rows of the tokens before the chunk, before the part of it that is in this call, and at its end.
        place: positions in the call.
        real: where there are tokens.
        borders: the positions of `ends`.
        begin: where the document begins, `(batch, 1)`.
        older: positions of the window's tokens before, `(batch, window - 1)`.
        late: their shares.
        scale, shift: of the kernel, `(heads,)`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    step: Tensor
    shares: Tensor
    rows: Tensor
    ends: Tensor
    place: Tensor
    real: Tensor
    borders: Tensor
    begin: Tensor
    older: Tensor
    late: Tensor
    scale: Tensor
    shift: Tensor

    def kernel(self, asked: Tensor, keys: Tensor) -> Tensor:
        return (self.scale[:, None, None] * asked @ keys.mT - self.shift[:, None, None]).exp()

    def counted(self, rows: Tensor, place: Tensor, shares: Tensor, of: Tensor) -> Tensor:
        """By how much the errors at the positions `of` are multiplied at others, `(batch, heads, places, of)`."""
        gap = place[:, :, None] - of[:, None]
        readable = ((gap >= 0) & (of >= self.begin)[:, None])[:, None]
        size = rows.shape[-1] - 1
        recent = rows[..., :-1].gather(-1, gap.clamp(0, size - 1)[:, None].expand(-1, rows.shape[1], -1, -1))
        faded = (rows[..., -1:] - shares[..., 1][:, :, None]).clamp(max=0).exp() * shares[..., 0][:, :, None]
        return torch.where(readable, torch.where((gap < size)[:, None], recent, faded), 0.0)


def _again(
    chunk: _Chunk, network: Network, second: _Second | None, earlier: list[_Pairs]
) -> tuple[Tensor, Tensor, _Second | None]:
    """As `_answered`, made again in the backward pass. Tensors are handed over one by one, so that they are known to be
    kept."""
    begin, end = len(chunk), len(chunk) + len(second or ())

    def run(*given: Tensor) -> tuple[Tensor, Tensor, _Second | None]:
        pairs = [_Pairs(*given[i : i + 4]) for i in range(end, len(given), 4)]
        return _answered(_Chunk(*given[:begin]), network, second and _Second(*given[begin:end]), pairs)

    given = (*chunk, *(second or ()), *(x for pairs in earlier for x in pairs))
    return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)


def _answered(
    chunk: _Chunk, network: Network, second: _Second | None, earlier: list[_Pairs]
) -> tuple[Tensor, Tensor, _Second | None]:
    """What is read, the errors behind the first map, and the second map after the chunk."""
    places = chunk.place.shape[1]
    asked = torch.where(chunk.real, chunk.place, -FAR)
    known = sums = 0.0
    if earlier:
        keys, errors, shares = (torch.cat(x, dim=2) for x in list(zip(*earlier, strict=True))[:3])
        of = torch.cat([pairs.place for pairs in earlier], dim=1)
        counted = chunk.counted(
            torch.cat([chunk.rows, chunk.ends[:, :, :1]], dim=2),
            torch.cat([asked, chunk.borders[:, :1]], dim=1),
            shares,
            of,
        )
        near = chunk.kernel(torch.cat([chunk.queries, chunk.keys], dim=2), keys)
        weights = torch.cat([near[:, :, :places] * counted[:, :, :-1], near[:, :, places:] * counted[:, :, -1:]], dim=2)
        sums, known = (-weights @ errors).split(places, dim=2)
    units = chunk.values.shape[-1] if second is None else second.anchor.shape[2]
    zeros = chunk.values.new_zeros(*chunk.values.shape[:3], units)
    known, sums = zeros + known, zeros + sums
    inner = known if second is None else network.active(known)
    answer = known if second is None else inner @ second.anchor
    error = chunk.step * network.loss.errors(answer, chunk.values, None)
    back = error if second is None else network.back(error @ second.anchor.mT, known)
    own = torch.where(chunk.real, chunk.place, FAR)
    counted = chunk.counted(chunk.rows, asked, chunk.shares, own)
    sums = sums - (chunk.kernel(chunk.queries, chunk.keys) * counted) @ back
    if second is None:
        return sums, back, None

    x, of = network.active(sums), torch.cat([chunk.older, own], dim=1)
    inputs, sent = torch.cat([second.inputs, inner], dim=2), torch.cat([second.sent, error], dim=2)
    # What the second map at hand has of the window's older tokens already is not written again.
    shares, base = torch.cat([chunk.late, chunk.shares], dim=2), chunk.ends[:, :, 1:2]
    had = chunk.counted(base, chunk.borders[:, 1:2], shares, of)
    rows = torch.cat([chunk.rows, chunk.ends[:, :, 2:]], dim=2)
    left = (rows[..., -1:] - base[..., -1:]).clamp(max=0).exp()
    counted = chunk.counted(rows, torch.cat([asked, chunk.borders[:, 2:]], dim=1), shares, of) - left * had
    read = left[:, :, :-1] * (x @ second.current) - ((x @ inputs.mT) * counted[:, :, :-1]) @ sent
    current = left[:, :, -1:] * second.current - (inputs * counted[:, :, -1:].mT).mT @ sent
    real = chunk.real[:, None]
    return read, back, _Second(current, second.anchor, newest(inputs, real), newest(sent, real))
